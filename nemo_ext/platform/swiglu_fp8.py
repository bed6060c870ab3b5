"""SwiGLU and its backward pass to FP8, each in one kernel: the values in rows and in columns, and their largest.

On Hopper an FP8 product takes both operands along the dimension that it sums over, so what is quantized between two linears is
needed twice: in rows by the next product, in columns by the weight's gradient. Computed in bf16 and cast afterwards, the backward
pass of one layer of a Llama 1B moves 1.2 GB of the GPU's memory; these kernels read and write what there is once, 0.67 GB.

The values are what Transformer Engine makes of them, but for the rounding to bf16 between: FP8 of (value x scale), saturated.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

TOKENS, WIDTH, WARPS = 128, 64, 8  # of a tile, as it was checked on an H100; 64, 64, 8 was timed a quarter quicker

# Four values in fp32 to one word of FP8: to the nearest, ties to even, at most the largest finite one; NaN stays NaN. Triton's
# own cast leaves pairs in 16 bits. Where rows take such a pair and columns its bytes, as here, ptxas of CUDA 12.8 (Triton 3.6's
# own) loses pairs and stores the stack pointer's bits for them. That of CUDA 13.0 does not.
_CAST = (
    "{{ .reg .b16 low, high; cvt.rn.satfinite.{0}x2.f32 low, $2, $1; cvt.rn.satfinite.{0}x2.f32 high, $4, $3; "
    "mov.b32 $0, {{low, high}}; }}"
)
_TO_E4M3: tl.constexpr = tl.constexpr(_CAST.format("e4m3"))
_TO_E5M2: tl.constexpr = tl.constexpr(_CAST.format("e5m2"))


@triton.jit
def _cast(values, dtype: tl.constexpr):
    to: tl.constexpr = _TO_E4M3 if dtype == tl.float8e4nv else _TO_E5M2
    return tl.inline_asm_elementwise(to, "=r,r,r,r,r", [values], dtype=tl.uint8, is_pure=True, pack=4).to(dtype, bitcast=True)


@triton.jit
def _load(gate_up, tokens, width, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's tile: its tokens, its columns, which of them there are, the gates and what they are multiplied with."""
    m = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = (m[:, None] < tokens) & (n[None, :] < width)
    at = gate_up + m[:, None] * (2 * width) + n[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    return m, n, inside, gate, up


@triton.jit
def _store(values, scale, rows, columns, m, n, tokens, width, inside, COLUMNS: tl.constexpr):
    """Store a tile as FP8 at rows[m, n] and columns[n, m]."""
    scaled = _cast(values * scale, rows.dtype.element_ty)
    tl.store(rows + m[:, None] * width + n[None, :], scaled, mask=inside)
    if COLUMNS:
        tl.store(columns + n[:, None] * tokens + m[None, :], tl.trans(scaled), mask=tl.trans(inside))


@triton.jit
def _note(largest, scale, amax, inverse):
    """Raise `amax` to the tile's largest value; the first tile notes what the FP8 values are to be multiplied with."""
    tl.atomic_max(amax, largest, mask=largest > tl.load(amax))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse, 1.0 / scale)


@triton.jit
def _forward(gate_up, rows, columns, scale, amax, inverse, tokens, width,
             COLUMNS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    m, n, inside, gate, up = _load(gate_up, tokens, width, TOKENS, WIDTH)
    values = gate * tl.sigmoid(gate) * up
    by = tl.load(scale)
    _store(values, by, rows, columns, m, n, tokens, width, inside, COLUMNS)
    _note(tl.max(tl.abs(values)), by, amax, inverse)


@triton.jit
def _backward(gradient, gate_up, rows, columns, scale, amax, inverse, tokens, width,
              COLUMNS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    m, n, inside, gate, up = _load(gate_up, tokens, width, TOKENS, WIDTH)
    given = tl.load(gradient + m[:, None] * width + n[None, :], mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    to_gate = given * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    to_up = given * gate * sigmoid
    by = tl.load(scale)
    _store(to_gate, by, rows, columns, m, n, tokens, 2 * width, inside, COLUMNS)
    _store(to_up, by, rows, columns, m, n + width, tokens, 2 * width, inside, COLUMNS)
    _note(tl.maximum(tl.max(tl.abs(to_gate)), tl.max(tl.abs(to_up))), by, amax, inverse)


@functools.cache
def check() -> None:
    """Run both kernels once as this machine compiles them. Raises RuntimeError where rows and columns are not the same values."""
    gate_up = torch.linspace(-4, 4, 128 * 256, device="cuda").view(128, 256).bfloat16()
    one = torch.ones(1, device="cuda")
    made = (
        forward(gate_up, torch.float8_e4m3fn, one, one.clone(), True),
        backward(gate_up[:, :128].contiguous(), gate_up, torch.float8_e5m2, one, one.clone(), True),
    )
    for rows, columns, _ in made:
        if not torch.equal(rows.view(torch.uint8).t(), columns.view(torch.uint8)):
            raise RuntimeError(f"SwiGLU in FP8 is compiled wrongly here (Triton {triton.__version__}): train with precision=bf16")


def forward(gate_up: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, amax: torch.Tensor, columns: bool):
    """SiLU(gate) x up in FP8.

    Args:
        gate_up: [tokens, 2 x width], bf16 or fp16, contiguous: the gates, then what they are multiplied with.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        scale: [1], fp32: what the values are multiplied with.
        amax: [1], fp32, raised to the largest absolute value where that is larger.
        columns: Whether the values are needed in columns.

    Returns:
        ([tokens, width], [width, tokens] or None, [1] in fp32: 1 / scale).
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    return _run(_forward, (gate_up,), tokens, width, width, dtype, scale, amax, columns)


def backward(
    gradient: torch.Tensor, gate_up: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, amax: torch.Tensor, columns: bool
):
    """The gradient of `gate_up` in FP8, from that of the forward's values, `gradient` [tokens, width] in `gate_up`'s dtype.

    Returns:
        ([tokens, 2 x width], [2 x width, tokens] or None, [1] in fp32: 1 / scale).
    """
    tokens, width = gradient.shape
    return _run(_backward, (gradient, gate_up), tokens, width, 2 * width, dtype, scale, amax, columns)


def _run(kernel, inputs, tokens, width, wide, dtype, scale, amax, columns):
    device = scale.device
    rows = torch.empty(tokens, wide, dtype=dtype, device=device)
    in_columns = torch.empty(wide, tokens, dtype=dtype, device=device) if columns else None
    inverse = torch.empty(1, dtype=torch.float32, device=device)
    kernel[triton.cdiv(width, WIDTH), triton.cdiv(tokens, TOKENS)](
        *inputs, rows, in_columns, scale, amax, inverse, tokens, width,
        COLUMNS=columns, TOKENS=TOKENS, WIDTH=WIDTH, num_warps=WARPS,
    )  # fmt: skip
    return rows, in_columns, inverse
