"""One report of all tasks and models: report.md, report.json and report.png."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_ext import run_folder
from nemo_ext.disk import write_atomic
from nemo_ext.evaluation import intervals
from nemo_ext.evaluation.results import Metric, Result

JSON, MARKDOWN, PLOT = "report.json", "report.md", "report.png"
SHOWN = 1200  # characters of a text in an example
COLUMNS = 3  # of the plot's panels
COLOURS = ("#3b6ea8", "#c8793a", "#5a9367", "#9a5b8f", "#8a8a3a", "#5f5f5f", "#b04a4a", "#4aa0a8")


@dataclass(frozen=True)
class Report:
    """`results` by task and model; `pairs` by task and model, each against the first model of `models`."""

    models: dict[str, dict[str, Any]]  # name: what is known of it
    results: dict[str, dict[str, Result]]
    pairs: dict[str, dict[str, Result]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The model that the others are compared with."""
        return next(iter(self.models))


def write(folder: Path, report: Report) -> None:
    """Write the three files into `folder`."""
    run_folder.write_json(folder / JSON, to_json(report))
    image = plot(report)
    if image is None:
        (folder / PLOT).unlink(missing_ok=True)
    else:
        write_atomic(folder / PLOT, image)
    write_atomic(folder / MARKDOWN, markdown(report, with_plot=image is not None))


def to_json(report: Report) -> dict[str, Any]:
    """The report for programs: what report.md shows, without the units behind the figures."""

    def plain(result: Result) -> dict[str, Any]:
        shown = result.to_dict()
        for metric in shown["metrics"]:
            del metric["pairs"]
        return shown

    return {
        "models": report.models,
        "settings": report.settings,
        "tasks": {task: {model: plain(result) for model, result in by.items()} for task, by in report.results.items()},
        "differences": [d for task in report.results for d in differences(report, task)],
        "pairwise": {task: {model: plain(result) for model, result in by.items()} for task, by in report.pairs.items()},
    }


def differences(report: Report, task: str) -> list[dict[str, Any]]:
    """Each model less the first, with a paired interval, for metrics that both measured on the same units."""
    found = []
    base = {metric.name: metric for metric in report.results[task].get(report.base, Result([], [])).metrics}
    for model, result in report.results[task].items():
        for metric in result.metrics if model != report.base else ():
            first = base.get(metric.name)
            if first is None or not _same_units(first, metric):
                continue
            low, high = intervals.ratio_difference(first.pairs, metric.pairs) or (None, None)
            value = metric.value - first.value
            found.append({"task": task, "metric": metric.name, "model": model, "value": value, "low": low, "high": high})
    return found


def _same_units(a: Metric, b: Metric) -> bool:
    """Whether the units' weights are equal: the same questions, or windows over the same bytes."""
    if not a.pairs or not b.pairs or len(a.pairs) != len(b.pairs):
        return False
    return all(math.isclose(x[1], y[1]) for x, y in zip(a.pairs, b.pairs, strict=True))


def markdown(report: Report, with_plot: bool) -> str:
    """The report for people."""
    models = list(report.models)
    lines = ["# Evaluation", "", *_table(["task", "metric", *models], _rows(report, models), right=2), ""]
    lines += ["Brackets: 95% intervals. An arrow says which way is better.", ""]
    if with_plot:
        lines += [f"![every figure with its interval]({PLOT})", ""]
    for task, by_model in report.results.items():
        lines += [f"## {_cell(task)}", ""]
        lines += _about(by_model)
        shown = differences(report, task)
        if shown:
            lines += ["", f"Less {_cell(report.base)}, on the same units:", ""]
            rows = [[d["metric"], d["model"], _interval(d["value"], d["low"], d["high"], "+"), _clear(d)] for d in shown]
            lines += _table(["metric", "model", "difference", ""], rows, right=2)
        for model, result in report.pairs.get(task, {}).items():
            (metric,) = result.metrics
            won = _interval(metric.value, metric.low, metric.high)
            lines += ["", f"{_cell(model)} against {_cell(report.base)}: win rate {won}. {' '.join(result.about)}."]
        lines += _details(by_model)
        lines += _examples(by_model)
        lines.append("")
    lines += ["## Models", "", *_table(["model", "what"], [[name, _facts(facts)] for name, facts in report.models.items()])]
    lines += ["", "## Settings", "", *(f"- {name}: {value}" for name, value in report.settings.items())]
    return "\n".join(lines) + "\n"


def lines(report: Report) -> list[str]:
    """The figures for the terminal."""
    rows = [[task, metric, *cells] for task, metric, *cells in _rows(report, list(report.models))]
    header = ["task", "metric", *report.models]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]


def plot(report: Report) -> bytes | None:
    """A panel for each metric, a point with its interval for each model, as PNG; None without a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(report.models)
    panels = []
    for task, by_model in report.results.items():
        for name in _metric_names(by_model):
            points = {m: metric for m in models if (metric := _metric(by_model.get(m), name)) and _finite(metric.value)}
            if points:
                panels.append((task, name, points))
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = 1.1 + 0.32 * len(models)
    figure = Figure(figsize=(4.2 * columns, height * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (task, name, points) in zip(grid.flat, panels, strict=False):
        for number, model in enumerate(models):
            if (metric := points.get(model)) is None:
                continue
            y, colour = len(models) - 1 - number, COLOURS[number % len(COLOURS)]
            if _finite(metric.low) and _finite(metric.high):
                axes.plot([metric.low, metric.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.6)
            axes.plot([metric.value], [y], "o", color=colour, markersize=5)
        better = next(iter(points.values())).better
        axes.set_title(f"{task}\n{name} ({better} is better)", fontsize=8)
        first_column = grid[:, 0].tolist().count(axes) > 0
        axes.set_yticks(range(len(models)), models[::-1] if first_column else [""] * len(models), fontsize=8)
        axes.set_ylim(-0.6, len(models) - 0.4)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(True, axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _rows(report: Report, models: Sequence[str]) -> list[list[str]]:
    """A row for each task and metric: their names and a cell a model."""
    rows = []
    for task, by_model in report.results.items():
        for name in _metric_names(by_model):
            found = [_metric(by_model.get(model), name) for model in models]
            arrow = "↓" if next(m for m in found if m).better == "lower" else "↑"
            rows.append([task, f"{name} {arrow}", *(_interval(m.value, m.low, m.high) if m else "-" for m in found)])
    return rows


def _metric_names(by_model: Mapping[str, Result]) -> list[str]:
    return list(dict.fromkeys(metric.name for result in by_model.values() for metric in result.metrics))


def _metric(result: Result | None, name: str) -> Metric | None:
    return next((metric for metric in result.metrics if metric.name == name), None) if result else None


def _about(by_model: Mapping[str, Result]) -> list[str]:
    """How a task was measured: what holds for all models once, what does not by model."""
    first, *others = by_model.values()
    common = [text for text in first.about if all(text in other.about for other in others)]
    found = [f"- {text}" for text in common]
    for model, result in by_model.items():
        found += [f"- {_cell(model)}: {text}" for text in result.about if text not in common]
    kinds = dict.fromkeys(f"{m.name}: {m.interval}, n = {m.count:,}" for m in first.metrics if m.interval)
    return [*found, f"- intervals: {'; '.join(kinds)}"] if kinds else found


def _details(by_model: Mapping[str, Result]) -> list[str]:
    found = []
    for model, result in by_model.items():
        for table in result.tables:
            rows = [[_number(cell) if isinstance(cell, float) else "" if cell is None else str(cell) for cell in row]
                    for row in table.rows]  # fmt: skip
            found += ["", f"<details><summary>{_cell(model)}: {_cell(table.title)}</summary>", ""]
            found += [*_table(table.header, rows, right=1), "", "</details>"]
    return found


def _examples(by_model: Mapping[str, Result]) -> list[str]:
    """The models' answers to the same prompts, one after another."""
    results = [(model, result.examples) for model, result in by_model.items() if result.examples]
    if not results:
        return []
    found = ["", "### Examples"]
    for number, first in enumerate(results[0][1]):
        found += ["", "Prompt", "", *_quoted(first["prompt"])]
        if first["reference"]:
            found += ["", "Reference", "", *_quoted(first["reference"])]
        for model, examples in results:
            found += ["", _cell(model), "", *_quoted(examples[number]["answer"])]
        found += ["", "---"]
    return found[:-2]


def _quoted(text: str) -> list[str]:
    """A block that shows a text as it is, whatever Markdown is in it."""
    text = text if len(text) <= SHOWN else text[:SHOWN] + " ..."
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence, *text.splitlines(), fence]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None) -> list[str]:
    """A Markdown table; columns from `right` on are aligned to the right."""
    marks = ["---" if right is None or i < right else "---:" for i in range(len(header))]
    every = [[_cell(cell) for cell in row] for row in [header, *rows]]
    text = [f"| {' | '.join(row)} |" for row in every]
    return [text[0], f"|{'|'.join(marks)}|", *text[1:]]


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _interval(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    if low is None or high is None:
        return _number(value, sign)
    return f"{_number(value, sign)} [{_number(low, sign)}, {_number(high, sign)}]"


def _number(value: float | None, sign: str = "") -> str:
    """Four digits that count, three places at least below 10."""
    if value is None:
        return "not measured"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    return format(value, f"{sign},.{4 if size < 1 else 3 if size < 100 else 1}f")


def _clear(difference: Mapping[str, Any]) -> str:
    low, high = difference["low"], difference["high"]
    if low is None:
        return ""
    return "clear" if low > 0 or high < 0 else "within chance"


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
