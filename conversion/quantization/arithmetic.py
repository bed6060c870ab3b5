"""The arithmetic of quantized numbers, the same on a CPU and a GPU, in the place of ModelOpt 0.37's own.

ModelOpt computes with CUDA kernels and differs from them on a CPU: there its FP8 does not saturate (what is larger than
calibrated becomes NaN), its integers are multiplied by the rounded reciprocal of a scale where formats and runtimes divide by the
scale, and NVFP4 is refused. With one arithmetic a model measures the same everywhere, and what an artifact gives can be compared
bit by bit. On a GPU torch multiplies by the rounded reciprocal where a tensor is divided by a number (and not by another tensor):
`over` divides.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from conversion.quantization.formats import E2M1, E2M1_MAX, FP8_MAX

# Halfway between neighbours of E2M1; at a tie the even code wins, so that ties at even places go down and at odd places up.
_BOUNDS = torch.tensor([(a + b) / 2 for a, b in zip(E2M1, E2M1[1:], strict=False)])


@functools.cache
def install() -> None:
    """Make ModelOpt's fake quantizers of this process compute with the functions below."""
    from modelopt.torch.quantization import tensor_quant

    def quantize(
        inputs: torch.Tensor,
        amax: torch.Tensor,
        num_bits: int = 8,
        exponent_bits: int = 0,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> torch.Tensor:
        return fake_fp8(inputs, amax) if exponent_bits == 4 else fake_int(inputs, amax, num_bits, unsigned, narrow_range)

    def dynamic_blocks(inputs: torch.Tensor, block_size: int, amax: torch.Tensor | None, *formats: int) -> torch.Tensor:
        if formats != (4, 2, 8, 4):
            raise NotImplementedError(f"dynamic blocks of {formats}")
        return fake_nvfp4(inputs, block_size, amax)

    tensor_quant.quantize_op = quantize
    tensor_quant._tensor_quant = fake_int
    tensor_quant.dynamic_block_quantize_op = dynamic_blocks


def over(x: torch.Tensor, number: float) -> torch.Tensor:
    """`x` in fp32 divided by `number`, correctly rounded on every device."""
    return x.float() / torch.full((), number, dtype=torch.float32, device=x.device)


def fake_int(
    x: torch.Tensor, amax: torch.Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> torch.Tensor:
    """`x` rounded to signed integers of `num_bits` with the scale amax / largest; `amax` broadcasts."""
    if unsigned:
        raise NotImplementedError("unsigned integers")
    largest = 2 ** (num_bits - 1) - 1
    scale = over(amax, largest)
    codes = (x.float() / scale).round().clamp(-largest - (not narrow_range), largest)
    return (codes * scale).to(x.dtype)


def fake_fp8(x: torch.Tensor, amax: torch.Tensor | None) -> torch.Tensor:
    """`x` rounded to E4M3 with the scale amax / 448 (1 without amax), larger values as the largest."""
    scale = 1.0 if amax is None else over(amax, FP8_MAX)
    rounded = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (rounded.float() * scale).to(x.dtype)


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """The codes 0 to 15 of the nearest E2M1 numbers, uint8; ties to the even code, larger values as the largest."""
    bounds = _BOUNDS.to(x.device)
    size = x.abs().contiguous()
    up, down = torch.bucketize(size, bounds, right=True), torch.bucketize(size, bounds)
    codes = torch.where(up % 2 == 0, up, down)
    return (codes + 8 * (x < 0)).to(torch.uint8)


def nvfp4_scales(x: torch.Tensor, block: int, amax: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of blocks along the last dimension, E4M3 `[..., n / block]`, and the fp32 scale of the tensor that multiplies
    them."""
    outer = over(torch.as_tensor(amax, dtype=torch.float32, device=x.device).max(), E2M1_MAX * FP8_MAX)
    largest = x.float().unflatten(-1, (-1, block)).abs().amax(-1)
    scales = (largest / (E2M1_MAX * outer)).clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    return scales, outer


def fake_nvfp4(x: torch.Tensor, block: int, amax: Any) -> torch.Tensor:
    """`x` rounded to E2M1 in blocks along the last dimension, which `block` divides."""
    scales, outer = nvfp4_scales(x, block, amax)
    step = (scales.float() * outer)[..., None]
    blocks = x.float().unflatten(-1, (-1, block))
    codes = e2m1_codes(torch.where(step > 0, blocks / step, 0.0)).int()
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=x.device)[codes]
    return (values * step).flatten(-2).to(x.dtype)
