"""Multiple-choice questions in the formats of MMLU, C-Eval, CMMLU and their relatives.

CSV   question,A,B,C,D,answer with a header (of any case, other columns allowed) or without one
JSON  {"question", "choices": [...] or {"text": [...], "label": [...]} or "A", "B", ..., "answer": a letter, an index from 0, or
      the right choice itself}; also as Parquet or a data set

A row's subject is its `subject` or `category`; of a folder of several files that have none, the name of the file.
"""

from __future__ import annotations

import csv
import io
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.data.chat import records
from nemo_ext.data.sources import RECORDS, Source, file_kind
from nemo_ext.errors import UserError

LETTERS = string.ascii_uppercase
QUESTION = ("question", "query", "problem", "input")
ANSWER = ("answer", "answerkey", "answer_key", "label", "target", "gold")
CHOICES = ("choices", "options")
SUBJECT = ("subject", "category")
PARTS = re.compile(r"[_-](test|val|validation|dev|train)$")  # of a subject, which a file's name may end with


@dataclass(frozen=True)
class Question:
    """`answer` is the index of the right choice, `place` where the row stands."""

    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    place: str


def read(source: Source) -> list[Question]:
    """The questions of a source in order. Raises UserError, with file and line, for a row that is none."""
    by_file = len(source.files) > 1
    found = []
    for place, row in _rows(source):
        stem = Path(getattr(place, "name", "")).name.split(".")[0]
        found.append(_question(row, str(place), PARTS.sub("", stem) if by_file else ""))
    if not found:
        raise UserError(f"mcq:{source.name}: there is no question in it")
    return found


def _rows(source: Source) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    if source.kind != "files":
        for block in records.plan(source):
            yield from records.records(block)
        return
    for path in source.files:
        if file_kind(path, RECORDS) == "table":
            yield from _table(path)
        else:
            for block in records.plan(Source(str(path), "files", files=(path,), chosen=True)):
                yield from records.records(block)


def _table(path: Path) -> Iterator[tuple[records.Place, dict[str, str]]]:
    """Rows of a CSV or TSV. Its first line is a header if it names a question, an answer and A; else it is a row of MMLU's."""
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if any(suffix.lower() == ".tsv" for suffix in path.suffixes) else ","
    reader = csv.reader(io.StringIO(records._text(path), newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for row in reader:
            place, line = records.Place(str(path), "line", line), reader.line_num + 1
            if not any(field.strip() for field in row):
                continue
            if names is None:
                folded = [field.strip().lower() for field in row]
                if any(n in folded for n in QUESTION) and any(n in folded for n in ANSWER):
                    names = folded
                    continue
                if len(row) < 4 or len(row) - 2 > len(LETTERS):
                    raise UserError(f"{place}: {len(row)} fields are not question,A,B,C,D,answer")
                names = ["question", *(letter.lower() for letter in LETTERS[: len(row) - 2]), "answer"]
            if len(row) != len(names):
                raise UserError(f"{place}: {len(row)} fields where {len(names)} belong")
            yield place, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def _question(row: Mapping[str, Any], place: str, subject: str) -> Question:
    row = {str(name).strip().lower(): value for name, value in row.items()}
    fields = ", ".join(row) or "none"
    text = next((row[name] for name in QUESTION if isinstance(row.get(name), str) and row[name].strip()), None)
    if text is None:
        raise UserError(f'{place}: no "question": the fields are {fields}')
    choices, labels = _choices(row, place)
    if len(choices) < 2:
        raise UserError(f"{place}: no choices: a question has two or more, as choices or A, B, ...; the fields are {fields}")
    if len(choices) > len(LETTERS):
        raise UserError(f"{place}: {len(choices)} choices are more than there are letters")
    answer = next((row[name] for name in ANSWER if row.get(name) not in (None, "")), None)
    if answer is None:
        raise UserError(f'{place}: no "answer": the fields are {fields}')
    index = _index(answer, choices, labels)
    if index is None:
        raise UserError(f"{place}: the answer {answer!r} is none of the {len(choices)} choices")
    own = next((str(row[name]) for name in SUBJECT if row.get(name) not in (None, "")), subject)
    return Question(text.strip(), choices, index, own, place)


def _choices(row: Mapping[str, Any], place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices' texts, and what names them."""
    given = next((row[name] for name in CHOICES if row.get(name) is not None), None)
    labels: Sequence[Any] = LETTERS
    if isinstance(given, Mapping) and "text" in given:
        given, labels = given["text"], given.get("label") or LETTERS
    elif isinstance(given, Mapping):
        given, labels = list(given.values()), list(given)
    if given is None:
        letters = [letter for letter in LETTERS if row.get(letter.lower()) not in (None, "")]
        if letters != list(LETTERS[: len(letters)]):
            missing = next(letter for letter in LETTERS if letter not in letters)
            raise UserError(f"{place}: choice {missing} is missing or empty")
        given = [row[letter.lower()] for letter in letters]
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise UserError(f"{place}: the choices are a {type(given).__name__}, not a list")
    texts = tuple(str(choice).strip() for choice in given)
    if "" in texts:
        raise UserError(f"{place}: choice {LETTERS[texts.index('')]} is missing or empty")
    return texts, tuple(str(label).strip() for label in labels)


def _index(answer: Any, choices: tuple[str, ...], labels: tuple[str, ...]) -> int | None:
    """Which choice `answer` means: by its label or letter, as an index from 0, or as the choice's own text."""
    if isinstance(answer, bool):
        return None
    if isinstance(answer, (int, float)):
        return int(answer) if answer == int(answer) and 0 <= answer < len(choices) else None
    text = str(answer).strip()
    named = text.strip("().")
    for names in (labels[: len(choices)], LETTERS[: len(choices)]):
        for i, name in enumerate(names):
            if name.upper() == named.upper():
                return i
    if text in choices:
        return choices.index(text)
    return int(named) if named.isdecimal() and int(named) < len(choices) else None
