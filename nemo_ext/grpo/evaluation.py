"""The mean reward of answers to held-out problems, and how sure it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_ext.evaluation import intervals
from nemo_ext.grpo.conversation import Answer, with_turns
from nemo_ext.grpo.records import answers_file

SHOWN = 2000  # characters of an answer that are kept


def measure(
    rows: Sequence[dict[str, Any]], batches: Iterable[list[Answer]], reward: Any, ends: Sequence[int]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and answers of an evaluation: one sampled answer to each row.

    `val_reward` has a bootstrap interval of 95% over problems, `val_reward_low` to `val_reward_high`; `val_length` is in tokens.
    """
    found = [answer for batch in batches for answer in batch]
    values = reward.score([answer.text for answer in found], with_turns(rows, found)).total
    low, high = intervals.ratio([(value, 1.0) for value in values]) or (values[0], values[0])
    figures = {
        "val_reward": sum(values) / len(values),
        "val_reward_low": low,
        "val_reward_high": high,
        "val_length": sum(answer.length for answer in found) / len(found),
        "val_cut_off": sum(answer.ids[-1] not in ends for answer in found) / len(found),
    }
    answers = [
        {"question": row["question"], "reference": row["answer"], "answer": answer.shown[:SHOWN], "reward": value}
        for row, answer, value in zip(rows, found, values, strict=True)
    ]
    return figures, answers


def compare(run_dir: Path, last: int) -> dict[str, Any]:
    """Held-out reward at step 0 and at step `last`, and their difference, each with its interval of 95%; the problems are the
    same, so the interval of the difference is of each problem's own. Empty where either evaluation is missing."""
    sides = []
    for step in (0, last):
        try:
            sides.append(json.loads(answers_file(run_dir, step).read_text())["answers"])
        except (OSError, ValueError):
            return {}
    before, after = ([(row["reward"], 1.0) for row in side] for side in sides)
    if not last or len(before) != len(after):
        return {}
    difference = sum(value for value, _ in after) / len(after) - sum(value for value, _ in before) / len(before)
    return {
        "reward_before": _with_interval(before),
        "reward_after": _with_interval(after),
        "reward_difference": [difference, *(intervals.ratio_difference(before, after) or (difference, difference))],
        "heldout_answers": len(after),
    }


def side_by_side(run_dir: Path, last: int, count: int) -> list[dict[str, str]]:
    """{question, reference, before, after} of `count` held-out problems, for people."""
    try:
        first, final = (json.loads(answers_file(run_dir, step).read_text())["answers"] for step in (0, last))
    except (OSError, ValueError):
        return []
    return [
        {"question": a["question"], "reference": a["reference"], "before": a["answer"], "after": b["answer"]}
        for a, b in list(zip(first, final, strict=False))[:count]
    ]


def _with_interval(pairs: Sequence[tuple[float, float]]) -> list[float]:
    mean = sum(value for value, _ in pairs) / len(pairs)
    return [mean, *(intervals.ratio(pairs) or (mean, mean))]
