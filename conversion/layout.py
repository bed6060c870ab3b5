"""How Hugging Face's tensors lie inside Megatron's: fusing, interleaving of query groups, padding of the vocabulary.

Every layout is a pair of inverse functions on plain torch tensors, whatever their names and however they are sharded later:
`merge(architecture, [hugging face tensors])` gives Megatron's global tensor, `split(architecture, tensor)` gives the list
back, bit for bit. Rows are moved, columns are not; dtype and device stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ext.architecture import Architecture


@dataclass(frozen=True)
class Layout:
    """A pair of inverse functions between Hugging Face's tensors and one Megatron tensor."""

    merge: Callable[[Architecture, Sequence[Tensor]], Tensor]
    split: Callable[[Architecture, Tensor], list[Tensor]]


def _merge_qkv(a: Architecture, tensors: Sequence[Tensor]) -> Tensor:
    """Query [heads*d, ...], key and value [groups*d, ...] -> [groups * (heads/groups + 2) * d, ...], group by group.

    Each group is its queries, then its key, then its value, so that tensor parallelism cuts between groups. Weights
    ([..., h]) and biases ([...]) alike.
    """
    q, k, v = tensors
    tail = q.shape[1:]
    groups = [t.view(a.num_query_groups, -1, a.kv_channels, *tail) for t in (q, k, v)]
    return torch.cat(groups, dim=1).reshape(-1, *tail)


def _split_qkv(a: Architecture, tensor: Tensor) -> list[Tensor]:
    queries = a.num_attention_heads // a.num_query_groups
    tail = tensor.shape[1:]
    groups = tensor.view(a.num_query_groups, queries + 2, a.kv_channels, *tail)
    return [part.reshape(-1, *tail) for part in groups.split([queries, 1, 1], dim=1)]


def _merge_fused_qkv(a: Architecture, tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of all queries, then all keys, then all values (Phi-3)."""
    return _merge_qkv(a, tensors[0].split([a.attention_width, a.kv_width, a.kv_width]))


def _split_fused_qkv(a: Architecture, tensor: Tensor) -> list[Tensor]:
    return [torch.cat(_split_qkv(a, tensor))]


def _pad_vocabulary(a: Architecture, tensors: Sequence[Tensor]) -> Tensor:
    """[vocab_size, h] -> [padded_vocab_size, h]; the new rows are zero."""
    (tensor,) = tensors
    rows = a.padded_vocab_size - a.vocab_size
    return torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])]) if rows else tensor


PLAIN = Layout(lambda a, tensors: tensors[0], lambda a, tensor: [tensor])
QKV = Layout(_merge_qkv, _split_qkv)
FUSED_QKV = Layout(_merge_fused_qkv, _split_fused_qkv)
GATE_UP = Layout(lambda a, tensors: torch.cat(list(tensors)), lambda a, tensor: list(tensor.chunk(2)))
VOCABULARY = Layout(_pad_vocabulary, lambda a, tensor: [tensor[: a.vocab_size]])
