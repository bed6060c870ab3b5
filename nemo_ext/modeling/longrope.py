"""LongRoPE, the rotary positions of Phi-3's and Phi-4's long contexts (Ding et al. 2024, arXiv:2402.13753)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from nemo.collections.llm.gpt.model.base import transformer_engine_layer_spec
from nemo.collections.llm.gpt.model.phi3mini import Phi3Config
from torch import Tensor


class LongRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding with a factor for each frequency, chosen by the length of the sequence."""

    def __init__(self, short_factor: list[float], long_factor: list[float], original_length: int, **kwargs):
        super().__init__(**kwargs)
        self.original_length = original_length
        self.factors = {"short": torch.tensor(short_factor), "long": torch.tensor(long_factor)}

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles `[max_seq_len, rotary dimensions / 2]`, fp32."""
        factors = self.factors["long" if max_seq_len > self.original_length else "short"].to(self.inv_freq.device)
        positions = torch.arange(offset, offset + max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        return torch.outer(positions, self.inv_freq / factors)


class LongRopeAttention(SelfAttention):
    """Self-attention with LongRoPE's magnitude: rotated queries and keys are both longer by it.

    Megatron's rotary embedding passes angles, so the scores get the square through the rotated dimensions of the queries.
    """

    def get_query_key_value_tensors(self, *args, **kwargs):
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        rotated = int(query.shape[-1] * self.config.rotary_percent)
        scale = query.new_ones(query.shape[-1])
        scale[:rotated] = self.config.rope_magnitude**2
        return query * scale, key, value


def longrope_spec(config) -> ModuleSpec:
    """NeMo's Transformer Engine layer with `LongRopeAttention`."""
    spec = transformer_engine_layer_spec(config)
    spec.submodules.self_attention.module = LongRopeAttention
    return spec


@dataclass
class LongRopeConfig(Phi3Config):
    """Phi-3 and Phi-4-mini with LongRoPE."""

    rope_short_factor: list[float] = field(default_factory=list)
    rope_long_factor: list[float] = field(default_factory=list)
    rope_original_length: int = 4096
    rope_magnitude: float = 1.0
    transformer_layer_spec: object = longrope_spec

    def configure_model(self, *args, **kwargs) -> GPTModel:
        """Megatron's model with `LongRotaryEmbedding`."""
        model = super().configure_model(*args, **kwargs)
        model.rotary_pos_emb = LongRotaryEmbedding(
            self.rope_short_factor,
            self.rope_long_factor,
            self.rope_original_length,
            kv_channels=self.kv_channels,
            rotary_percent=self.rotary_percent,
            rotary_interleaved=self.rotary_interleaved,
            seq_len_interpolation_factor=self.seq_len_interpolation_factor,
            rotary_base=self.rotary_base,
            use_cpu_initialization=self.use_cpu_initialization,
        )
        return model
