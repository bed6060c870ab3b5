"""Fixtures of the conversations' room. Tokenizers are made by chat_samples."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # corpus_texts

from chat_samples import TEMPLATES, unmarked, write_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """A tokenizer without a chat template."""
    return write_tokenizer(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="session")
def template_files(tmp_path_factory):
    """The templates without generation tags, as files."""
    folder = tmp_path_factory.mktemp("templates")
    for name, template in TEMPLATES.items():
        (folder / name).write_text(unmarked(template))
    return folder
