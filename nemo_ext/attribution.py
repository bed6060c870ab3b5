"""Where the time of a step went, from the intervals in which a device's kernels ran."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

# By the names of kernels (CUDA, cuDNN, cuBLAS, Transformer Engine, Triton) and of torch's CPU operators; the first that matches.
CLASSES = {
    "communication": r"nccl|gloo|c10d::",
    "attention": r"sdpa|flash|fmha|attention|attn",
    "GEMM": r"gemm|nvjet|cutlass|cublas|wgmma|xmma|\b(mm|addmm|bmm|baddbmm|matmul|linear)\b|_mm\b",
    "optimizer": r"multi_tensor|adam|_foreach_|l2norm",
    "cross entropy": r"cross_entropy|online_softmax|log_softmax|nll_loss|element_mul",
    "FP8 casts": r"transpose_\w*kernel|quantize|amax|fp8|e4m3",
    "norm": r"norm",
    "rotary": r"rope|rotary",
    "copies": r"memcpy|memset|copy_|CatArray",
    "other element-wise": r"",
}
# Where kernels of several classes run at once, the time is the first one's of these: communication is what nothing else hides.
PRIORITY = {name: rank for rank, name in enumerate([*list(CLASSES)[1:], "communication"])}
IDLE = "idle"
_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in CLASSES.items()}


def class_of(kernel: str) -> str:
    """The class of a kernel or operator by its name."""
    return next(name for name, pattern in _PATTERNS.items() if pattern.search(kernel))


def attribute(intervals: Iterable[tuple[str, float, float]], began: float, ended: float) -> dict[str, float]:
    """Seconds of each class between two moments, from (name of a kernel, beginning, end) in seconds.

    They add up to `ended - began`: of kernels that run at once the first class in `PRIORITY` counts, and `idle` is when none ran.
    """
    edges = []
    for name, start, stop in intervals:
        start, stop = max(start, began), min(stop, ended)
        if start < stop:
            edges += [(start, 1, class_of(name)), (stop, -1, class_of(name))]
    spent, running, at = dict.fromkeys([*CLASSES, IDLE], 0.0), Counter(), began
    for moment, change, name in [*sorted(edges), (ended, 0, IDLE)]:
        active = [each for each, count in running.items() if count]
        spent[min(active, key=PRIORITY.__getitem__) if active else IDLE] += moment - at
        running[name] += change
        at = moment
    return spent


def own_time(events: list[tuple[int, int, int, str]]) -> list[tuple[int, int, int, str]]:
    """The pieces of (thread, beginning, end, name) in which no other event of the thread ran inside."""
    found: list[tuple[int, int, int, str]] = []
    open_: list[list] = []  # from the outermost to the innermost: [thread, since when it runs itself, end, name]

    def close(until: int) -> None:
        while open_ and open_[-1][2] <= until:
            thread, since, end, name = open_.pop()
            found.append((thread, since, end, name))
            if open_:
                open_[-1][1] = end

    for thread, start, stop, name in sorted(events, key=lambda event: (event[0], event[1], -event[2])):
        if open_ and open_[-1][0] != thread:
            close(max(event[2] for event in open_))
        close(start)
        if open_:
            found.append((thread, open_[-1][1], start, open_[-1][3]))
        open_.append([thread, start, stop, name])
    close(max((event[2] for event in open_), default=0))
    return [event for event in found if event[1] < event[2]]


def longest(intervals: Iterable[tuple[str, float, float]], count: int = 20) -> list[tuple[str, int, float]]:
    """(name, calls, seconds) of the kernels that took longest together."""
    calls, seconds = Counter(), Counter()
    for name, start, stop in intervals:
        calls[name] += 1
        seconds[name] += stop - start
    return [(name, calls[name], total) for name, total in seconds.most_common(count)]


def table(spent: Mapping[str, float]) -> list[str]:
    """Lines of a Markdown table, the longest class first."""
    whole = sum(spent.values()) or 1.0
    rows = sorted(((seconds, name) for name, seconds in spent.items() if seconds > 0), reverse=True)
    return [
        "| | ms | share |",
        "|---|---:|---:|",
        *(f"| {name} | {1000 * s:,.1f} | {100 * s / whole:.1f} % |" for s, name in rows),
    ]
