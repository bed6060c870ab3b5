"""The final answer in a text that a model wrote. Every function takes time linear in the text."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 100_000  # characters of an answer that are looked at, from its end

_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[ \t]*:?[ \t]*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}\b)?(?:\s*/\s*\d+(?:\.\d+)?)?")
_PLAIN = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))(?:[eE]([-+]?\d{1,3}))?(?:/(\d+(?:\.\d+)?))?")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SENTENCE = re.compile(r"[.!?](?:\s|$)")


def spoken(text: str) -> str | None:
    """What is said after thinking: the text behind the last `</think>`. None while the thinking never ends."""
    text = text[-LONGEST:]
    end = text.rfind("</think>")
    if end >= 0:
        return text[end + len("</think>") :]
    return None if "<think>" in text else text


def tagged(text: str, tag: str = "answer") -> str | None:
    """What stands between the last <tag> and the </tag> behind it."""
    start = text.rfind(f"<{tag}>")
    if start < 0:
        return None
    start += len(tag) + 2
    end = text.find(f"</{tag}>", start)
    return text[start:end].strip() if end >= 0 else None


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}, whose braces must be balanced."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0) * (text[place - 1] != "\\")
        if depth == 0:
            return text[start:place].strip()
    return None


def marked(text: str) -> str | None:
    r"""The answer as it is marked: in <answer> tags (and \boxed{} in them), in \boxed{}, behind ####, or behind "the answer is"
    or "answer:", up to the end of that sentence. The first of these that there is, its last occurrence; None for none."""
    said = spoken(text)
    if said is None:
        return None
    found = tagged(said)
    if found is not None:
        return boxed(found) or found
    found = boxed(said)
    if found is not None:
        return found
    if "####" in said:
        return said[said.rindex("####") + 4 :].strip().split("\n")[0].strip()
    phrases = _PHRASE.findall(said)
    return _sentence(phrases[-1]) if phrases else None


def last_number(text: str) -> str | None:
    """The last number of a text as it is written, fractions such as 3/4 included."""
    found = _NUMBER.findall(text[-LONGEST:])
    return found[-1] if found else None


def only_number(text: str) -> str | None:
    """The number of a text that has just one, as in "x = 5" and "12 apples"."""
    found = _NUMBER.findall(text[-LONGEST:])
    return found[0] if len(found) == 1 else None


def number(text: str) -> Fraction | None:
    """The value of a text that is nothing but a number: whole, decimal, with an exponent, or a fraction; thousands separators,
    a currency sign and a percent sign (which is left out) may stand with it. None for any other text."""
    text = (
        text.strip().strip("*$€£ ").replace("\\$", "").replace("−", "-").rstrip(".").removesuffix("%").removesuffix("\\").strip()
    )
    text = _GROUPED.sub("", text) if len(text) <= 400 else text
    found = _PLAIN.fullmatch(text.replace(" /", "/").replace("/ ", "/")) if len(text) <= 400 else None
    if found is None:
        return None
    digits, exponent, under = found.groups()
    below = Fraction(under) if under else Fraction(1)
    return Fraction(digits) * Fraction(10) ** int(exponent or 0) / below if below else None


def words(text: str) -> str:
    """A text with its runs of white space made single spaces."""
    return " ".join(text.split())


def code(text: str) -> str | None:
    """The program of an answer: its last fenced block, else what <answer> tags hold, else all that is said."""
    said = spoken(text)
    if said is None:
        return None
    parts = said.split("```")
    if len(parts) >= 3:
        block = parts[-2] if len(parts) % 2 else parts[-1]  # an odd number of fences: the last block was cut off
        first, _, rest = block.partition("\n")
        return rest if first.strip().lower() in ("python", "python3", "py", "") else block
    inside = tagged(said)
    return inside if inside is not None else said


def _sentence(text: str) -> str:
    text = text.strip().strip("*").strip()
    for mark in ("$$", "$"):
        if text.startswith(mark) and mark in text[len(mark) :]:
            return text[len(mark) : text.index(mark, len(mark))].strip()
    end = _SENTENCE.search(text)
    return (text[: end.start()] if end else text).strip().strip("*").strip()
