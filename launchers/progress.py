"""What a person sees while something long goes on: a bar on a terminal, a plain line now and then in a log.

A run is followed through the files of its folder (docs/runs.md), so the view is the same for a process on this machine and
for a job on a cluster. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nemo_ext import run_folder
from nemo_ext.report import duration, flops_text

POLL_SECONDS = 0.2
LINE_SECONDS = (10.0, 300.0)  # plain lines come at least and at most this far apart; a fiftieth of what is left, between
PHASE_SECONDS = 5.0  # evaluating or saving gets a line of its own when it takes longer
NARROW = 100  # columns; a terminal of fewer gets a shorter bar line


class Process(Protocol):
    """Anything that tells whether it still runs: `subprocess.Popen`, or a cluster's job."""

    def poll(self) -> int | None: ...


def follow(run_dir: str | Path, process: Process, console: Console | None = None) -> int:
    """Show the run in `run_dir` until `process` has ended; return its exit code.

    Only what this start of the run writes is shown: records of an earlier start that it resumes are passed over.
    """
    console = console or Console()
    run = _Run(Path(run_dir))
    with (_BarView if console.is_terminal else _LineView)(console) as view:
        while (code := process.poll()) is None:
            view.show(run, run.read())
            time.sleep(POLL_SECONDS)
        view.show(run, run.read())
    return code


class _Run:
    """The state of a followed run, read from status.json and metrics.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.phase, self.message, self.max_steps = "starting", "", 0
        self.record: dict[str, Any] = {}
        self.held_out: float | None = None  # the latest held-out loss or reward
        self._stale = run_folder.read_status(run_dir)  # of an earlier start
        self._started: float | None = None
        self._step_times: list[float] = []
        self._tail: run_folder.Tail | None = None

    def read(self) -> list[dict]:
        """Take in what is new; return the new records."""
        status = run_folder.read_status(self.run_dir)
        if status is None or status == self._stale:
            return []
        if status.get("started") not in (None, self._started):  # the worker is up (again); the file is truncated by now
            self._started, self._step_times = status["started"], []
            self._tail = run_folder.Tail(self.run_dir / run_folder.METRICS)
        self.phase, self.message = status.get("phase", self.phase), status.get("message") or ""
        self.max_steps = status.get("max_steps") or self.max_steps
        if self._tail is None:
            return []
        records = [record for record in self._tail.read() if record.get("time", 0) >= self._started]
        for record in records:
            if run_folder.is_validation(record):
                self.held_out = record.get("val_loss", record.get("val_reward"))
            else:
                self.record = record
                self._step_times = [*self._step_times, record.get("step_time") or 0.0][-20:]
        return records

    @property
    def step(self) -> int:
        return self.record.get("step", 0)

    @property
    def eta(self) -> float | None:
        """Seconds left for the remaining steps, from the latest steps of this start."""
        if not self._step_times or not self.max_steps:
            return None
        return (self.max_steps - self.step) * statistics.median(self._step_times)

    def figures(self, narrow: bool = False) -> str:
        """Loss or reward, speed and time left in one line; what is not known yet is left out, the held-out figure also when
        `narrow`."""
        parts = []
        if self.record:
            parts += what_it_learns(self.record)
        if self.held_out is not None and not (narrow and self.record):
            parts.append(f"held-out {self.held_out:.4f}")
        if self.record:
            parts.append(f"{figure(self.record.get('tokens_per_s'), ',.0f')} tokens/s")
            if "tflops" in self.record or "reward" not in self.record:
                parts.append(flops_text(self.record.get("tflops") or 0.0))
        if self.eta is not None:
            parts.append(f"ETA {duration(self.eta)}")
        return "  ".join(parts)


def what_it_learns(record: dict[str, Any]) -> list[str]:
    """The loss, or where a run learns from rewards, reward and length of its answers."""
    if "reward" not in record:
        return [f"loss {figure(record.get('loss'), '.4f')}"]
    failed = [f"{count:,} failures of rewards"] if (count := record.get("reward_failures")) else []
    return [f"reward {figure(record['reward'], '.3f')}", f"{figure(record.get('length'), '.1f')} tokens an answer", *failed]


def figure(value: float | None, pattern: str) -> str:
    """JSON's null stands for a value that is no number."""
    return "nan" if value is None else format(value, pattern)


class _BarView:
    """One live line: phase, bar, steps, figures."""

    def __init__(self, console: Console) -> None:
        self._narrow = console.width < NARROW
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(6 if self._narrow else 24),
            TextColumn("{task.fields[steps]}"),
            TextColumn("{task.fields[figures]}"),
        )
        self._progress = Progress(*columns, console=console, refresh_per_second=5)
        self._task = self._progress.add_task("starting", total=None, steps="", figures="")

    def __enter__(self) -> _BarView:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, run: _Run, records: list[dict]) -> None:
        steps = f"{run.step}/{run.max_steps}" if run.max_steps else ""
        figures = run.figures(self._narrow) or run.message
        total = run.max_steps if run.record else None  # no length before the first step: the bar pulses
        self._progress.update(self._task, description=run.phase, completed=run.step, total=total, steps=steps, figures=figures)


class _LineView:
    """Plain lines: the phases that take time, the first step, each validation, and steps now and then."""

    def __init__(self, console: Console) -> None:
        self._print = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._phase, self._since, self._said = "", 0.0, {""}
        self._last_line = -1e9
        self._last_tenth = 0

    def __enter__(self) -> _LineView:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, run: _Run, records: list[dict]) -> None:
        for record in records:
            if "val_reward" in record:
                self._line(f"held-out reward {figure(record['val_reward'], '.4f')} at step {record['step']}")
            elif "val_loss" in record:
                ppl = figure(record.get("val_ppl"), ",.2f")
                self._line(f"held-out loss {figure(record['val_loss'], '.4f')}, perplexity {ppl} at step {record['step']}")
        self._show_phase(run)
        if any(not run_folder.is_validation(record) for record in records) and self._due(run):
            self._line(f"step {run.step}/{run.max_steps}  {run.figures()}")
            self._last_line = time.monotonic()

    def _show_phase(self, run: _Run) -> None:
        """Start, first step and end at once; evaluating and saving, which come again and again, when they take their time."""
        now = time.monotonic()
        if run.phase != self._phase:
            self._phase, self._since = run.phase, now
            self._said -= {"evaluating", "saving"}
        if run.phase in self._said or (run.phase in ("evaluating", "saving") and now - self._since < PHASE_SECONDS):
            return
        self._said.add(run.phase)
        self._line(f"{run.phase}{': ' if run.message else ''}{run.message}")

    def _due(self, run: _Run) -> bool:
        """First and last step, every tenth of the run, and when enough time has passed."""
        shortest, longest = LINE_SECONDS
        patience = min(max((run.eta or 0.0) / 50, shortest), longest)
        tenth = run.step * 10 // run.max_steps if run.max_steps else 0
        due = tenth > self._last_tenth or time.monotonic() - self._last_line >= patience
        self._last_tenth = max(tenth, self._last_tenth)
        return due

    def _line(self, text: str) -> None:
        self._print(f"[{duration(time.monotonic() - self._started)}] {text}")
