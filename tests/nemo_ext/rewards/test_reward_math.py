"""The reward `math`, by hand-made pairs and by answers made to do harm. The whole path: worker processes included."""

import time

import pytest

from nemo_ext import rewards
from nemo_ext.errors import UserError

EQUAL = [
    ("1/2", "0.5"), ("1/2", r"\frac{1}{2}"), (r"\frac{2}{4}", "1/2"), (r"\dfrac12", "0.50"), ("1/3", "0.333333"),
    ("1 2/3", "5/3"), (r"1\frac{2}{3}", r"\frac{5}{3}"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), ("7", "007"), ("0", "0.0"),
    (r"\sqrt{8}", r"2\sqrt{2}"), ("sqrt(8)", r"2\sqrt2"), (r"\sin(\pi/6)", "1/2"), (r"\log_2 8", "3"), (r"\frac{\pi}{2}", "pi/2"),
    (r"\{1,2\}", r"\{2,1\}"), ("1,2", "2, 1"), ("[0,1)", "[0, 1)"), (r"x \in [0,1]", "[0,1]"), ("1<x<3", "(1,3)"),
    (r"(-\infty,3)\cup(5,\infty)", r"(-\infty, 3) \cup (5, \infty)"), ("(1,2)", "(1, 2)"), (r"\infty", "infinity"),
    (r"50\%", "0.5"), ("50%", "50"), ("12.5%", r"12.5\%"), ("5 cm", "5"), ("5", r"5 \text{ cm}"), ("$5", "5"),
    (r"90^\circ", "90"),
    ("1,234", "1234"), ("1,234.50", "1234.5"), ("2**10", "1024"), ("2^10", "1024"), ("1e3", "1000"), ("1.5e-3", "0.0015"),
    (r"3\times10^4", "30000"), ("10!", "3628800"), (r"\binom{10}{3}", "120"), ("-3", "−3"),
    ("(x-1)(x+1)", "x^2-1"), ("2x+3", "3+2x"), (r"\frac{x^2-1}{x-1}", "x+1"), ("e^{2x}", "e^{x}e^{x}"), ("x=5", "5"),
    ("5", "x = 5"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"), ("yes", r"\text{Yes}"),
    ("9**9**9", "9**9**9"),
]  # fmt: skip
DIFFERENT = [
    ("1/2", "1/3"), ("0.5", "0.51"), ("0.1", "0.10001"), ("1/3", "0.33"), (r"\sqrt{2}", "2"), (r"\pi", "3.14"), ("-3", "3"),
    (r"\{1,2\}", r"\{1,3\}"), ("1,2,3", "1,2"), ("2", "1,2"), ("[0,1)", "(0,1]"), ("[0,1]", "(0,1)"), ("(1,2)", "(2,1)"),
    ("50%", "5"), ("50%", "0.05"), ("1,234", "1.234"), ("x=5", "6"), ("2^10", "20"), ("1e3", "1e4"), ("5 cm", "6 cm"),
    ("10!", "10"),
    ("1 2/3", "1"), ("1 2/3", "2/3"), ("x^2-1", "x^2+1"), ("x+1", "y+1"), (r"\sin x", r"\cos x"), ("yes", "no"), ("yes", "sey"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"), ("1", "1/0"), ("1", r"\frac{1}{0}"),
    ("10^{9}", "10^{10}"),
]  # fmt: skip
HOSTILE = [
    "9**9**9", "9^{9^{9}}", "9^9^9^9", "9!!!!!", "(((9!)!)!)!", "10^{10^{10}}", r"\binom{10^9}{5*10^8}", r"\sum_{n=1}^{10^9} n^n",
    r"\prod_{n=1}^{10^8} n", "(" * 900, "(" * 15 + "1" + ")" * 15, r"\frac{" * 100 + "1" + "}{1}" * 100, "1+" * 400 + "1",
    "x^{x^{x^{9}}}", r"\int_0^1 e^{x^2} dx", "9" * 100_000, "__import__('os').system('true')", r"\boxed{" * 200, "\x00\ud800",
    "a" * 100_000, r"\sqrt{" * 15 + "2" + "}" * 15, r"\gamma^{\gamma!}",
]  # fmt: skip


@pytest.fixture(scope="module")
def reward():
    with rewards.build("math", timeout=10, workers=2) as built:
        built.check([{"answer": "1"}])
        yield built


def score(reward, pairs, how):
    return reward.score([how.format(answer) for _, answer in pairs], [{"answer": truth} for truth, _ in pairs])


@pytest.mark.parametrize("how", [r"So it is \boxed{{{}}}.", "<think>hm</think><answer>{}</answer>"])
def test_equal_and_different(reward, how):
    found = score(reward, EQUAL, how)
    assert [pair for pair, value in zip(EQUAL, found.total, strict=True) if value != 1] == []
    found = score(reward, DIFFERENT, how)
    assert [pair for pair, value in zip(DIFFERENT, found.total, strict=True) if value != 0] == []
    assert found.failures == 0


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [("18", "The answer is 18.", 1), ("6*3 = 18\n#### 18", "It is 18", 1), ("12", "The answer is 12 apples.", 1),
     ("1/2", "the answer is $\\frac{2}{4}$", 1), ("12", "13 is right", 0), ("12", "12 then 13", 0), ("12", "", 0),
     ("12", "<think>\\boxed{12}", 0), ("12", "\\boxed{}", 0), ("12", "\\boxed{11} or \\boxed{12}", 1)],
)  # fmt: skip
def test_where_the_answer_stands(reward, truth, answer, right):
    assert reward([answer], [{"answer": truth}]) == [right]


def test_hostile_answers_cost_bounded_time_and_give_nothing():
    with rewards.build("math", timeout=2, workers=2) as reward:
        reward.check([{"answer": "1"}])
        started = time.monotonic()
        found = reward.score([f"\\boxed{{{text}}}" for text in HOSTILE] + HOSTILE, [{"answer": "17"}] * 2 * len(HOSTILE))
        seconds = time.monotonic() - started
        assert found.total == [0.0] * 2 * len(HOSTILE)
        assert seconds < 60  # two seconds on two idle cores
        assert reward(["\\boxed{17}"], [{"answer": "17"}]) == [1.0]  # the workers are whole again


def test_a_worker_that_hangs_is_killed_and_counted():
    with rewards.build("math", timeout=2, workers=1) as reward:
        reward.check([{"answer": "1"}])
        started = time.monotonic()
        # sympy looks for the integral for minutes
        found = reward.score(
            [r"\boxed{\int_0^1 \sin(x^{x}) e^{x^{2}} dx}", r"\boxed{2}"], [{"answer": r"\sqrt{7}+x"}, {"answer": "2"}]
        )
        assert 2 < time.monotonic() - started < 60
        assert found.total == [0.0, 1.0]
        assert (found.failures, found.message) == (1, "math: no result after 2 seconds")


def test_a_batch_is_done_together(reward):
    answers = [rf"\boxed{{\frac{{{n}}}{{7}} + \sqrt{{{n}}}}}" for n in range(64)]
    rows = [{"answer": rf"\sqrt{{{n}}} + \frac{{{2 * n}}}{{14}}"} for n in range(64)]
    reward(answers[:4], rows[:4])
    started = time.monotonic()
    assert reward(answers, rows) == [1.0] * 64
    assert time.monotonic() - started < 20  # 0.4 s on two idle cores


def test_references_that_are_no_mathematics():
    with rewards.build("math", timeout=5) as reward:
        with pytest.raises(UserError, match="none of the first 2 answers is mathematics"):
            reward.check([{"answer": "in the garden"}, {"answer": "at home"}])
        with pytest.raises(UserError, match="1 of 2 problems have no `answer`"):
            reward.check([{"answer": "1"}, {"question": "?"}])
