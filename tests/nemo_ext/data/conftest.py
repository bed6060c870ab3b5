"""Fixtures of the data room: a tokenizer folder and documents."""

import json
import random

import pytest
from corpus_texts import PROSE, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizers") / "llama3", "llama3")


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """600 different documents of a few hundred tokens."""
    rng = random.Random(3)
    words = PROSE.split()
    return [f"Document {i}. " + " ".join(rng.choices(words, k=rng.randint(20, 120))) for i in range(600)]


@pytest.fixture()
def jsonl(tmp_path, documents):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(documents)))
    return path
