"""BLEU, ROUGE-L, exact and numeric match against the packages; intervals against known values."""

from fractions import Fraction

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from nemo_ext.errors import UserError
from nemo_ext.evaluation import intervals, results, text_metrics
from nemo_ext.evaluation.tasks import parse

OUTPUTS = ["the cat sat on the mat today", "a quick brown fox jumps", "nothing in common here", "The answer is 4."]
REFERENCES = [
    ("the cat sat on the mat", "a cat was on the mat today"),
    ("the quick brown fox jumps over the dog",),
    ("quite another text",),
    ("It is 4.",),
]


def test_bleu_is_sacrebleus():
    metric, each = text_metrics.bleu(OUTPUTS, REFERENCES)
    streams = [[refs[i] if i < len(refs) else None for refs in REFERENCES] for i in range(2)]
    assert metric.value == pytest.approx(sacrebleu.corpus_bleu(OUTPUTS, streams).score, abs=1e-9)
    assert each == pytest.approx([sacrebleu.sentence_bleu(o, list(r)).score for o, r in zip(OUTPUTS, REFERENCES, strict=True)])
    assert metric.low < metric.value < metric.high


def test_bleu_of_chinese():
    outputs, references = ["今天天气很好我们去公园", "他在看书"], [("今天天气很好我们去公园玩",), ("他在图书馆看书",)]
    wanted = sacrebleu.corpus_bleu(outputs, [[refs[0] for refs in references]], tokenize="zh").score
    assert text_metrics.bleu(outputs, references)[0].value == pytest.approx(wanted, abs=1e-9)


def test_rouge_is_rouge_scores():
    metric, each = text_metrics.rouge(OUTPUTS, REFERENCES)
    scorer = RougeScorer(["rougeL"])
    wanted = [
        max(scorer.score(ref, out)["rougeL"].fmeasure for ref in refs) for out, refs in zip(OUTPUTS, REFERENCES, strict=True)
    ]
    assert each == wanted and metric.value == pytest.approx(np.mean(wanted))


def test_rouge_of_chinese_is_the_common_subsequence_of_characters():
    _, each = text_metrics.rouge(["我喜欢猫"], [("我很喜欢小猫",)])
    assert each == [pytest.approx(2 * (4 / 4) * (4 / 6) / (4 / 4 + 4 / 6))]


def test_exact_match_is_blind_to_white_space_only():
    metric, each = text_metrics.exact([" 4\n", "Paris  is", "paris"], [("4",), ("London", "Paris is"), ("Paris",)])
    assert each == [1, 1, 0] and (metric.low, metric.high) == intervals.wilson(2, 3)


@pytest.mark.parametrize(
    "text,number",
    [
        ("so 3 + 4 = 7.", 7), ("$1,234.50", Fraction(2469, 2)), ("#### -12", -12), ("10-12", 12), ("0.5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("1e3 m", 1000), ("答案是42。", 42), ("none", None), ("x2 or 1/0", None), (".25", Fraction(1, 4)),
        ("x=5", 5), ("12, 34", 34), ("72%", 72),
    ],
)  # fmt: skip
def test_last_number(text, number):
    assert text_metrics.last_number(text) == number


def test_numeric_match_leaves_out_references_without_a_number():
    metric, each = text_metrics.numeric(["it is 1,000.0", "5 then 6", "7"], [("#### 1000",), ("5",), ("seven",)])
    assert each == [1.0, 0.0, None] and metric.count == 2 and metric.value == 0.5
    assert text_metrics.numeric(["7"], [("seven",)])[0] is None


def test_wilson():
    """Figures of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for (hits, n), (low, high) in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605),
                                   (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}.items():  # fmt: skip
        assert intervals.wilson(hits, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert intervals.wilson(20, 20)[1] == 1.0


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = intervals.ratio([[v, 1.0] for v in values])
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.03) and high == pytest.approx(values.mean() + error, abs=0.03)
    assert intervals.ratio([[1.0, 1.0]]) is None
    assert intervals.ratio([[2.0, 1.0], [4.0, 2.0], [6.0, 3.0]]) == (pytest.approx(2.0), pytest.approx(2.0))


def test_paired_difference_is_narrower_than_its_parts():
    generator = np.random.default_rng(2)
    difficulty = generator.normal(0, 5, 200)
    a, b = difficulty + generator.normal(0, 0.1, 200), difficulty + 1 + generator.normal(0, 0.1, 200)
    low, high = intervals.ratio_difference([[x, 1.0] for x in a], [[x, 1.0] for x in b])
    assert 0.9 < low < b.mean() - a.mean() < high < 1.1
    alone = intervals.ratio([[x, 1.0] for x in a])
    assert alone[1] - alone[0] > 10 * (high - low)


def test_names_and_files():
    from pathlib import Path

    assert results.distinct([Path("/a/x/hf"), Path("/a/y/hf"), Path("/a/z")]) == ["x/hf", "y/hf", "z"]
    assert results.slug("plain-1.json") == "plain-1.json"
    assert results.slug("a/b") != results.slug("a:b") and "/" not in results.slug("a/b")


def test_tasks(tmp_path):
    for name in ("a.md", "b.jsonl"):
        (tmp_path / name).write_text("x")
    found = parse([f"ppl:{tmp_path}/a.md", f"generate:{tmp_path}/b.jsonl@exact+numeric", f"judge:{tmp_path}/b.jsonl"], "bleu")
    assert [task.metrics for task in found] == [(), ("exact", "numeric"), ()]
    assert [task.name for task in found] == ["ppl:a.md", "generate:b.jsonl", "judge:b.jsonl"]
    assert parse(f"generate:{tmp_path}/b.jsonl", "bleu")[0].metrics == ("bleu",)
    assert parse(f"generate:{tmp_path}/b.jsonl")[0].metrics == ("bleu", "rouge", "exact", "numeric")


@pytest.mark.parametrize(
    "tasks,words",
    [
        ("pp:a.md", "unknown kind pp in pp:a.md: did you mean ppl?"),
        ("a.md", "'a.md' is not KIND:WHAT"),
        ("ppl:missing.md", "tasks=: ppl:missing.md: no such file or folder"),
        ("ppl:missing.md:0.5", "tasks=: ppl:missing.md:0.5: no such file"),
        ("generate:{b}@blue", "unknown metric blue: there are all, bleu, rouge, exact, numeric"),
        (["ppl:{a}", "ppl:{a}"], "is given twice"),
        (["generate:{b}", "generate:{b}@bleu"], "b.jsonl is given twice"),
        ([], "empty list"),
        ({"ppl": "a"}, "no space follows a colon"),
        ("mcq:{a}", "unknown type of file"),
    ],
)
def test_tasks_that_cannot_be(tmp_path, tasks, words):
    names = {"a": tmp_path / "a.md", "b": tmp_path / "b.jsonl"}
    for path in names.values():
        path.write_text("x")
    tasks = [t.format(**names) for t in tasks] if isinstance(tasks, list) else tasks
    with pytest.raises(UserError) as error:
        parse(tasks.format(**names) if isinstance(tasks, str) else tasks)
    assert words in str(error.value)
