"""Sampling answers with transformers: a problem's prompt is read once for all its answers, and finished answers leave the batch.

Both matter where answers are short or of very different lengths, and on a CPU; `generate` of transformers reads a prompt for
every answer and runs all rows until the longest has ended. Nothing here needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    group: int,
    *,
    max_answer: int,
    temperature: float,
    top_p: float = 1.0,
    ends: Sequence[int],
    pad: int,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """`group` answers to each prompt, in order: token ids with the end token that ended them, if one did.

    Draws from torch's generator. `batch` is the number of answers at once (whole groups; None: all); `progress` counts prompts.
    Temperature 0 takes the most likely token.
    """
    at_once = max(1, (batch or len(prompts) * group) // group)
    answers: list[list[int]] = []
    with torch.no_grad():
        for begin in range(0, len(prompts), at_once):
            answers += _batch(model, prompts[begin : begin + at_once], group, max_answer, temperature, top_p, set(ends), pad)
            if progress:
                progress(min(begin + at_once, len(prompts)))
    return answers


def _batch(model, prompts, group, max_answer, temperature, top_p, ends, pad) -> list[list[int]]:
    from transformers import DynamicCache

    device = model.device
    ids, mask = left_padded(prompts, pad, device)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1].repeat_interleave(group, 0)
    cache.batch_repeat_interleave(group)
    mask, lengths = mask.repeat_interleave(group, 0), mask.sum(1).repeat_interleave(group)
    answers: list[list[int]] = [[] for _ in range(len(prompts) * group)]
    rows = list(range(len(answers)))  # the answer that each row of the batch belongs to
    for place in range(max_answer):
        tokens = _draw(logits, temperature, top_p)
        drawn = tokens.tolist()
        for row, token in zip(rows, drawn, strict=True):
            answers[row].append(token)
        going = [i for i, token in enumerate(drawn) if token not in ends]
        if not going or place == max_answer - 1:
            break
        if len(going) < len(rows):
            chosen = torch.tensor(going, device=device)
            cache.batch_select_indices(chosen)
            tokens, mask, lengths = tokens[chosen], mask[chosen], lengths[chosen]
            rows = [rows[i] for i in going]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        output = model(
            tokens[:, None], attention_mask=mask, position_ids=(lengths + place)[:, None], past_key_values=cache, use_cache=True
        )
        logits = output.logits[:, -1]
    return answers


def _draw(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """A token of each row of [rows, vocabulary] logits, int64 [rows]."""
    if not temperature:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, places = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0  # the first token above the share stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    # argmax of p / Exp(1) draws from p (an exponential race); much quicker than multinomial over a large vocabulary
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as int64 [rows, longest], padded on the left, and a mask of the same shape that is 1 at ids."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.as_tensor(row)
        mask[number, width - len(row) :] = 1
    return ids.to(device), mask.to(device)
