"""How AdaLoRA shared its ranks out, for a run's summary: a table of the linears over time, and a map of the last ranks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

ROWS = 6  # of the table: allocations spread over the run, with the first and the last


def table(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: the mean rank over the layers of every linear after some allocations; nothing for a run without them."""
    cuts = [record for record in steps if record.get("ranks")]
    if not cuts:
        return []
    linears = list(cuts[-1]["ranks"])
    shown = sorted({round(i * (len(cuts) - 1) / (ROWS - 1)) for i in range(ROWS)})
    lines = ["", "## Ranks", "", f"Mean over the layers ({', '.join(linears)}) after a cut, and all of them together.", ""]
    lines += [f"| step | {' | '.join(linears)} | all |", "|---:" * (len(linears) + 2) + "|"]
    for record in (cuts[i] for i in shown):
        means = [sum(ranks) / len(ranks) for ranks in record["ranks"].values()]
        total = sum(map(sum, record["ranks"].values()))
        lines.append(f"| {record['step']} | {' | '.join(f'{mean:.1f}' for mean in means)} | {total} |")
    return lines


def plot(steps: Sequence[dict[str, Any]]) -> bytes | None:
    """PNG of the rank of every layer's linears after the last allocation; None for a run without one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    last = next((record for record in reversed(steps) if record.get("ranks")), None)
    if last is None:
        return None
    linears, ranks = list(last["ranks"]), list(last["ranks"].values())
    figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(ranks, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    if len(ranks[0]) <= 40:
        top = max(max(row) for row in ranks)
        for y, row in enumerate(ranks):
            for x, rank in enumerate(row):
                colour = "white" if rank > 0.6 * top else "black"
                axes.text(x, y, str(rank), ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(linears)), linears)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"ranks after step {last['step']}", fontsize=10)
    figure.colorbar(image, ax=axes, label="rank")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
