"""sweep.KEY=[a,b]: the same run with every combination of values, and one comparison at the end.

    python launchers/run.py recipe=cpt_llama3 sweep.lr=[1e-5,3e-5] sweep.seq=[2048,4096] out=runs/sweep

Each combination is a run of its own in a folder of `out`, named by its values. `run` makes them one after the other on this
machine; an executor that submits takes `expand` and `begin`. The same command again passes over the complete ones.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipes
from launchers import folder, grammar
from nemo_ext import report, run_folder
from nemo_ext.disk import held, write_atomic
from nemo_ext.errors import RunError, UserError, explain
from nemo_ext.report import duration

SWEEP_JSON, SWEEP_MD, SWEEP_PLOT = "sweep.json", "sweep.md", "sweep.png"
UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")  # in a folder's name
WAIT = 120  # seconds for another run of the sweep to write its comparison
LONGEST = 120  # characters of a folder's name
NOT_SWEPT = ("out", "recipe", "config", "plan", "dryrun", "debug", "executor", "sweep")


@dataclass(frozen=True)
class Point:
    """One run of a sweep. `values` are the swept keys', `command` is complete."""

    name: str
    out: Path
    values: dict[str, Any]
    command: grammar.Command


def expand(command: grammar.Command) -> list[Point]:
    """The runs of a command with `sweep.` keys, the last key changing fastest. Raises UserError as each of them would."""
    if command.recipe is None:
        raise UserError("recipe= is missing; run without arguments to list the recipes")
    for name, values in command.sweep.items():
        if name in NOT_SWEPT:
            raise UserError(f"sweep.{name}: {name}= is the sweep's own")
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep.{name}={values} must be a list: sweep.{name}=[{values},...]")
        if len({json.dumps(value, default=str) for value in values}) < len(values):
            raise UserError(f"sweep.{name}={values} has a value twice")
    base = _resolved(dataclasses.replace(command, sweep={}), {})
    out = Path(base["out"] if command.keys.get("out") else f"{base['out']}-sweep")
    points: list[Point] = []
    for combination in itertools.product(*command.sweep.values()):
        values = dict(zip(command.sweep, combination, strict=True))
        one = grammar.with_settings(dataclasses.replace(command, sweep={}), values)
        name = _name(values)
        if any(point.name == name for point in points):
            name = f"{name[: LONGEST - 5]}_{len(points)}"
        one.keys["out"] = str(out / name)
        _resolved(one, values)
        points.append(Point(name, out / name, values, one))
    return points


def run(command: grammar.Command, launch: Callable[[grammar.Command], int]) -> int:
    """Make the runs of a sweep one after the other with `launch`, which returns a run's exit code, and compare them.

    All are planned before the first starts. A run that fails does not end the others. Returns 0 when all are complete, 1 when one
    failed, and at once the code of one that a signal stopped.
    """
    points = expand(command)
    if command.plan or command.dryrun:
        for point in points:
            print(f"{point.name}: {point.out}")
            if command.plan:
                launch(point.command)
                print()
        return 0
    for point in points:
        _plan(point, launch)
    begin(command, points)
    failed = 0
    for number, point in enumerate(points, 1):
        print(f"[{number}/{len(points)}] {point.name}", flush=True)
        if _complete(point.out) is not None:
            print(f"{point.out} is complete")
            continue
        try:
            code, message = launch(point.command), ""
        except (UserError, RunError, OSError) as error:
            code, message = getattr(error, "exit_code", 1), explain(error, point.out)
            print(f"error: {message}", flush=True)
        _set_message(points[0].out.parent, point.name, message)
        if code >= 128:
            return code
        failed += bool(code)
    print("\n".join(["", *compare(points[0].out.parent)]))
    return 1 if failed else 0


def begin(command: grammar.Command, points: list[Point]) -> None:
    """Write which runs the sweep has into its folder. Raises UserError where the folder holds another recipe's."""
    out = points[0].out.parent
    record = run_folder.read_json(out / SWEEP_JSON)
    if record and record.get("recipe") != command.recipe:
        raise UserError(f"out={out} holds a sweep of {record.get('recipe')}: give another out=")
    earlier = {point["name"]: point for point in record["points"]} if record else {}
    rows = {point.name: {"name": point.name, "values": point.values} for point in points}
    out.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(out / SWEEP_JSON, {"recipe": command.recipe, "points": list({**earlier, **rows}.values())})


def compare(out: Path) -> list[str]:
    """Write sweep.md, sweep.png and the figures in sweep.json from what the runs of the sweep in `out` have so far.

    Sorted by the held-out loss (or reward) after training, best first. Returns the table for a terminal.
    """
    with held(out, WAIT):  # the jobs of a cluster end when they end
        return _compare(out)


def _compare(out: Path) -> list[str]:
    record = run_folder.read_json(out / SWEEP_JSON)
    rows = [_row(out, point) for point in record["points"]]
    rewarded = any(row["val_reward_after"] is not None for row in rows)
    best_first = (lambda row: -row["val_reward_after"]) if rewarded else (lambda row: row["val_loss_after"])
    measured = "val_reward_after" if rewarded else "val_loss_after"
    rows = sorted((row for row in rows if row[measured] is not None), key=best_first) + [r for r in rows if r[measured] is None]
    run_folder.write_json(out / SWEEP_JSON, {**record, "points": rows})
    swept = list(dict.fromkeys(name for row in rows for name in row["values"]))
    figures = {
        f"held-out {'reward' if rewarded else 'loss'}": (measured, ".4f"),
        "training loss": ("train_loss_last", ".4f"),
        "tokens/s": ("tokens_per_s", ",.0f"),
    }
    head = [*swept, *figures, "time", "status"]
    cells = [
        [_text(row["values"].get(name)) for name in swept]
        + ["" if row[key] is None else format(row[key], pattern) for key, pattern in figures.values()]
        + ["" if row["wall_time"] is None else duration(row["wall_time"]), row["status"]]
        for row in rows
    ]
    lines = [f"# Sweep of {record['recipe']}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    lines += ["", "Best first. Each run is in a folder of its own:", ""]
    lines += [f"- {_values(row['values'])}: `{row['name']}`" for row in rows]
    if (image := _plot(out, rows, rewarded)) is not None:
        write_atomic(out / SWEEP_PLOT, image)
        lines += ["", f"![held-out figures of every run]({SWEEP_PLOT})"]
    write_atomic(out / SWEEP_MD, "\n".join(lines) + "\n")
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *cells]]
    return [*table, f"folder: {out} ({SWEEP_MD}, {SWEEP_PLOT})"]


def _resolved(command: grammar.Command, values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a run. What is wrong with them is said with the swept values."""
    from nemo_ext.platform import hardware

    try:
        return recipes.resolve(command.recipe, command.keys, cuda=command.executor != "local" or hardware.detect().cuda)
    except UserError as error:
        raise (UserError(f"{error} (sweep: {_values(values)})") if len(values) > 1 else error) from None


def _plan(point: Point, launch: Callable[[grammar.Command], int]) -> None:
    """Refuse here what the run's plan would refuse, with nobody listening to the plan."""
    try:
        with redirect_stdout(io.StringIO()):
            launch(dataclasses.replace(point.command, plan=True))
    except UserError as error:
        raise UserError(f"{error} (sweep: {_values(point.values)})") from None


def _complete(out: Path) -> dict[str, Any] | None:
    return folder.complete(out) if out.is_dir() else None


def _set_message(out: Path, name: str, message: str) -> None:
    """Keep why a run failed, for the table."""
    record = run_folder.read_json(out / SWEEP_JSON)
    for point in record["points"]:
        if point["name"] == name:
            point["message"] = message
    run_folder.write_json(out / SWEEP_JSON, record)


def _row(out: Path, point: dict[str, Any]) -> dict[str, Any]:
    """A run's part of the comparison."""
    run_dir = out / point["name"]
    summary = _complete(run_dir)
    names = ("val_loss_before", "val_loss_after", "val_reward_after", "train_loss_last", "tokens_per_s", "wall_time", "steps")
    status = "complete" if summary else point.get("message") and "failed: " + point["message"]
    if not status:
        status = (run_folder.read_status(run_dir) or {}).get("phase", "not started")
    found = {name: (summary or {}).get(name) for name in names}
    return {"name": point["name"], "values": point["values"], "message": point.get("message", ""), **found, "status": status}


def _plot(out: Path, rows: list[dict[str, Any]], rewarded: bool) -> bytes | None:
    """PNG of every run's held-out loss (or reward) over its steps; None while none has been evaluated."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    key = "val_reward" if rewarded else "val_loss"
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in rows:
        _, validations = run_folder.read_records(out / row["name"])
        points = [(record["step"], record[key]) for record in validations if record.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4, label=_values(row["values"]))
    if not axes.lines:
        return None
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(report.REWARD_PLOTS[key] if rewarded else report.PLOTS[key])
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _name(values: dict[str, Any]) -> str:
    """A folder's name: `lr-1e-05_seq-2048`."""
    return "_".join(UNSAFE.sub("-", f"{name}-{_text(value)}").strip("-") for name, value in values.items())[:LONGEST]


def _values(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)
