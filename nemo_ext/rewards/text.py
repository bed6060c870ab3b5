"""Rewards that are rules about a text."""

from __future__ import annotations

import re
import string
from fractions import Fraction
from typing import Any

from nemo_ext.rewards import extract

CLOSE = Fraction(1, 10**6)  # relative difference of decimals that count as equal

Row = dict[str, Any]
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:)]?")
_LEADING = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.:)])(?=\s|$)")
_STANDING = re.compile(r"\(([A-Z])\)|(?<![\w'])([A-Z])(?=[.:)]?\s*$)|^\s*([A-Z])[.:)]", re.MULTILINE)
_MARKUP = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")


def exact(answer: str, row: Row) -> float:
    """1 if the marked answer, or all that is said where none is marked, is the row's text; runs of white space are equal."""
    found = extract.marked(answer)
    found = extract.spoken(answer) if found is None else found
    return float(found is not None and extract.words(found) == extract.words(str(row["answer"])))


def numeric(answer: str, row: Row) -> float:
    """1 if the one number in the marked answer, or the last number where none is marked, is the row's. Whole numbers must be
    equal, others may differ by a millionth of the row's."""
    truth = reference_number(row)
    marked = extract.marked(answer)
    if marked is None:
        said = extract.spoken(answer)
        text = extract.last_number(said) if said is not None else None
    else:
        text = marked if extract.number(marked) is not None else extract.only_number(marked)
    found = extract.number(text) if text is not None else None
    if truth is None or found is None:
        return 0.0
    if truth.denominator == 1 and found.denominator == 1:
        return float(found == truth)
    return float(abs(found - truth) <= CLOSE * abs(truth))


def reference_number(row: Row) -> Fraction | None:
    """The number in a row's answer."""
    text = str(row["answer"])
    return extract.number(extract.marked(text) or text)


def choice(answer: str, row: Row) -> float:
    """1 if the answer picks the row's choice, by its letter or by its text."""
    picked = picked_letter(answer, row.get("choices"))
    return float(picked is not None and picked == reference_letter(row))


def reference_letter(row: Row) -> str | None:
    """The right letter of a row whose answer is a letter, the place of a choice counted from 0, or a choice's text."""
    truth, choices = row["answer"], texts(row.get("choices"))
    if isinstance(truth, int) and not isinstance(truth, bool):
        return string.ascii_uppercase[truth] if 0 <= truth < 26 else None
    found = _LETTER.fullmatch(str(truth).strip())
    if found:
        return found[1].upper()
    return _by_text(str(truth), choices)


def picked_letter(answer: str, choices: Any = None) -> str | None:
    """The letter that an answer picks: a marked answer that is a letter, begins with one as in "(B) Paris" or is a choice's text;
    else the last letter in brackets, at the start of a line with a mark behind it, or at the end of a line. None where none of
    that is there, or the letter is beyond the choices."""
    said = extract.spoken(answer)
    if said is None:
        return None
    listed = texts(choices)
    marked = extract.marked(answer)
    text = _MARKUP.sub(r"\1", said if marked is None else marked).replace("*", "").replace("$", "").strip()
    found = _LETTER.fullmatch(text)
    letter = found[1].upper() if found else _by_text(text, listed)
    if letter is None and (found := _LEADING.match(text)):
        letter = found[1] or found[2]
    if letter is None:
        every = [next(filter(None, groups)) for groups in _STANDING.findall(text)]
        letter = every[-1] if every else None
    return letter if letter is None or not listed or string.ascii_uppercase.index(letter) < len(listed) else None


def texts(choices: Any) -> list[str]:
    """The choices of a row: a list, or a dictionary with a list under `text`."""
    if isinstance(choices, dict):
        choices = choices.get("text", list(choices.values()))
    return [str(each) for each in choices] if choices is not None else []


def layout(answer: str, row: Row) -> float:
    """1 if the answer is <think>...</think> and then <answer>...</answer>, each exactly once, neither empty, with only white
    space around them. Where the row's `prompt` ends with <think>, the answer begins behind that tag."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.rstrip().endswith("<think>"):
        answer = "<think>" + answer
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(answer.count(tag) != 1 for tag in tags):
        return 0.0
    before, rest = answer.split(tags[0])
    parts = [before]
    for tag in tags[1:]:
        if tag not in rest:
            return 0.0
        part, rest = rest.split(tag)
        parts.append(part)
    before, thoughts, between, final = (part.strip() for part in parts)
    return float(not before and bool(thoughts) and not between and bool(final) and not rest.strip())


def _by_text(text: str, choices: list[str]) -> str | None:
    same = [place for place, each in enumerate(choices) if extract.words(each).casefold() == extract.words(text).casefold()]
    return string.ascii_uppercase[same[0]] if same and same[0] < 26 else None
