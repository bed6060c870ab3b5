"""Triton kernels of the output layer's cross entropy: what is done to logits between two products.

The log of the sum of exponentials is found in one pass, as in Milakov and Gimelshein 2018, "Online normalizer calculation for
softmax" (arXiv:1805.02867).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

IGNORED = -100  # a label that is not learnt: no loss and no gradient, as Transformer Engine's cross entropy has it

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def cross_entropy_statistics(
    logits, labels, log_sums, at_labels, vocabulary, first, ignored: tl.constexpr, block: tl.constexpr, gradient: tl.constexpr
):
    """One row. Its second pass begins with what the first one read last, which the caches still hold."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    wanted = label - first
    columns = tl.arange(0, block)
    blocks = tl.cdiv(vocabulary, block)
    largest = float("-inf")
    total = 0.0
    for number in range(0, blocks):
        at = number * block + columns
        x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32) * LOG2_E
        higher = tl.maximum(largest, tl.max(x))
        total = total * tl.exp2(largest - higher) + tl.sum(tl.exp2(x - higher))
        largest = higher
    log_sum = largest + tl.log2(total)
    inside = (wanted >= 0) & (wanted < vocabulary)
    tl.store(log_sums + row, log_sum / LOG2_E)
    tl.store(at_labels + row, tl.load(logits + wanted, mask=inside, other=float("-inf")).to(tl.float32))
    if gradient:
        learnt = tl.where(label == ignored, 0.0, 1.0)
        for number in range(0, blocks):
            at = (blocks - 1 - number) * block + columns
            x = tl.load(logits + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32) * LOG2_E
            found = learnt * (tl.exp2(x - log_sum) - tl.where(at == wanted, 1.0, 0.0))
            tl.store(logits + at, found.to(logits.dtype.element_ty), mask=at < vocabulary)


@triton.jit
def cross_entropy_gradient(
    logits, labels, log_sums, rows_out, columns_out, tokens, vocabulary, stride, first, ignored: tl.constexpr,
    scale: tl.constexpr, height: tl.constexpr, width: tl.constexpr, transposed: tl.constexpr,
):  # fmt: skip
    """One tile, written as it is and, with `transposed`, on its side."""
    row = tl.program_id(1) * height + tl.arange(0, height)
    column = tl.program_id(0) * width + tl.arange(0, width)
    there = row < tokens
    label = tl.load(labels + row, mask=there, other=ignored)
    log_sum = tl.load(log_sums + row, mask=there, other=0.0) * LOG2_E
    mask = there[:, None] & (column < vocabulary)[None, :]
    at = row.to(tl.int64)[:, None] * vocabulary + column[None, :]
    x = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    found = tl.exp2(x - log_sum[:, None]) - tl.where(column[None, :] == (label - first)[:, None], 1.0, 0.0)
    found = tl.where((label == ignored)[:, None], 0.0, found) * scale
    small = found.to(rows_out.dtype.element_ty)
    tl.store(rows_out + at, small, mask=mask)
    if transposed:
        tl.store(columns_out + column.to(tl.int64)[:, None] * stride + row[None, :], tl.trans(small), mask=tl.trans(mask))


def statistics(logits: torch.Tensor, labels: torch.Tensor, first: int, found: torch.Tensor, gradient: bool = False) -> None:
    """What the loss needs of each row, and with `gradient` softmax(logits) - onehot(labels) in the place of the logits.

    Args:
        logits: [tokens, vocabulary], contiguous: of the vocabulary from number `first` on.
        labels: [tokens], int64, of the whole vocabulary, or `IGNORED`.
        found: [2, tokens], fp32, rows contiguous: log sum exp of the logits; the logit at the label, -inf if it is elsewhere.
    """
    size = dict(block=32768, num_warps=32) if gradient else dict(block=8192, num_warps=8)
    cross_entropy_statistics[(len(logits),)](
        logits, labels, found[0], found[1], logits.shape[1], first, ignored=IGNORED, gradient=gradient, **size
    )


def gradient(
    logits: torch.Tensor, labels: torch.Tensor, first: int, log_sums: torch.Tensor, out: torch.Tensor,
    transposed: torch.Tensor | None = None, scale: float = 1.0,
) -> None:  # fmt: skip
    """scale (softmax(logits) - onehot(labels)), [tokens, vocabulary], into `out`, and into `transposed` on its side.

    Args:
        logits, labels, first: see `statistics`.
        log_sums: [tokens], fp32, over the whole vocabulary.
        out: [tokens, vocabulary], contiguous; may be the logits.
        transposed: [vocabulary, tokens] of `out`'s dtype, rows contiguous.
    """
    tokens, vocabulary = logits.shape
    size = dict(height=128, width=64, num_warps=4)
    grid = (triton.cdiv(vocabulary, size["width"]), triton.cdiv(tokens, size["height"]))
    aside = out if transposed is None else transposed
    cross_entropy_gradient[grid](
        logits, labels, log_sums, out, aside, tokens, vocabulary, aside.stride(0), first, ignored=IGNORED, scale=scale,
        transposed=transposed is not None, **size,
    )  # fmt: skip
