"""Attention over the row cache: grouped queries share their keys and values without copies of them."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "row_cache"


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface: query [b, h, s, d], key and value [b, g, t, d], additive mask [b, 1, s, t].

    The h/g heads of a group become further queries of one head, which is what lets g heads serve h (arXiv:2305.13245).
    Returns [b, s, h, d] and None for the weights.
    """
    b, h, s, d = query.shape
    g = key.shape[1]
    mask = attention_mask.repeat(1, 1, h // g, 1) if s > 1 and h != g else attention_mask
    grouped = query.reshape(b, g, h // g * s, d)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(b, h, s, value.shape[-1]).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make it known to transformers; return the name to load models with."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    return NAME


def mask(positions: torch.Tensor, length: int, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
    """Additive mask [b, 1, s, length] of queries at `positions` [b, s]: 0 where a key is not after its query (and within
    `window` tokens, itself counted), else the dtype's lowest number."""
    keys = torch.arange(length, device=positions.device)
    distance = positions[:, None, :, None] - keys  # [b, 1, s, length]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(visible.shape, dtype=dtype, device=positions.device).masked_fill_(~visible, torch.finfo(dtype).min)
