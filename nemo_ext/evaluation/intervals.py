"""Confidence intervals of 95%, for shares (Wilson) and for anything that is a ratio of sums over units (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5% quantile
SAMPLES = 2000
ROWS = 100  # resamples at a time: bounds the memory of many units

Interval = tuple[float, float]


def wilson(successes: int, trials: int) -> Interval:
    """The score interval of a binomial share (Wilson, 1927): unlike p ± z·se it stays within [0, 1] and works at 0 and 1."""
    share, z2 = successes / trials, Z * Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    low = 0.0 if successes == 0 else centre - half
    return max(0.0, low), 1.0 if successes == trials else min(1.0, centre + half)


def bootstrap(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Interval | None:
    """Percentile interval (Efron, 1979) of `statistic` over units drawn with replacement; None of fewer than two units.

    `sums` is [units, k], what each unit adds to k totals; `statistic` turns totals [samples, k] into [samples]. The draws
    depend on `seed` and the number of units only.
    """
    sums = np.asarray(sums, dtype=np.float64)
    units = len(sums)
    if units < 2:
        return None
    generator = np.random.default_rng(seed)
    values = [
        statistic(generator.multinomial(units, np.full(units, 1 / units), size=ROWS) @ sums) for _ in range(SAMPLES // ROWS)
    ]
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return float(low), float(high)


def ratio(pairs: Sequence[Sequence[float]], seed: int = 0) -> Interval | None:
    """Interval of Σ numerator / Σ denominator of [units, 2]; a mean where every denominator is 1."""
    return bootstrap(np.asarray(pairs, dtype=np.float64).reshape(-1, 2), lambda totals: totals[:, 0] / totals[:, 1], seed)


def ratio_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0) -> Interval | None:
    """Interval of ratio(b) - ratio(a), where both measured the same units: the units' own difficulty drops out."""
    sums = np.concatenate([np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)], axis=1)
    return bootstrap(sums, lambda totals: totals[:, 2] / totals[:, 3] - totals[:, 0] / totals[:, 1], seed)
