"""The bar of a single step, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from nemo_ext import progress


def test_preparation_in_a_log(monkeypatch):
    monkeypatch.setattr(progress, "BAR_LINE_SECONDS", 0.0)
    text = io.StringIO()
    with progress.bar("tokenising", 1000, "documents", Console(file=text, width=200)) as advance:
        advance(250)
        advance.advance(750)
    lines = text.getvalue().splitlines()
    assert lines == [
        "tokenising: 250/1,000 documents",
        "tokenising: 1,000/1,000 documents",
        "tokenising: 1,000/1,000 documents in 0:00",
    ]


def test_preparation_of_unknown_length_is_one_line_at_the_end():
    text = io.StringIO()
    with progress.bar("counting", console=Console(file=text, width=200)) as count:
        for done in range(100):
            count(done + 1, unit="lines")
    assert text.getvalue() == "counting: 100 lines in 0:00\n"


def test_preparation_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    with progress.bar("converting", 8, "tensors", console) as count:
        count(8)
    assert "8/8 tensors" in text.getvalue() and text.getvalue().endswith("converting: 8/8 tensors in 0:00\n")


def test_failed_preparation_does_not_say_it_is_done():
    text = io.StringIO()
    with pytest.raises(ZeroDivisionError), progress.bar("dividing", 2, console=Console(file=text)):
        raise ZeroDivisionError
    assert text.getvalue() == ""


def test_bytes_are_shown_as_megabytes():
    text = io.StringIO()
    with progress.bar("reading", unit="B", console=Console(file=text, width=200)) as count:
        count(2_345_678, 4_000_000)
    assert text.getvalue() == "reading: 2.3/4.0 MB in 0:00\n"
