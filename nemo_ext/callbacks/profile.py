"""Where one step's time goes, by torch's profiler."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity

from nemo_ext import attribution, run_folder
from nemo_ext.platform import hardware


class Profile(Callback):
    """Profiles step `step` on every rank: logs/rankN.profile.json has the seconds of each class of kernels and the kernels that
    took longest, logs/rankN.trace.json.gz is for chrome://tracing or Perfetto.

    On a GPU its kernels are counted, on a CPU torch's operators, each without those that it calls. The step
    itself takes longer than others, and writing its trace some seconds.
    """

    def __init__(self, run_dir: str, step: int) -> None:
        self.run_dir, self.step = run_dir, step
        self._profiler: Any = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step + 1 != self.step:
            return
        self._cuda = hardware.has_cuda()
        self._profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU])
        self._wait()
        self._profiler.start()
        self._began = time.time_ns()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._profiler is None:
            return
        self._wait()
        ended = time.time_ns()
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        found = intervals(profiler, self._cuda)
        spent = attribution.attribute(found, self._began / 1e9, ended / 1e9)
        path = run_folder.rank_profile(self.run_dir, trainer.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path, {"step": self.step, "seconds": spent, "longest": attribution.longest(found)})
        profiler.export_chrome_trace(str(path.with_name(f"rank{trainer.global_rank}.trace.json.gz")))

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def intervals(profiler: torch.profiler.profile, cuda: bool) -> list[tuple[str, float, float]]:
    """(name, beginning, end) in seconds since the epoch: a GPU's kernels, or when a CPU's operators ran themselves."""
    events = profiler.profiler.kineto_results.events()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    found = [(e.start_thread_id(), e.start_ns(), e.end_ns(), e.name()) for e in events if e.device_type() == kind]
    if not cuda:
        found = attribution.own_time([event for event in found if event[3].startswith(("aten::", "gloo:"))])
    return [(name, start / 1e9, stop / 1e9) for _, start, stop, name in found]
