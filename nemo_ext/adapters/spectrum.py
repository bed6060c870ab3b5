"""Where FourierFT's learnt frequencies lie, as PEFT draws them, and the matrix that they are. Does not import NeMo."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def places(outputs: int, inputs: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(u [n], v [n]): the first n of all outputs * inputs places, shuffled by torch's generator on the CPU with this seed."""
    drawn = torch.randperm(outputs * inputs, generator=torch.Generator().manual_seed(seed))[:count].clone()
    return drawn // inputs, drawn % inputs


def matrix(coefficients: Tensor, outputs: int, inputs: int, seed: int, scaling: float) -> Tensor:
    """dW `[outputs, inputs]` of these coefficients, fp32."""
    u, v = places(outputs, inputs, len(coefficients), seed)
    dense = torch.zeros(outputs, inputs)
    dense[u, v] = coefficients.float()
    return torch.fft.ifft2(dense).real * scaling
