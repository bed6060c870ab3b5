"""What an answer's reward says about it beside the others of its group, and which problems each step takes."""

from __future__ import annotations

import numpy as np
import torch

EPSILON = 1e-6  # added to a standard deviation before it divides


def advantages(rewards: torch.Tensor, normalize: bool, leave_one_out: bool) -> torch.Tensor:
    """How much better each answer is than its group, float [problems, group] from rewards of the same shape.

    The baseline is the group's mean (Shao et al. 2024, arXiv:2402.03300), or with `leave_one_out` the mean of the others
    (RLOO, Ahmadian et al. 2024, arXiv:2402.14740), which is unbiased. `normalize` divides by the group's standard deviation
    (of a sample, n - 1); Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) does not. Equal rewards give zeros. A reward that is NaN
    could not be computed: its answer has no advantage and counts in no mean.
    """
    known = ~rewards.isnan()
    values = rewards.nan_to_num(0.0)
    count = known.sum(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    centred = (values - mean) * known
    result = centred
    if leave_one_out:  # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        result = centred * count / (count - 1).clamp(min=1)
    if normalize:
        result = result / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + EPSILON)
    return result.masked_fill(equal_groups(rewards)[:, None], 0.0)


def equal_groups(rewards: torch.Tensor) -> torch.Tensor:
    """Which groups teach nothing because their known rewards are all equal, bool [problems] from [problems, group]."""
    low = rewards.nan_to_num(float("inf")).amin(1)
    high = rewards.nan_to_num(float("-inf")).amax(1)
    return ~(high - low > 1e-6)


def problem_order(problems: int, count: int, seed: int) -> list[int]:
    """The first `count` places of endless passes over `problems` of them, each pass in an order of its own.

    A function of its arguments, so that a resumed run takes the problems that it would have taken.
    """
    passes = -(-count // problems)
    orders = [np.random.default_rng((seed, number)).permutation(problems) for number in range(passes)]
    return np.concatenate(orders)[:count].tolist() if passes else []


def spare_problems(problems: int, seed: int, step: int) -> list[int]:
    """All problems in an order that belongs to `step`: what dynamic sampling draws replacements from."""
    return np.random.default_rng((seed, step, 1)).permutation(problems).tolist()


def step_seed(seed: int, step: int) -> int:
    """The seed of everything drawn in `step`; positive, of 31 bits."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0]) >> 1
