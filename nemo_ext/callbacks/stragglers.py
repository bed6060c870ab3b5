"""Which process is slow: the time of its own forward passes against its peers'."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_ext import faults
from nemo_ext.platform import hardware

WINDOW = 10  # steps whose times are compared at once
PERSISTENT = 3  # windows in a row in which a rank is slow


class Stragglers(Callback):
    """Reports a rank whose forward passes take `factor` times the median of its peers' in most steps of `PERSISTENT` windows of
    `WINDOW` steps, one window after the other.

    Steps take equally long on all ranks, because they wait for each other. What is compared is each micro batch's forward pass
    from the moment its input is there, without its waits for parameters that are gathered meanwhile: seconds on the host's clock,
    of the device's on a GPU. Ranks are compared with those of their own pipeline stage, which do the same work; the lower median,
    so that one of two can be slow. Each step is compared for itself and the middle one counts: a machine that does something else
    for a moment makes any rank's step ten times as long. The forward passes of a tensor parallel group wait for each other: there
    all of the group's ranks are reported.

    The worst rank goes into metrics.jsonl (`straggler`, `straggler_ratio`) for as long as it is slow, and once into
    faults.jsonl. Costs an all-gather of `WINDOW` + 1 numbers over gloo every `WINDOW` steps.
    """

    def __init__(self, run_dir: str, factor: float) -> None:
        self.run_dir, self.factor = run_dir, factor
        self.figures: dict[str, Any] = {}
        self._spans: list[tuple[int, Any, Any]] = []  # of this step: (1 for work or -1 for a wait inside it, beginning, end)
        self._window: list[list[tuple[int, Any, Any]]] = []  # of the steps before
        self._began: Any = None  # of the forward pass that runs
        self._slow_windows: dict[int, int] = {}
        self._told: set[int] = set()

    def on_train_start(self, trainer, pl_module) -> None:
        from megatron.core import parallel_state

        self._cuda = hardware.has_cuda()
        self._stage = parallel_state.get_pipeline_model_parallel_rank()
        self._group = torch.distributed.new_group(backend="gloo")
        for chunk in trainer.strategy.megatron_parallel:
            for group in [*chunk.module.bucket_groups, *chunk.module.expert_parallel_bucket_groups]:
                group.finish_param_sync = self._noting(group.finish_param_sync)

    def on_megatron_microbatch_start(self, step) -> None:
        self._began = self._now() if not step.forward_only else None

    def on_megatron_microbatch_end(self, step) -> None:
        if self._began is not None:
            self._spans.append((1, self._began, self._now()))
            self._began = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._window.append(self._spans)
        self._spans = []
        if len(self._window) < WINDOW:
            return
        seconds = [sum(sign * _seconds(began, ended) for sign, began, ended in spans) for spans in self._window]
        self._window = []
        own = torch.tensor([*seconds, self._stage], dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(everyone, own, group=self._group)
        found = [(seconds, int(stage)) for *seconds, stage in (each.tolist() for each in everyone)]
        self._judge(ratios(found), trainer.global_step if trainer.is_global_zero else None)

    def _judge(self, found: list[float], step: int | None) -> None:
        """Draw the conclusions of a window from `ratios`; the rank that is given the `step` writes them down."""
        self._slow_windows = {r: self._slow_windows.get(r, 0) + 1 for r, ratio in enumerate(found) if ratio > self.factor}
        slow = {rank: found[rank] for rank, windows in self._slow_windows.items() if windows >= PERSISTENT}
        self.figures = {}
        if slow:
            worst = max(slow, key=slow.get)
            self.figures = {"straggler": worst, "straggler_ratio": slow[worst]}
        for rank in slow.keys() - self._told:
            self._told.add(rank)
            if step is not None:
                message = f"rank {rank} takes {slow[rank]:.1f} times as long as the median of its peers"
                faults.note(self.run_dir, "straggler", step, message, rank=rank, ratio=round(slow[rank], 2))

    def _noting(self, wait: Callable[..., None]) -> Callable[..., None]:
        """A bucket's wait for its gathered parameters, noted where it is inside a forward pass."""

        @functools.wraps(wait)
        def noted(*args: Any, **kwargs: Any) -> None:
            if self._began is None:
                return wait(*args, **kwargs)
            began = self._now()
            wait(*args, **kwargs)
            self._spans.append((-1, began, self._now()))

        return noted

    def _now(self) -> Any:
        """A moment: seconds, or an event of the GPU's stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(began: Any, ended: Any) -> float:
    """Between two moments of a rank."""
    if isinstance(began, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


def ratios(times: list[tuple[list[float], int]]) -> list[float]:
    """By rank, how many times the lower median of its pipeline stage a rank took in the middle one of its steps, from (seconds of
    each step, stage) of every rank."""
    by_stage: dict[int, list[list[float]]] = {}
    for seconds, stage in times:
        by_stage.setdefault(stage, []).append(seconds)
    middle = {stage: [statistics.median_low(step) for step in zip(*ranks, strict=True)] for stage, ranks in by_stage.items()}
    return [
        statistics.median(own / peers if peers > 0 else 1.0 for own, peers in zip(seconds, middle[stage], strict=True))
        for seconds, stage in times
    ]
