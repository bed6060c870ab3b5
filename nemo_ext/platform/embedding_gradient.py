"""The token embedding's gradient is added to the rows of the tokens, not to the whole table.

PyTorch's embedding has a dense gradient: zeros of the table's size, the tokens' rows, and, where the output layer shares the
weight, a sum with that layer's placeholder of the same size; Megatron then adds all of it to the fp32 buffer. For a table of
128,256 x 2,048 and one micro batch of 8,192 tokens that moves 5.2 GB for 67 MB of gradients. Here the backward pass adds the
tokens' rows to `weight.main_grad`, in fp32, which rounds less: the dense gradient sums equal tokens in bf16.

The sums of equal tokens are of no fixed order, so Megatron's way stays where results must repeat bit for bit
(`deterministic_mode`, NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, torch.use_deterministic_algorithms) and where there is no buffer.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch.nn import functional


class Lookup(torch.autograd.Function):
    """functional.embedding whose backward pass adds to `weight.main_grad`, and returns a placeholder as Megatron does."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.nn.Parameter, alone: bool) -> torch.Tensor:
        """[...] indices, [vocabulary, hidden] weight -> [..., hidden]. `alone`: no other layer of this chunk uses the weight."""
        ctx.save_for_backward(rows)
        ctx.weight, ctx.alone = weight, alone
        return functional.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        (rows,) = ctx.saved_tensors
        weight = ctx.weight
        total = weight.main_grad
        total.index_add_(0, rows.flatten(), gradient.flatten(0, -2).to(total.dtype))
        if not ctx.alone:
            return None, None, None  # the output layer's gradient runs Megatron's hook
        weight.grad_added_to_main_grad = True
        return None, torch.empty_like(weight), None  # for Megatron's hook, which wants a gradient and does not look at it


def install() -> None:
    """Let Megatron's vocabulary-parallel embedding add its gradient so where that holds. Imports Megatron's layers."""
    from megatron.core.tensor_parallel import layers

    upstream = layers.VocabParallelEmbedding.forward
    if hasattr(upstream, "__wrapped__"):
        return

    @functools.wraps(upstream)
    def forward(self, input_):
        if not _adds_rows(self):
            return upstream(self, input_)
        return _embed(self, input_)

    layers.VocabParallelEmbedding.forward = forward


def _adds_rows(embedding: Any) -> bool:
    weight = embedding.weight
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and hasattr(weight, "main_grad")
        and not embedding.deterministic_mode
        and not torch.are_deterministic_algorithms_enabled()
        and os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") != "0"
    )


def _embed(embedding: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Megatron's `VocabParallelEmbedding.forward`: [b, s] -> [b, s, h], or [s / tp, b, h] where it scatters sequences."""
    from megatron.core.tensor_parallel import mappings

    weight, group = embedding.weight, embedding.tp_group
    if getattr(weight, "zero_out_wgrad", False):  # tied in this chunk: zeros were wanted for a dense gradient to be added to
        weight.zero_out_wgrad, weight.tied_in_chunk = False, True
    alone = not getattr(weight, "tied_in_chunk", False)
    if group.size() == 1:
        return Lookup.apply(tokens, weight, alone)
    rows = tokens - embedding.vocab_start_index
    others = (rows < 0) | (rows >= weight.shape[0])
    embedded = Lookup.apply(rows % weight.shape[0], weight, alone)  # others' zeros are spread over the rows
    embedded = embedded.masked_fill(others.unsqueeze(-1), 0)
    if embedding.reduce_scatter_embeddings:
        return mappings.reduce_scatter_to_sequence_parallel_region(embedded.transpose(0, 1).contiguous(), group=group)
    return mappings.reduce_from_tensor_model_parallel_region(embedded, group=group)
