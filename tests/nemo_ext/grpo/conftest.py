"""A tiny model and problems for the tests of the embedded engine."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A Hugging Face folder of a tiny llama."""
    from nemo_ext import platform

    platform.activate()
    from grpo_models import write_model

    return write_model(tmp_path_factory.mktemp("grpo") / "model")


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    """24 problems in a file of JSON lines."""
    from grpo_models import write_problems

    return write_problems(tmp_path_factory.mktemp("sums") / "sums.jsonl")
