"""ggml's Q4_K, which the `gguf` package reads but does not write.

A super-block of 256 weights of a row has eight blocks of 32, weight = d sc q - dmin m (github.com/ggml-org/ggml, ggml-common.h,
block_q4_K): d and dmin in fp16; sc and m, a block's scale and offset, in six bits each, 12 bytes in all; q in four bits, 128
bytes of which every 32 hold a block in their low and the next in their high halves.
"""

from __future__ import annotations

import numpy as np

SUPER_BLOCK, BLOCK = 256, 32
LARGEST, SCALES = 15, 63  # of a code, and of a block's scale or offset
ROUNDING = (LARGEST + 1) * SCALES * 2.0**-25  # what d and dmin in fp16 may be off by however small they are, in a weight
ROUNDS = 8  # of fitting scale and offset to the codes, and the codes to them


def quantize(rows: np.ndarray) -> np.ndarray:
    """The bytes, `[n, columns / 256 * 144]` uint8, of fp32 `rows` `[n, columns]`; 256 must divide the columns.

    Each block's scale and offset are those of least squares for its codes, found in turns with the codes; in the end the codes
    are the nearest ones for the scales as they are stored.
    """
    x = rows.reshape(-1, SUPER_BLOCK // BLOCK, BLOCK).astype(np.float32)
    scale, offset = _fit(x)
    d, scales = _six_bits(scale)
    dmin, offsets = _six_bits(offset)
    step = (d[:, None] * scales)[..., None]
    low = (dmin[:, None] * offsets)[..., None]
    codes = np.rint(np.divide(x + low, step, out=np.zeros_like(x), where=step > 0)).clip(0, LARGEST).astype(np.uint8)
    halves = codes.reshape(len(codes), -1, 2, BLOCK)
    packed = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)
    first, last = np.split(scales.astype(np.uint8), 2, 1), np.split(offsets.astype(np.uint8), 2, 1)
    six = [first[0] | first[1] >> 4 << 6, last[0] | last[1] >> 4 << 6, first[1] & 15 | (last[1] & 15) << 4]
    ends = [part.astype(np.float16)[:, None].view(np.uint8) for part in (d, dmin)]
    return np.concatenate([*ends, *six, packed], 1).reshape(len(rows), -1)


def _fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset (not negative) of each block, `[n, 8]`, with the smallest squared error that was met."""
    low = np.minimum(x.min(2), 0)
    scale = (np.maximum(x.max(2), low) - low) / LARGEST
    best = (scale, -low)
    smallest = np.full(scale.shape, np.inf, np.float32)
    mean = x.mean(2)
    for _ in range(ROUNDS):
        step = scale[..., None]
        codes = np.rint(np.divide(x - low[..., None], step, out=np.zeros_like(x), where=step > 0)).clip(0, LARGEST)
        error = np.square(codes * step + low[..., None] - x).sum(2)
        better = error < smallest
        smallest = np.where(better, error, smallest)
        best = (np.where(better, scale, best[0]), np.where(better, -low, best[1]))
        centre = codes.mean(2)
        variance = np.square(codes).mean(2) - centre**2
        slope = np.divide((codes * x).mean(2) - centre * mean, variance, out=scale.copy(), where=variance > 1e-6)
        through = np.divide((codes * x).sum(2), np.square(codes).sum(2), out=scale.copy(), where=codes.any(2))
        free = mean - slope * centre
        scale, low = np.where(free > 0, through, slope), np.minimum(free, 0)  # an offset cannot be positive
        scale = np.maximum(scale, 0)
    return best


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 `[n]` of a scale that fp16 has, and the codes of `values` `[n, 8]` in units of it."""
    unit = (values.max(1) / SCALES).astype(np.float16).astype(np.float32)
    whole = np.divide(values, unit[:, None], out=np.zeros_like(values), where=unit[:, None] > 0)
    return unit, np.rint(whole).clip(0, SCALES).astype(np.uint8)
