"""Progress of a step that one process takes: a bar with its ETA on a terminal, a plain line now and then in a log.

Imports neither torch nor NeMo.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nemo_ext.report import duration

BAR_LINE_SECONDS = 10.0


class Counter:
    """What `bar` hands out: call it with the amount done so far, or `advance` it."""

    def __init__(self, update: Callable[[int, int | None, str | None], None]) -> None:
        self._update = update
        self._done = 0

    def __call__(self, done: int, total: int | None = None, unit: str | None = None) -> None:
        """`done` of `total` units; total and unit where they differ from what `bar` was told."""
        self._done = done
        self._update(done, total, unit)

    def advance(self, amount: int = 1) -> None:
        """`amount` more units are done."""
        self(self._done + amount)


@contextlib.contextmanager
def bar(label: str, total: int | None = None, unit: str = "", console: Console | None = None) -> Iterator[Counter]:
    """Progress of a preparation step: `with bar("tokenising", total, "documents") as progress: progress(done)`.

    `total` None means unknown; bytes (unit "B") are shown as megabytes. Speed and ETA are counted from
    the first call, so that what an earlier process did may be told in it. In a log: a line every ten seconds, and one at the
    end with the time it took.
    """
    console = console or Console()
    started = time.monotonic()
    state = {"done": 0, "total": total, "unit": unit, "line": started, "first": None}

    def text() -> str:
        done, total, elapsed = state["done"], state["total"], time.monotonic() - started
        unit, scale = ("MB", 1e6) if state["unit"] == "B" else (state["unit"], 1)

        def amount(number: float) -> str:
            return f"{number / scale:,.{0 if scale == 1 else 1}f}"

        parts = [f"{amount(done)}/{amount(total)} {unit}".rstrip() if total else f"{amount(done)} {unit}".rstrip()]
        before, since = state["first"] if state["first"] and done > state["first"][0] else (0, started)
        speed = (done - before) / (time.monotonic() - since)
        if speed and elapsed > 1:
            if speed >= 1:
                parts.append(f"{amount(speed)} {unit}/s".replace(" /s", "/s"))
            if total and done < total:
                parts.append(f"ETA {duration((total - done) / speed)}")
        return "  ".join(parts)

    def take(done: int, new_total: int | None, new_unit: str | None) -> None:
        if state["first"] is None:
            state["first"] = (done, time.monotonic())
        state.update(done=done, total=new_total or state["total"], unit=new_unit or state["unit"])

    def finish() -> None:
        console.print(
            f"{label}: {text()} in {duration(time.monotonic() - started)}", markup=False, highlight=False, soft_wrap=True
        )

    if not console.is_terminal:

        def line(*args: Any) -> None:
            take(*args)
            if time.monotonic() - state["line"] >= BAR_LINE_SECONDS:
                state["line"] = time.monotonic()
                console.print(f"{label}: {text()}", markup=False, highlight=False, soft_wrap=True)

        yield Counter(line)
        finish()
        return

    columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=console, transient=True, refresh_per_second=5) as progress:
        task = progress.add_task(label, total=total, figures="")

        def draw(*args: Any) -> None:
            take(*args)
            progress.update(task, completed=state["done"], total=state["total"], figures=text())

        yield Counter(draw)
    finish()
