"""The learning rate of a step, the same for every engine. Imports neither torch nor NeMo."""

from __future__ import annotations

import math


def schedule_factor(step: int, *, schedule: str, max_steps: int, warmup_steps: int, floor: float, decay_fraction: float) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of its peak.

    Linear warm-up over `warmup_steps`, then "cosine" (Loshchilov & Hutter 2017, arXiv:1608.03983) or "linear" from 1 to `floor`
    at the last step, "wsd": constant, falling linearly to `floor` in the last `decay_fraction` of the run (Hu et al. 2024,
    arXiv:2404.06395), or "constant".
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    last = max_steps - 1
    start = max(warmup_steps, round(max_steps * (1 - decay_fraction))) if schedule == "wsd" else warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule in ("linear", "wsd"):
        return floor + (1 - floor) * (1 - progress)
    raise ValueError(f"unknown schedule {schedule!r}")
