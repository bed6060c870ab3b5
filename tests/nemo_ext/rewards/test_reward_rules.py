import pytest

from nemo_ext import rewards
from nemo_ext.errors import UserError


def value(spec, said, /, **row):
    with rewards.build(spec) as reward:
        return reward([said], [{"question": "?", **row}])[0]


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [("18", "so 18", 1), ("18", "#### 18", 1), ("6*3=18\n#### 18", "the answer is 18.", 1), ("1,000", r"\boxed{1000}", 1),
     ("0.333333333", "1/3", 1), ("5", "x = 5", 1), ("5", "\\boxed{5 \\text{ cm}}", 1), ("18", "18 or 19", 0), ("0.3", "1/3", 0),
     ("10000001", "10000002", 0), ("5", "", 0), ("5", "five", 0), (7, "7", 1), ("0", "0.0000001", 0),
     ("9", "\\boxed{9**9**9}", 0), ("5", "\\boxed{4 or 5}", 0)],
)  # fmt: skip
def test_numeric(truth, answer, right):
    assert value("numeric", answer, answer=truth) == right


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [("ABBA", "<answer>ABBA</answer>", 1), ("AB  BA", " AB BA\n", 1), ("ABBA", "ABBA!", 0), ("ABBA", "abba", 0),
     ("1 2", r"\boxed{1 2}", 1), ("x", "<think>x", 0)],
)  # fmt: skip
def test_exact(truth, answer, right):
    assert value("exact", answer, answer=truth) == right


CHOICES = ["London", "Paris", "Rome"]


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [("B", "B", 1), ("B", "(b)", 1), ("(B)", "B. Paris", 1), (1, "The answer is (B) Paris.", 1),
     ("Paris", "<answer>paris</answer>", 1),
     ("B", "It cannot be (A), so it is (B), I think.", 1), ("B", r"\boxed{\text{B}}", 1), ("B", "**Answer:** B", 1),
     ("B", "A man in Rome\nB", 1), ("B", "A. London", 0), ("B", "A Paris", 0), ("B", "", 0), ("B", "<answer>C</answer> B", 0),
     ("B", "Z", 0), ("C", "I do not know", 0)],
)  # fmt: skip
def test_choice(truth, answer, right):
    assert value("choice", answer, answer=truth, choices=CHOICES) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [("<think>a</think><answer>b</answer>", 1), (" <think>a\n</think>\n<answer>b</answer>\n", 1),
     ("<think>a</think><answer>b</answer> more", 0), ("so <think>a</think><answer>b</answer>", 0),
     ("<think>a</think>b<answer>c</answer>", 0), ("<answer>b</answer><think>a</think>", 0), ("<think>a</think>", 0),
     ("<think>a</think><answer>b</answer><answer>c</answer>", 0), ("<think></think><answer>b</answer>", 0),
     ("<think>a</think><answer> </answer>", 0), ("</think><think><answer></answer>", 0),
     ("<think>a<answer>b</think></answer>", 0), ("a</think><answer>b</answer>", 0)],
)  # fmt: skip
def test_format(answer, right):
    assert value("format", answer) == right


def test_format_behind_a_prompt_that_opens_the_thoughts():
    assert value("format", "a</think><answer>b</answer>", prompt="Why?\n<think>\n") == 1
    assert value("format", "<think>a</think><answer>b</answer>", prompt="Why?\n<think>\n") == 0


def test_length():
    with rewards.build("length:-0.5", length_scale=10) as reward:
        assert reward(["", "12345", "x" * 100], [{}] * 3) == [0.0, -0.25, -0.5]


@pytest.mark.parametrize(
    ("spec", "row", "message"),
    [("numeric", {"answer": "many"}, "is no number"), ("choice", {"answer": "Oslo", "choices": CHOICES}, "neither a letter"),
     ("numeric", {"question": "x"}, "answer_key="), ("exact", {"answer": " "}, "1 of 1 problems have no `answer`")],
)  # fmt: skip
def test_rows_that_cannot_be_scored(spec, row, message):
    with rewards.build(spec) as reward, pytest.raises(UserError, match=message) as caught:
        reward.check([row])
    assert "\n" not in str(caught.value)
