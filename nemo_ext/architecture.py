"""What a decoder looks like: the plain description that recipes, the planner and conversion share.

Field names are Megatron-Core's (`TransformerConfig`), so that `dataclasses.asdict` of the common part goes
straight into a NeMo configuration. Nothing here imports torch, NeMo or Megatron.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

VOCAB_MULTIPLE = 64  # embeddings are padded to this whatever the layout, so that a checkpoint reshards to any TP


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent RoPE interpolation (Hugging Face `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class SlidingWindow:
    """Gemma 3's interleaving: `every` - 1 layers of local attention, then one global layer.

    `size` counts the tokens a position sees, itself included (Hugging Face's `sliding_window`). Local layers use RoPE
    base `rotary_base_local` unscaled; global ones the architecture's base with positions divided by `global_rope_factor`.
    """

    size: int
    every: int = 6
    rotary_base_local: float = 10_000.0
    global_rope_factor: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, rotary positions and a gated MLP.

    `family` names the Hugging Face model type and decides activation, norm convention and biases:
    "llama", "qwen2", "qwen3", "phi3" or "gemma3".
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    kv_channels: int = 0  # head dimension; 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 8192
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    share_embeddings_and_output_weights: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    softmax_scale: float | None = None  # None: kv_channels ** -0.5
    sliding_window: SlidingWindow | None = None
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        if not self.kv_channels:
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_query_groups={self.num_query_groups}"
            )
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if isinstance(self.sliding_window, dict):
            object.__setattr__(self, "sliding_window", SlidingWindow(**self.sliding_window))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in a Megatron model."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def attention_width(self) -> int:
        """Columns of the query projection: heads x head dimension."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Columns of the key (or value) projection."""
        return self.num_query_groups * self.kv_channels

    @property
    def norms_per_layer(self) -> int:
        """RMSNorms of width hidden_size in a layer (Gemma 3 also normalises after attention and MLP)."""
        return 4 if self.family == "gemma3" else 2

    def layer_parameters(self) -> int:
        """Parameters of one transformer layer."""
        h = self.hidden_size
        attention = h * (self.attention_width + 2 * self.kv_width) + self.attention_width * h
        if self.add_qkv_bias:
            attention += self.attention_width + 2 * self.kv_width
        if self.qk_layernorm:
            attention += 2 * self.kv_channels
        return attention + 3 * h * self.ffn_hidden_size + self.norms_per_layer * h

    def num_parameters(self) -> int:
        """All parameters, embeddings included, without vocabulary padding (what Hugging Face reports)."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.share_embeddings_and_output_weights else 2)
        return self.num_layers * self.layer_parameters() + self.hidden_size + embeddings

    def flops_per_token(self, seq: int) -> float:
        """Floating-point operations a trained token costs, forward and backward, without recomputation.

        Two per multiply-add, backward twice forward; causal attention counted at half its square; sliding-window layers at
        the window; the output projection included, the embedding lookup not. This is the one formula behind every TFLOP/s
        figure of the project.
        """
        h = self.hidden_size
        gemms = h * (self.attention_width + 2 * self.kv_width) + self.attention_width * h + 3 * h * self.ffn_hidden_size
        attended = [seq / 2] * self.num_layers
        if (window := self.sliding_window) is not None:
            attended = [seq / 2 if (i + 1) % window.every == 0 else min(window.size, seq / 2) for i in range(self.num_layers)]
        attention = sum(2 * self.attention_width * n for n in attended)  # scores and weighted values
        forward = 2 * (self.num_layers * gemms + attention + h * self.vocab_size)
        return 3.0 * forward

    def to_dict(self) -> dict:
        """JSON-ready form; `Architecture(**d)` reads it back."""
        return dataclasses.asdict(self)
