r"""Whether two pieces of mathematics are equal, by math-verify and sympy. Runs in a worker process, which is killed if it hangs.

Reading is left to math-verify's LaTeX grammar, also for what is not LaTeX; nothing is ever evaluated as Python. What would take
more than MOST digits to write out (9**9**9, factorials of factorials) is found from the shape of the expression and never
computed.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from nemo_ext.rewards import extract

LONGEST = 1000  # characters of mathematics
DEEPEST = 15  # brackets in brackets
MOST = 3000.0  # digits of a number that may be computed
PRELOAD = ("nemo_ext.rewards.equality:warm",)

_MIXED = re.compile(r"([-+]?\d+)\s+(\d+)\s*/\s*(\d+)")
_EXPONENT = re.compile(r"(?<![a-zA-Z\\])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,4})(?![\w.])")
_WORD = re.compile(r"(?<![\\A-Za-z])(pi|infinity|theta|alpha|beta)(?![\w])")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_POWER = re.compile(r"\^\s*([-+]?\d{2,})(?!\w)")


def warm() -> None:
    """Import and run once what answers need, before their time counts: the grammar and sympy's solvers take seconds at first."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for truth, answer in ((r"\frac{1}{2}+\sqrt{2}", r"\sqrt{2}+\frac{2}{4}"), ("1<x<3", "(1,3)"), ("x^2-1", "(x-1)(x+1)")):
        equal(truth, answer)


def scorer() -> Callable[[list[str], list[dict[str, Any]]], list[float]]:
    """The function that a worker calls: 1 for each answer that equals its row's `answer`, else 0. For a row without one: 1 if the
    text, a reference, can be read as mathematics."""

    def value(answer: str, row: dict[str, Any]) -> float:
        return float(solved(answer, str(row["answer"])) if "answer" in row else parse(reference(answer)) is not None)

    return lambda answers, rows: [value(answer, row) for answer, row in zip(answers, rows, strict=True)]


def reference(text: str) -> str:
    """The answer in a row: what is marked in it (as in solutions that end with #### 12), else all of it."""
    return extract.marked(text) or text.strip()


def solved(answer: str, truth: str) -> bool:
    """Whether the final answer in `answer` equals `truth`. Without a marked answer the last number counts."""
    marked = extract.marked(answer)
    if marked is not None:
        if equal(truth := reference(truth), marked):
            return True
        # "The answer is 12 apples": a sentence is no mathematics, its number is
        number = extract.only_number(marked) if _is_sentence(marked) else None
        return number is not None and equal(truth, number)
    said = extract.spoken(answer)
    number = extract.last_number(said) if said is not None else None
    return number is not None and equal(reference(truth), number)


def equal(truth: str, answer: str) -> bool:
    """Whether two expressions are equal in value; as text where neither is mathematics.

    Decimals are compared to six places where one of the sides is a decimal. A percent sign on one side only may mean hundredths
    or be left out.
    """
    if len(truth) > LONGEST or len(answer) > LONGEST:
        return False
    if extract.words(truth) == extract.words(answer):
        return bool(truth.strip())
    first, second = extract.number(truth), extract.number(answer)
    if first is not None and second is not None:
        if first == second or round(first, 6) == round(second, 6) and "." in truth + answer:
            return True
        return _percent(truth) != _percent(answer) and first == second * (100 if _percent(truth) else Fraction(1, 100))
    left, right = parse(truth), parse(answer)
    if left is None or right is None:
        return left is None and right is None and _plain_text(truth) == _plain_text(answer) != ""
    if too_big(left) or too_big(right):
        return False
    from math_verify import verify

    return verify(left, right, timeout_seconds=None)


def parse(text: str) -> Any:
    """The sympy object of an expression in LaTeX or plain notation, unevaluated; None for what is none."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as read

    text = prepared(text)
    if (
        not text
        or len(text) > 2 * LONGEST
        or _depth(text) > DEEPEST
        or _plain_text(text).replace(" ", "").isalpha()
        and len(_plain_text(text)) > 1
    ):
        return None
    found = read(f"\\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)], "no_fallback", parsing_timeout=None)
    return found[0] if found else None


def prepared(text: str) -> str:
    """Plain notation made LaTeX: powers as **, 1.5e-3, mixed numbers, pi; signs of percent, currency and degrees left out."""
    text = text.strip().strip("$").replace("−", "-").replace("\\!", "").replace("\\left", "").replace("\\right", "")
    text = text.replace("**", "^").replace("\\%", "").replace("%", "").replace("\\$", "").strip().rstrip(".")
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text) if _MIXED.fullmatch(text) else text
    text = _EXPONENT.sub(r"\1\\times 10^{\2}", text)
    text = _POWER.sub(r"^{\1}", text)
    return _WORD.sub(lambda found: "\\infty " if found[1] == "infinity" else f"\\{found[1]} ", text)


def too_big(expression: Any) -> bool:
    """Whether computing an expression would make numbers of more than MOST digits."""
    return _digits(expression) > MOST


def _digits(expression: Any) -> float:
    """An upper bound of the decimal digits of any number that computing `expression` makes."""
    import sympy

    if isinstance(expression, sympy.Number):
        return max(_length(expression.p), _length(expression.q)) if expression.is_Rational else 20.0
    inner = [_digits(each) for each in getattr(expression, "args", ())]
    largest = max(inner, default=1.0)
    if largest > MOST:
        return math.inf
    if isinstance(expression, sympy.Pow):
        base, power = inner
        return max(largest, base * _size(power))
    if isinstance(expression, (sympy.factorial, sympy.gamma, sympy.factorial2, sympy.binomial)):
        return _size(largest) * largest
    if isinstance(expression, (sympy.Sum, sympy.Product)):
        return largest * 1000
    return sum(inner) if isinstance(expression, sympy.Mul) else largest + 1


def _size(digits: float) -> float:
    """The largest number of so many digits."""
    return 10.0**digits if digits < 300 else math.inf


def _length(number: int) -> float:
    return abs(int(number)).bit_length() / math.log2(10)


def _depth(text: str) -> int:
    """How deep brackets stand in brackets."""
    deepest = depth = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _percent(text: str) -> bool:
    return "%" in text


def _plain_text(text: str) -> str:
    return extract.words(_TEXT.sub(r"\1", text)).strip(" .$").casefold()


def _is_sentence(text: str) -> bool:
    return "\\" not in text and len(re.findall(r"[A-Za-z]{2,}", text)) > 0
