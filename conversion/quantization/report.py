"""report.md and report.json of a quantized model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.quantization.formats import Format
from conversion.quantization.measure import Loss
from nemo_ext.disk import write_atomic
from nemo_ext.run_folder import write_json


@dataclass(frozen=True)
class Report:
    """Everything that is known of a quantization. Sizes in bytes of all files but the reports; `parameters` count an embedding
    that is used twice once. `layer_bits`: bits a weight of the quantized layers with their groups' scales."""

    model: str
    method: str
    format: str
    settings: Mapping[str, Any]
    plan: Mapping[str, Format]
    left: list[str]  # linear layers that are not quantized
    loss: Loss
    parent_bytes: int
    artifact_bytes: int
    parameters: int
    layer_bits: float
    checked: str
    limit: float | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.limit is None or self.loss.increase <= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "method": self.method,
            "format": self.format,
            "settings": dict(self.settings),
            "loss": self.loss.to_dict(),
            "max_ppl_increase_percent": self.limit,
            "passed": self.passed,
            "bytes": {"parent": self.parent_bytes, "artifact": self.artifact_bytes},
            "bits_per_weight": {
                "parent": 8 * self.parent_bytes / self.parameters,
                "artifact": 8 * self.artifact_bytes / self.parameters,
                "quantized_layers": self.layer_bits,
            },
            "layers": {name: form.name for name, form in self.plan.items()},
            "not_quantized": self.left,
            "verification": self.checked,
            "seconds": round(self.seconds, 1),
        }

    def markdown(self) -> str:
        """The report for people."""
        loss, parent, ours = self.loss, self.parent_bytes, self.artifact_bytes
        counts = Counter(_described(form) for form in self.plan.values())
        rows = [
            ("perplexity", f"{loss.parent:.4f}", f"{loss.quantized:.4f}", f"{loss.increase:+.2f} %"),
            ("size, MB", f"{parent / 1e6:,.1f}", f"{ours / 1e6:,.1f}", f"{100 * (ours / parent - 1):+.1f} %"),
            (
                "bits a weight, all tensors",
                f"{8 * parent / self.parameters:.2f}",
                f"{8 * ours / self.parameters:.2f}",
                f"quantized layers {self.layer_bits:.3f}",
            ),
        ]
        limit = "" if self.limit is None else f" The limit was {self.limit:g} %: {'kept' if self.passed else '**exceeded**'}."
        lines = [
            f"# {Path(self.model).name}: {self.method} as {self.format}",
            "",
            "| | parent | quantized | change |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"KL divergence from the parent {loss.kl:.5f} nats a token, the same most likely token in {100 * loss.top1:.2f} % of "
            f"{loss.tokens:,} held-out tokens.{limit}",
            "",
            f"Verification: {self.checked}.",
            "",
            "## Layers",
            "",
            *(f"- {count} linear layers: {what}" for what, count in counts.items()),
            *([f"- not quantized: {', '.join(self.left[:8])}{', ...' if len(self.left) > 8 else ''}"] if self.left else []),
            "",
            "## Settings",
            "",
            *(f"- {key}: {value}" for key, value in self.settings.items() if value is not None),
            "",
        ]
        if len(counts) > 1:
            lines += ["## Formats by layer", "", *(f"- {name}: {form.name}" for name, form in self.plan.items()), ""]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Put report.md and report.json into `folder`."""
        write_json(folder / "report.json", self.to_dict())
        write_atomic(folder / "report.md", self.markdown())


def _described(form: Format) -> str:
    group = f" in groups of {form.group}" if form.group else ""
    return f"{form.weight} weights{group}, {f'{form.activation} inputs' if form.activation else 'inputs as they are'}"
