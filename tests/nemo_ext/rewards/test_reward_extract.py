from fractions import Fraction

import pytest

from nemo_ext.rewards import extract


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>2 or 3</think><answer>3</answer>", "3"),
        ("<answer>1</answer> no, <answer> 2 </answer>", "2"),
        (r"<answer>so \boxed{7}</answer>", "7"),
        (r"first \boxed{1}, then \boxed{\frac{a}{b}}.", r"\frac{a}{b}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\fbox{4}", "4"),
        ("6 * 3 = 18\n#### 18", "18"),
        ("The answer is 5. That is all.", "5"),
        ("The final answer is: **3.5**.", "3.5"),
        ("Answer: $\\frac{1}{2}$, as was shown.", r"\frac{1}{2}"),
        ("the answer is 3.\nNo, the answer is 4", "4"),
        ("<think>the answer is 1</think>the answer is 2", "2"),
        ("it is 12", None),
        ("<think>the answer is 1", None),
        (r"\boxed{1", None),
        ("", None),
    ],
)
def test_marked_answer(text, answer):
    assert extract.marked(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("-3", -3), ("−3", -3), ("1,234,567", 1234567), ("$1,234.50", Fraction(2469, 2)), ("3/4", Fraction(3, 4)),
     ("1.5e3", 1500), (".5", Fraction(1, 2)), ("50%", 50), (r"50\%", 50), ("7.", 7), ("**8**", 8), ("1/0", None), ("1,23", None),
     ("12 apples", None), ("", None), ("nan", None), ("1e9999", None), ("9" * 401, None)],
)  # fmt: skip
def test_number(text, value):
    assert extract.number(text) == value


def test_last_number():
    assert extract.last_number("3 of 4, so 3/4 or 0.75") == "0.75"
    assert extract.last_number("from 10 to -2.5.") == "-2.5"
    assert extract.last_number("1,000 of them") == "1,000"
    assert extract.last_number("none") is None


@pytest.mark.parametrize(
    ("text", "program"),
    [("Here:\n```python\nx = 1\n```\nor\n```python\nx = 2\n```\ndone", "x = 2\n"), ("```\nx = 3\n```", "x = 3\n"),
     ("x = 4", "x = 4"), ("<answer>x = 5</answer>", "x = 5"), ("<think>```\nx = 0\n```</think>```py\nx = 6\n```", "x = 6\n"),
     ("```python\nx = 7\n```\n```python\nx = 8", "x = 8"), ("<think>x = 9", None)],
)  # fmt: skip
def test_code(text, program):
    assert extract.code(text) == program


@pytest.mark.parametrize("piece", ["<answer>", "<think>", "\\boxed{", "the answer is ", "1,1", "```", "((", "9" * 50, ". "])
def test_time_is_linear(piece):
    import time

    text = piece * (200_000 // len(piece))
    started = time.monotonic()
    extract.marked(text), extract.last_number(text), extract.code(text), extract.number(text)
    assert time.monotonic() - started < 20  # quadratic work takes minutes
