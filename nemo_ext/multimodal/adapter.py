"""LoRA on an encoder's linears (Hu et al. 2021, arXiv:2106.09685): what PEFT trains of Hugging Face's module."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nemo_ext.adapters.initial import generator
from nemo_ext.multimodal.description import TOWER_LINEARS


class LinearAdapter(nn.Module):
    """B A x alpha / rank, beside a linear: `linear_in` is A `[rank, in]`, `linear_out` B `[out, rank]`, zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float, words: str):
        super().__init__()
        place = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        self.linear_in = nn.Linear(linear.in_features, rank, bias=False, **place)
        self.linear_out = nn.Linear(rank, linear.out_features, bias=False, **place)
        self.dropout, self.scale = nn.Dropout(dropout), scale
        a = torch.rand(rank, linear.in_features, generator=generator(words)).mul_(2).sub_(1).div_(math.sqrt(linear.in_features))
        with torch.no_grad():
            self.linear_in.weight.copy_(a)
            self.linear_out.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(self.linear_in(self.dropout(x))) * self.scale


def adapted(layers: nn.ModuleList) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of an encoder's layers that have an adapter, by name."""
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] in TOWER_LINEARS:
            yield name, module


def put(layers: nn.ModuleList, rank: int, scale: float, dropout: float, seed: int) -> None:
    """Give each linear of these layers an adapter, as `LINEAR.adapter`; all other names stay. A is a function of `seed`."""
    for name, linear in list(adapted(layers)):
        linear.adapter = LinearAdapter(linear, rank, scale, dropout, f"{seed} tower {name}")
        linear.register_forward_hook(_add)


def _add(linear: nn.Linear, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    return output + linear.adapter(arguments[0])
