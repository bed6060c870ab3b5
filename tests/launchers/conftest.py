"""What the tests of the command share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cached(small, monkeypatch) -> Path:
    """Everything that a command in this process prepares goes into a folder of the tests."""
    monkeypatch.setenv("LLM_BUILDER_CACHE", str(small.cache))
    return small.cache
