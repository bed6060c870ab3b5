"""Fixtures of the room of images and sounds."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "chat")]  # corpus_texts, chat_samples

from media_samples import write_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer with <image> and <audio> among its special tokens."""
    return write_tokenizer(tmp_path_factory.mktemp("media") / "tokenizer")
