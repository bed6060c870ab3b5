"""What a decoder looks like: the plain description that recipes, the planner and conversion share.

Field names are Megatron-Core's (`TransformerConfig`), so that `dataclasses.asdict` of the common part goes
straight into a NeMo configuration. Nothing here imports torch, NeMo or Megatron.
"""

from __future__ import annotations

import dataclasses
import math
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
class LongRope:
    """LongRoPE of Phi-3 and Phi-4 (Ding et al. 2024, arXiv:2402.13753; Hugging Face `rope_type: longrope`).

    Each rotary frequency is divided by its own factor: by those of `long_factor` in a sequence of more than
    `original_max_position_embeddings` tokens, by those of `short_factor` otherwise.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def magnitude(self, max_position_embeddings: int) -> float:
        """What rotated queries and keys are multiplied by, at any length: sqrt(1 + ln(extension) / ln(original length))."""
        extension = max_position_embeddings / self.original_max_position_embeddings
        return math.sqrt(1 + math.log(extension) / math.log(self.original_max_position_embeddings)) if extension > 1 else 1.0


@dataclass(frozen=True)
class SlidingWindow:
    """Local attention in `every` - 1 layers, then one global layer (Gemma); in all layers where `every` is 0 (Mistral).

    `size` counts the tokens a position sees, itself included (Hugging Face's `sliding_window`). In Gemma 3 local layers use RoPE
    base `rotary_base_local` unscaled, global ones the architecture's base with positions divided by `global_rope_factor`; with
    `rotary_base_local` None all layers have the architecture's RoPE.
    """

    size: int
    every: int = 6
    rotary_base_local: float | None = 10_000.0
    global_rope_factor: float = 1.0

    def cuts(self, layer: int) -> bool:
        """Whether attention is local in this layer, counted from 0."""
        return not self.every or (layer + 1) % self.every != 0


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with rotary positions.

    `family` names the Hugging Face model type and decides the activation, Gemma's norm convention and its scaled embedding; the
    keys of `nemo_ext.modeling.FAMILIES` are the known ones.
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
    rotary_percent: float = 1.0  # of each head's dimensions, the first ones
    rope_scaling: RopeScaling | LongRope | None = None
    share_embeddings_and_output_weights: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    softmax_scale: float | None = None  # None: kv_channels ** -0.5
    sliding_window: SlidingWindow | None = None
    init_method_std: float = 0.02
    normalization: str = "RMSNorm"  # or "LayerNorm", which has biases
    gated_linear_unit: bool = True
    add_bias_linear: bool = False  # biases of all linear layers of the layers, those of queries, keys and values included
    add_output_bias: bool = False  # a bias of the output projection, one number a token of the vocabulary
    qk_layernorm_per_head: bool = False  # in place of qk_layernorm: each head has a LayerNorm of its own, without bias
    parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm(x)), with one norm
    attn_logit_softcapping: float | None = None  # c of c tanh(score / c), before the softmax
    final_logit_softcapping: float | None = None  # the same, of the output's logits
    num_moe_experts: int | None = None  # None: dense; otherwise every layer has this many MLPs of width ffn_hidden_size
    moe_router_topk: int | None = None  # experts that a token goes through
    moe_aux_loss_coeff: float = 0.0  # weight of the load-balancing loss of each layer, as Megatron counts it

    def __post_init__(self) -> None:
        if not self.kv_channels:
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_query_groups={self.num_query_groups}"
            )
        if (self.num_moe_experts is None) != (self.moe_router_topk is None):
            raise ValueError("num_moe_experts and moe_router_topk go together")
        if self.num_moe_experts is not None and not 0 < self.moe_router_topk <= self.num_moe_experts:
            raise ValueError(
                f"moe_router_topk={self.moe_router_topk} is not between 1 and num_moe_experts={self.num_moe_experts}"
            )
        if isinstance(self.rope_scaling, dict):
            kind = LongRope if "long_factor" in self.rope_scaling else RopeScaling
            object.__setattr__(self, "rope_scaling", kind(**self.rope_scaling))
        if isinstance(self.rope_scaling, LongRope):
            frequencies = int(self.kv_channels * self.rotary_percent) // 2
            for name in ("short_factor", "long_factor"):
                if (count := len(getattr(self.rope_scaling, name))) != frequencies:
                    raise ValueError(f"{name} has {count} factors for {frequencies} rotary frequencies")
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
        """Norms of width hidden_size in a layer (Gemma also normalises after attention and MLP)."""
        if self.parallel_residual:
            return 1
        return 4 if self.family in ("gemma2", "gemma3") else 2

    @property
    def norm_parameters(self) -> int:
        """Parameters of a norm of width hidden_size: a LayerNorm has a bias."""
        return self.hidden_size * (2 if self.normalization == "LayerNorm" else 1)

    @property
    def qk_norm_parameters(self) -> int:
        """Parameters of a layer's norms of queries and keys."""
        if self.qk_layernorm_per_head:
            return self.attention_width + self.kv_width
        return 2 * self.kv_channels if self.qk_layernorm else 0

    @property
    def mlp_parameters(self) -> int:
        """Weights of one MLP (one expert): up and down projection, and the gate."""
        return (3 if self.gated_linear_unit else 2) * self.hidden_size * self.ffn_hidden_size

    @property
    def split_bias_parameters(self) -> int:
        """Biases of a layer that tensor parallelism divides: of query, key and value, and of the MLP's first projection."""
        biases = self.attention_width + 2 * self.kv_width if self.add_qkv_bias or self.add_bias_linear else 0
        if self.add_bias_linear:
            biases += self.mlps_per_layer * (2 if self.gated_linear_unit else 1) * self.ffn_hidden_size
        return biases

    @property
    def whole_bias_parameters(self) -> int:
        """Biases of a layer that every tensor-parallel rank holds: of the attention's and the MLP's output."""
        return (1 + self.mlps_per_layer) * self.hidden_size if self.add_bias_linear else 0

    @property
    def mlps_per_layer(self) -> int:
        """MLPs that a layer has: its experts, or one."""
        return self.num_moe_experts or 1

    @property
    def active_mlps_per_layer(self) -> int:
        """MLPs that a token goes through in a layer: the router's choice, or the only one."""
        return self.moe_router_topk or 1

    @property
    def router_parameters(self) -> int:
        """Parameters of a layer's router, which scores the experts; 0 without experts."""
        return self.hidden_size * (self.num_moe_experts or 0)

    def layer_parameters(self) -> int:
        """Parameters of one transformer layer, all experts included."""
        h = self.hidden_size
        attention = h * (self.attention_width + 2 * self.kv_width) + self.attention_width * h
        mlps = self.mlps_per_layer * self.mlp_parameters + self.router_parameters
        norms = self.norms_per_layer * self.norm_parameters + self.qk_norm_parameters
        return attention + mlps + norms + self.split_bias_parameters + self.whole_bias_parameters

    def num_parameters(self) -> int:
        """All parameters, embeddings included, without vocabulary padding (what Hugging Face reports)."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.share_embeddings_and_output_weights else 2)
        embeddings += self.vocab_size if self.add_output_bias else 0
        return self.num_layers * self.layer_parameters() + self.norm_parameters + embeddings

    def num_active_parameters(self) -> int:
        """The parameters that one token uses: of the experts, only those it is routed to."""
        unused = self.mlps_per_layer - self.active_mlps_per_layer
        return self.num_parameters() - self.num_layers * unused * self.mlp_parameters

    def flops_per_token(self, seq: int, adapter: int | None = None) -> float:
        """Floating-point operations a trained token costs, forward and backward, without recomputation.

        With the weights frozen, for an adapter of so many parameters: theirs have no gradient, only their inputs.

        Two per multiply-add, backward twice forward; causal attention counted at half its square; sliding-window layers at
        the window; of the experts those that a token goes through; the output projection included, the embedding lookup not.
        This is the one formula behind every TFLOP/s figure of the project.
        """
        h = self.hidden_size
        gemms = h * (self.attention_width + 2 * self.kv_width) + self.attention_width * h
        gemms += self.active_mlps_per_layer * self.mlp_parameters + self.router_parameters
        attended = [seq / 2] * self.num_layers
        if (window := self.sliding_window) is not None:
            attended = [min(window.size, seq / 2) if window.cuts(i) else seq / 2 for i in range(self.num_layers)]
        attention = sum(2 * self.attention_width * n for n in attended)  # scores and weighted values
        weights = self.num_layers * gemms + h * self.vocab_size
        if adapter is not None:
            return 4.0 * weights + 6.0 * (attention + adapter)
        return 6.0 * (weights + attention)

    def to_dict(self) -> dict:
        """JSON-ready form; `Architecture(**d)` reads it back."""
        return dataclasses.asdict(self)
