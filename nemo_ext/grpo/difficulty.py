"""Which problems are worth training on: those that the model solves sometimes.

A group whose answers are all right or all wrong has no better and worse ones to learn from (Yu et al. 2025, DAPO,
arXiv:2503.14476, section 3.2, which drops them while training; here they are dropped before).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_ext.data.chat.render import Renderer
from nemo_ext.errors import UserError
from nemo_ext.grpo.conversation import Answer, Conversations, with_turns
from nemo_ext.grpo.data import Problems, Row
from nemo_ext.grpo.sampling import sample
from nemo_ext.grpo.tools import Tools
from nemo_ext.quiet import quiet

AT_ONCE = 128  # answers


def without_extremes(
    problems: Problems,
    keys: dict[str, Any],
    model: Path,
    progress: Callable[[int, int], None] | None = None,
    tools: Tools | None = None,
    renderer: Renderer | None = None,
) -> Problems:
    """`problems` without those to train on that `model`, a Hugging Face folder, always or never solves.

    `filter_samples` answers are sampled to each, as training samples them. Solved is an answer with at least half of the
    reward's full value: the sum of its weights above 0. `progress(done, total)` counts problems. Raises UserError where none is
    left.
    """
    from nemo_ext.grpo.embedded import build_reward

    with build_reward(keys) as reward:
        reward.check(problems.train)
        full = sum(weight for weight in reward.weights.values() if weight > 0)

        def solved(answers: list[str], rows: list[Row]) -> list[bool]:
            return [value >= full / 2 for value in reward(answers, rows)]

        rates = pass_rates(problems.train, keys, model, solved, progress, tools, renderer)
    kept = [row for row, rate in zip(problems.train, rates, strict=True) if 0 < rate < 1]
    if not kept:
        always = sum(rate == 1 for rate in rates)
        raise UserError(
            f"filter=true: of {len(rates):,} problems the model always solves {always:,} and never the others: give problems of "
            "another difficulty, or filter=false"
        )
    left_out = problems.left_out | {
        "that the model always solves": sum(rate == 1 for rate in rates),
        "that the model never solves": sum(rate == 0 for rate in rates),
    }
    return dataclasses.replace(problems, train=kept, left_out=left_out)


def pass_rates(
    rows: Sequence[Row],
    keys: dict[str, Any],
    model: Path,
    solved: Callable[[list[str], list[Row]], Sequence[bool]],
    progress: Callable[[int, int], None] | None = None,
    tools: Tools | None = None,
    renderer: Renderer | None = None,
) -> list[float]:
    """The share of `filter_samples` sampled answers to each problem that is solved."""
    from nemo_ext import platform

    with quiet():
        platform.activate()
        import torch

        from nemo_ext.evaluation.model import Model

        loaded = Model(model, str(model))
    tokenizer, samples = loaded.tokenizer, keys["filter_samples"]
    ends = sorted(loaded.end_ids())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    torch.manual_seed(keys["seed"])

    def turn(prompts: list[list[int]], group: int, limit: int):
        return sample(
            loaded.network, prompts[::group], group, max_answer=limit, temperature=keys["temperature"], top_p=keys["top_p"],
            ends=ends, pad=pad,
        ), None  # fmt: skip

    conversations = Conversations(tokenizer, keys["max_answer"], ends, keys["turns"], tools, renderer)
    at_once = max(1, AT_ONCE // samples)  # problems
    found: list[Answer] = []
    for begin in range(0, len(rows), at_once):
        prompts = [row["ids"] for row in rows[begin : begin + at_once] for _ in range(samples)]
        found += conversations.answers(prompts, samples, turn)
        if progress:
            progress(min(begin + at_once, len(rows)), len(rows))
    loaded.close()
    passed = solved([answer.text for answer in found], with_turns([row for row in rows for _ in range(samples)], found))
    return [sum(passed[begin : begin + samples]) / samples for begin in range(0, len(passed), samples)]
