"""What a finished (or stopped) run says to people: summary.json, summary.md and plots/*.png from metrics.jsonl."""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_ext import attribution, faults, rank_report, run_folder
from nemo_ext.disk import write_atomic

WARM_UP_STEPS = 2  # the first steps of a run (allocation, compilation, cold caches) say nothing about its speed

SHOWN = 96  # pixels' height of an image among the answers
SMOOTHED = 50  # points from which a curve gets a running mean
COLOUR = "#3b6ea8"

PLOTS = {  # file name: y label
    "loss": "loss (nats per token)",
    "val_loss": "held-out loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm (L2, before clipping)",
    "throughput": "throughput (tokens/s, all processes)",
}
REWARD_PLOTS = {  # of a run that learns from rewards
    "reward": "mean reward of the sampled answers",
    "val_reward": "held-out reward",
    "length": "length of the sampled answers (tokens)",
    "kl": "KL divergence to the first policy (nats per token, k3)",
    "entropy": "entropy of the policy (nats per token)",
    "equal_groups": "share of groups with equal rewards",
    "tool_calls": "calls of tools by an answer",
    **{name: PLOTS[name] for name in ("lr", "grad_norm")},
    "loss": "policy loss",
    "step_time": "time of a step (s)",
}


def write(run_dir: str | Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write plots, summary.json and summary.md of the run in `run_dir`; return the summary.

    `facts` is what metrics.jsonl cannot know; every key goes into the summary as it is. Keys that the text knows: `recipe`,
    `layout` (a dictionary such as {"tp": 2, "pp": 1, "dp": 1}), `resumed_from_step`, `checkpoint` (path), `parameters`,
    `train_tokens` and `heldout_tokens`, `peak_memory` of the fullest rank and `planned_memory` for it (GiB), `machine` (text),
    `wall_time` (seconds). Missing ones are left out.

    Losses are nats per token, `tokens_per_s` is the median over the steps after the first two (all processes together),
    `tflops` the same per GPU (or CPU process), `memory` the peak GiB of the fullest rank, `wall_time` seconds.
    A value that was not measured is None.
    """
    run_dir = Path(run_dir)
    steps, validations = run_folder.read_records(run_dir)
    survived = faults.counts(run_dir)
    summary = summarise(steps, validations, {**facts, **({"faults": survived} if survived else {})})
    plots = _write_plots(run_dir, steps, validations, summary["resumed_from_step"])
    summary["paths"] = {
        "run": str(run_dir),
        "metrics": run_folder.METRICS,
        "config": run_folder.CONFIG,
        "tensorboard": run_folder.TENSORBOARD,
        "logs": run_folder.LOGS,
        "checkpoint": facts.get("checkpoint"),
        "plots": plots,
    }
    run_folder.write_json(run_dir / run_folder.SUMMARY_JSON, summary)
    write_atomic(run_dir / run_folder.SUMMARY_MD, _markdown(run_dir, summary, rank_report.table(steps)))
    return summary


def summarise(steps: Sequence[dict], validations: Sequence[dict], facts: dict[str, Any]) -> dict[str, Any]:
    """The figures of summary.json from the records of metrics.jsonl (sorted by step, each step once) and `facts`.

    "Before" is the validation at step 0, "after" the last one at a later step.
    """
    if any("val_reward" in v for v in validations) or any("reward" in step for step in steps):
        facts = {**facts, **_of_rewards(steps, validations)}
    before = next((_number(v, "val_loss") for v in validations if v["step"] == 0), None)
    after = next((_number(v, "val_loss") for v in reversed(validations) if v["step"] > 0), None)
    losses = _numbers(steps, "loss")
    return {
        **facts,
        "val_loss_before": before,
        "val_loss_after": after,
        "val_ppl_before": perplexity(before),
        "val_ppl_after": perplexity(after),
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": losses[-1] if losses else None,
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": int(steps[-1].get("tokens") or 0) if steps else 0,
        "tokens_per_s": _median(_numbers(steps[WARM_UP_STEPS:] or steps, "tokens_per_s")),
        "tflops": _median(_numbers(steps[WARM_UP_STEPS:] or steps, "tflops")),
        "memory": facts.get("peak_memory") or max(_numbers(steps, "memory"), default=None),
        "wall_time": facts.get("wall_time", _wall_time(steps, validations)),
        "layout": facts.get("layout"),
        "resumed_from_step": facts.get("resumed_from_step") or 0,
    }


def _of_rewards(steps: Sequence[dict], validations: Sequence[dict]) -> dict[str, Any]:
    """What a run that learns from rewards adds to the summary: rewards, and where the time of a step goes (medians, seconds)."""
    settled = steps[WARM_UP_STEPS:] or steps
    rewards = _numbers(steps, "reward")
    return {
        "val_reward_before": next((_number(v, "val_reward") for v in validations if v["step"] == 0), None),
        "val_reward_after": next((_number(v, "val_reward") for v in reversed(validations) if v["step"] > 0), None),
        "train_reward_first": rewards[0] if rewards else None,
        "train_reward_last": rewards[-1] if rewards else None,
        "equal_groups": statistics.fmean(shares) if (shares := _numbers(steps, "equal_groups")) else None,
        "reward_failures": int(sum(_numbers(steps, "reward_failures"))),
        "tool_calls": statistics.fmean(calls) if (calls := _numbers(steps, "tool_calls")) else None,
        "tool_failures": int(sum(_numbers(steps, "tool_failures"))),
        "seconds": {name: _median(_numbers(settled, f"{name}_time")) for name in ("step", "generation", "scoring", "training")},
    }


def terminal_lines(summary: dict[str, Any]) -> list[str]:
    """The few lines that a person sees when the run ends."""
    lines = [f"{label:<12} {text}" for label, text in _headlines(summary)]
    paths = summary.get("paths") or {}
    if paths.get("run"):
        lines.append(f"{'folder':<12} {paths['run']} ({run_folder.SUMMARY_MD}, {run_folder.PLOTS}/, {run_folder.METRICS})")
    if paths.get("checkpoint"):
        lines.append(f"{'checkpoint':<12} {paths['checkpoint']}")
    return lines


def perplexity(loss: float | None) -> float | None:
    """exp(loss); None where there is no loss or the result is no finite number."""
    if loss is None:
        return None
    try:
        return math.exp(loss)
    except OverflowError:
        return None


def layout_text(layout: Any) -> str:
    """A layout for people: {"tp": 2, "pp": 1, "dp": 4, "recompute": "full"} becomes "TP 2, PP 1, DP 4, full recomputation".

    Virtual stages (vp), context (cp) and expert (ep) parallelism are named where they are used.
    """
    if not isinstance(layout, dict):
        return str(layout)
    used = [key for key in ("tp", "pp", "vp", "cp", "ep", "dp") if (layout.get(key) or 0) > (key in ("vp", "cp", "ep"))]
    parts = [f"{key.upper()} {layout[key]}" for key in used]
    if layout.get("sequence_parallel"):
        parts.append("sequence parallel")
    if layout.get("recompute") not in (None, "none"):
        parts.append(f"{layout['recompute']} recomputation")
    return ", ".join(parts)


def batch_text(layout: dict[str, Any]) -> str:
    """How a replica of the model gets its part of a global batch: "2 micro-batches of 4 sequences"."""
    count, size = layout.get("num_microbatches") or 1, layout["micro_batch"]
    return f"{count} micro-batch{'es' if count > 1 else ''} of {size} sequence{'s' if size > 1 else ''}"


def count_text(count: float) -> str:
    """A number of parameters: "8.03 B", "134.5 M"."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def flops_text(tflops: float) -> str:
    """Operations a second, given in units of 10^12: "1.5 TFLOP/s", below a tenth "34.7 GFLOP/s"."""
    return f"{tflops:.3g} TFLOP/s" if tflops >= 0.1 or tflops == 0 else f"{tflops * 1000:.3g} GFLOP/s"


def duration(seconds: float) -> str:
    """ "0:42", "12:05" or "3:04:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(record: dict, key: str) -> float | None:
    value = record.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _numbers(records: Sequence[dict], key: str) -> list[float]:
    return [value for record in records if (value := _number(record, key)) is not None]


def _shown(value: float | None, pattern: str) -> str:
    return "not measured" if value is None else format(value, pattern)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _wall_time(steps: Sequence[dict], validations: Sequence[dict]) -> float | None:
    """Seconds from the first record's beginning to the last record (pauses between starts of one run are in it)."""
    times = _numbers([*steps, *validations], "time")
    if not times:
        return None
    first = _number(steps[0], "step_time") if steps and _number(steps[0], "time") == min(times) else None
    return max(times) - min(times) + (first or 0.0)


def _headlines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each figure worth a line, for terminal and Markdown alike; what was not measured is left out."""
    before, after = summary["val_loss_before"], summary["val_loss_after"]
    rows = []
    if before is not None or after is not None:
        losses = f"{_shown(before, '.4f')} -> {_shown(after, '.4f')}"
        ppls = f"{_shown(summary['val_ppl_before'], ',.2f')} -> {_shown(summary['val_ppl_after'], ',.2f')}"
        rows.append(("held-out", f"loss {losses}, perplexity {ppls}"))
    if "seconds" in summary:
        rows += _reward_headlines(summary)
    elif summary["train_loss_last"] is not None:
        rows.append(("training", f"loss {summary['train_loss_first']:.4f} -> {summary['train_loss_last']:.4f}"))
    if (exact := summary.get("exact")) is not None:
        sides = " -> ".join(_share(exact[name]) for name in ("before", "after") if name in exact)
        commonest = f"always the commonest answer: {exact['commonest']:.1%}"
        rows.append(("exact", f"{sides} of {exact['count']:,} held-out answers (Wilson's intervals of 95%); {commonest}"))
    took = "" if summary["wall_time"] is None else f" in {duration(summary['wall_time'])}"
    resumed = f", resumed from step {summary['resumed_from_step']}" if summary["resumed_from_step"] else ""
    rows.append(("steps", f"{summary['steps']:,} ({summary['tokens']:,} tokens){took}{resumed}"))
    if summary["tokens_per_s"] is not None:
        speed = f"{summary['tokens_per_s']:,.0f} tokens/s"
        if summary["tflops"] is not None:
            speed += f", {flops_text(summary['tflops'])} a device"
        if summary["memory"] is not None:
            planned = f" ({summary['planned_memory']:.2f} planned)" if summary.get("planned_memory") else ""
            speed += f", {summary['memory']:.2f} GiB peak{planned}"
        rows.append(("speed", speed))
    if summary.get("faults"):
        rows.append(("faults", faults.text(summary["faults"])))
    if summary["layout"]:
        layout = summary["layout"]
        batch = f"; {batch_text(layout)}" if isinstance(layout, dict) and layout.get("micro_batch") else ""
        rows.append(("layout", layout_text(layout) + batch))
    return rows


def _table(summary: dict[str, Any]) -> list[str]:
    """Rows of summary.md's table."""
    if "seconds" in summary:
        if summary.get("reward_before"):
            sides = " | ".join(_with_interval(summary[key]) for key in ("reward_before", "reward_after"))
            return [f"| held-out reward (interval of 95%) | {sides} |"]
        names = (("held-out reward", "val_reward_before", "val_reward_after", ".3f"),)
    else:
        names = (
            ("held-out loss (nats per token)", "val_loss_before", "val_loss_after", ".4f"),
            ("held-out perplexity", "val_ppl_before", "val_ppl_after", ",.2f"),
            ("training loss (nats per token)", "train_loss_first", "train_loss_last", ".4f"),
        )
    rows = []
    if (exact := summary.get("exact")) is not None:
        sides = " | ".join(_share(exact[name]) if name in exact else "not measured" for name in ("before", "after"))
        rows.append(f"| held-out answers that are right word for word | {sides} |")
    return rows + [
        f"| {label} | {_shown(summary[first], pattern)} | {_shown(summary[last], pattern)} |"
        for label, first, last, pattern in names
    ]


def _reward_headlines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if (difference := summary.get("reward_difference")) is not None:
        change = f"{difference[0]:+.3f} ({difference[1]:+.3f} to {difference[2]:+.3f})"
        sides = f"{_with_interval(summary['reward_before'])} -> {_with_interval(summary['reward_after'])}"
        rows.append(("held-out", f"reward {sides}, {change}; {summary['heldout_answers']:,} answers, intervals of 95%"))
    elif summary["val_reward_after"] is not None:
        rows.append(("held-out", f"reward {_shown(summary['val_reward_before'], '.3f')} -> {summary['val_reward_after']:.3f}"))
    if summary["train_reward_last"] is not None:
        equal = f", {summary['equal_groups']:.0%} of the groups with equal rewards" if summary["equal_groups"] is not None else ""
        failed = (
            f", {summary['reward_failures']:,} failures of rewards (logs/rank0.log has the first)"
            if summary["reward_failures"]
            else ""
        )
        rows.append(
            ("training", f"reward {summary['train_reward_first']:.3f} -> {summary['train_reward_last']:.3f}{equal}{failed}")
        )
    if summary["tool_calls"] is not None:
        rows.append(("tools", f"{summary['tool_calls']:.2f} calls an answer, {summary['tool_failures']:,} failed"))
    if summary["seconds"]["step"] is not None:
        whole, *parts = [(name, each) for name, each in summary["seconds"].items() if each is not None]
        rows.append(("a step", f"{whole[1]:.2f} s: " + ", ".join(f"{name} {each:.2f}" for name, each in parts)))
    return rows


def _share(value: Sequence[float]) -> str:
    share, low, high = value
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def _with_interval(value: Sequence[float]) -> str:
    """A mean and its interval: "0.53 (0.48 to 0.58)"."""
    return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def _markdown(run_dir: Path, summary: dict[str, Any], ranks: Sequence[str]) -> str:
    lines = [f"# {summary.get('recipe') or run_dir.name}", "", "| | before | after |", "|---|---:|---:|", *_table(summary)]
    lines.append("")
    lines += [f"- {label}: {text}" for label, text in _headlines(summary) if label not in ("held-out", "training")]
    if summary.get("parameters"):
        lines.append(f"- model: {summary['parameters'] / 1e6:,.1f} M parameters")
    if summary.get("train_tokens"):
        lines.append(f"- data: {summary['train_tokens']:,} tokens for training, {summary.get('heldout_tokens') or 0:,} held out")
    if summary.get("problems"):
        lines.append(f"- data: {summary['problems']:,} problems for training, {summary.get('heldout_problems') or 0:,} held out")
    if summary.get("machine"):
        lines.append(f"- machine: {summary['machine']}")
    lines += ranks
    for row in summary.get("answers") or []:
        lines += ["", "## Answers before and after", ""] if row is summary["answers"][0] else [""]
        if row.get("image"):
            lines += [f'<img src="{row["image"]}" height="{SHOWN}">', ""]
        lines += [f"**{_quoted(row['question'])}**", ""]
        lines += [f"- {name}: {_quoted(row[name])}" for name in ("before", "after", "reference") if row[name] is not None]
    if profiled := run_folder.read_json(run_folder.rank_profile(run_dir, 0)):
        lines += ["", f"## Where step {profiled['step']} went (rank 0)", "", *attribution.table(profiled["seconds"])]
    paths = summary["paths"]
    lines += ["", "## Where everything is", "", f"Folder `{paths['run']}`:", ""]
    if paths["checkpoint"]:
        lines.append(f"- checkpoint: `{paths['checkpoint']}`")
    inside = {
        run_folder.CONFIG: "the resolved configuration; give it back as `config=` to repeat the run",
        run_folder.METRICS: "one line per step",
        run_folder.TENSORBOARD: "`tensorboard --logdir` shows it",
        run_folder.LOGS: "what each process printed",
    }
    lines += [f"- [{name}]({name}): {what}" for name, what in inside.items() if (run_dir / name).exists()]
    if paths["plots"]:
        lines += ["", "## Plots", ""]
        lines += [f"![{(PLOTS | REWARD_PLOTS).get(Path(plot).stem, Path(plot).stem)}]({plot})" for plot in paths["plots"]]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Text of a model or of data in a line of Markdown that it cannot break out of."""
    return " ".join(re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text).split())


def _write_plots(run_dir: Path, steps: Sequence[dict], validations: Sequence[dict], resumed_from_step: int) -> list[str]:
    """Draw every series that has a point; return the files' paths relative to the run's folder."""
    written = []
    rewarded = any("reward" in step for step in steps)
    for name, label in (REWARD_PLOTS if rewarded else PLOTS).items():
        records, key = (validations, name) if name.startswith("val_") else (steps, {"throughput": "tokens_per_s"}.get(name, name))
        points = [(record["step"], value) for record in records if (value := _number(record, key)) is not None]
        path = f"{run_folder.PLOTS}/{name}.png"
        if not points:
            (run_dir / path).unlink(missing_ok=True)  # of an earlier start
            continue
        write_atomic(run_dir / path, _plot(points, label, resumed_from_step, markers=name.startswith("val_")))
        written.append(path)
    if (image := rank_report.plot(steps)) is not None:
        written.append(f"{run_folder.PLOTS}/ranks.png")
        write_atomic(run_dir / written[-1], image)
    return written


def _plot(points: Sequence[tuple[int, float]], label: str, resumed_from_step: int, markers: bool) -> bytes:
    """One line over the optimizer's steps, as PNG; of many points, their running mean over the faint line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, values = zip(*points, strict=True)
    noisy = label != PLOTS["lr"] and not markers
    window = len(points) // 25 | 1 if noisy and len(points) >= SMOOTHED else 0
    few = markers or len(points) < 3
    axes.plot(steps, values, color=COLOUR, linewidth=1.4, marker="o" if few else None, markersize=4, alpha=0.35 if window else 1)
    if window:
        axes.plot(steps, _running_mean(values, window), color=COLOUR, linewidth=1.6, label=f"mean of {window} steps")
    if resumed_from_step:
        axes.axvline(resumed_from_step, color="#999999", linestyle=":", label=f"resumed from step {resumed_from_step}")
    if window or resumed_from_step:
        axes.legend(frameon=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if label.startswith("throughput"):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the `window` values around each, an odd number; of those that there are near the ends."""
    sums, reach = [0.0, *itertools.accumulate(values)], window // 2
    spans = ((max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]
