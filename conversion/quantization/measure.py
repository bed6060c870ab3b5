"""What quantization lost: the same held-out windows through the parent and the quantized model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Loss:
    """`parent` and `quantized`: perplexities. `kl`: mean Kullback-Leibler divergence of the parent's next token distribution from
    the quantized model's, in nats. `top1`: how often both find the same token most likely. Over `tokens` positions."""

    parent: float
    quantized: float
    kl: float
    top1: float
    tokens: int

    @property
    def increase(self) -> float:
        """By how many per cent the perplexity grew."""
        return 100 * (self.quantized / self.parent - 1)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_increase_percent": self.increase}


@torch.no_grad()
def compare(parent: nn.Module, quantized: nn.Module, ids: torch.Tensor, progress: Callable[[int], None] | None = None) -> Loss:
    """Compare on windows of token ids `[n, s]`, one at a time. `progress` counts windows."""
    totals = torch.zeros(4, dtype=torch.float64)
    device = next(quantized.parameters()).device
    for done, window in enumerate(ids.to(device), 1):
        ours, theirs = (torch.log_softmax(_logits(model, window), -1) for model in (quantized, parent))
        targets = window[1:, None]
        parts = (
            -theirs.gather(1, targets).sum(),
            -ours.gather(1, targets).sum(),
            (theirs.exp() * (theirs - ours)).sum(),
            (theirs.argmax(-1) == ours.argmax(-1)).sum(),
        )
        totals += torch.stack([part.double().cpu() for part in parts])
        if progress:
            progress(done)
    count = ids.shape[0] * (ids.shape[1] - 1)
    before, after, kl, same = (float(total) / count for total in totals)
    return Loss(_exp(before), _exp(after), kl, same, count)


def _logits(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """fp32 `[s - 1, vocabulary]`: the predictions of every token but the first."""
    return model(window[None], use_cache=False).logits[0, :-1].float()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
