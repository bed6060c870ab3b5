"""The model families and their published sizes, as data.

Shapes are those of the Hugging Face checkpoints named beside them (`config.json` of each); `hub` is looked up in Hugging
Face's local cache when a recipe is given no `model=`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nemo_ext.architecture import Architecture, RopeScaling, SlidingWindow
from nemo_ext.errors import UserError


@dataclass(frozen=True)
class Size:
    """One published size of a family: its shape and the checkpoint that has it ("" where none is published)."""

    architecture: Architecture
    hub: str = ""


@dataclass(frozen=True)
class Family:
    """A model family: what `recipe=METHOD_FAMILY` selects."""

    description: str
    sizes: dict[str, Size] = field(default_factory=dict)
    default_size: str = ""


EMBEDDED = "smollm2"  # the model whose weights a Python package ships: `size=smoke` of llama3


def _llama3(layers: int, hidden: int, ffn: int, heads: int, rope_factor: float, tied: bool = False) -> Architecture:
    return Architecture(
        "llama", layers, hidden, ffn, heads, num_query_groups=8, vocab_size=128256, max_position_embeddings=131072,
        rotary_base=500_000.0, rope_scaling=RopeScaling(rope_factor), share_embeddings_and_output_weights=tied,
    )  # fmt: skip


def _gemma3(layers, hidden, ffn, heads, groups, head_dim, window, rope_factor=8.0, vocab=262208, scale=None) -> Architecture:
    return Architecture(
        "gemma3", layers, hidden, ffn, heads, groups, vocab, kv_channels=head_dim, layernorm_epsilon=1e-6,
        max_position_embeddings=131072, rotary_base=1_000_000.0, share_embeddings_and_output_weights=True, qk_layernorm=True,
        softmax_scale=(scale or head_dim) ** -0.5, sliding_window=SlidingWindow(window, global_rope_factor=rope_factor),
    )  # fmt: skip


def _qwen25(layers, hidden, ffn, heads, groups, vocab=152064, tied=False, epsilon=1e-6, context=131072) -> Architecture:
    return Architecture(
        "qwen2", layers, hidden, ffn, heads, groups, vocab, layernorm_epsilon=epsilon, max_position_embeddings=context,
        rotary_base=1_000_000.0, share_embeddings_and_output_weights=tied, add_qkv_bias=True,
    )  # fmt: skip


def _qwen3(layers, hidden, ffn, heads, tied=False) -> Architecture:
    return Architecture(
        "qwen3", layers, hidden, ffn, heads, num_query_groups=8, vocab_size=151936, kv_channels=128, layernorm_epsilon=1e-6,
        max_position_embeddings=40960, rotary_base=1_000_000.0, share_embeddings_and_output_weights=tied, qk_layernorm=True,
    )  # fmt: skip


def _mistral(layers, hidden, vocab, context) -> Architecture:
    return Architecture(
        "mistral", layers, hidden, 14336, 32, num_query_groups=8, vocab_size=vocab, kv_channels=128,
        max_position_embeddings=context, rotary_base=1_000_000.0,
    )  # fmt: skip


def _gemma2(layers, hidden, ffn, heads, groups, head_dim=256, scale=256) -> Architecture:
    return Architecture(
        "gemma2", layers, hidden, ffn, heads, groups, vocab_size=256000, kv_channels=head_dim, layernorm_epsilon=1e-6,
        share_embeddings_and_output_weights=True, softmax_scale=scale**-0.5, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, sliding_window=SlidingWindow(4096, every=2, rotary_base_local=None),
    )  # fmt: skip


def _stablelm2(layers, hidden, ffn, groups, large=False) -> Architecture:
    return Architecture(
        "stablelm", layers, hidden, ffn, 32, groups, vocab_size=100352, max_position_embeddings=4096, normalization="LayerNorm",
        rotary_percent=0.25, add_qkv_bias=not large, parallel_residual=large, qk_layernorm_per_head=large,
    )  # fmt: skip


def _mixtral(layers, hidden, ffn, heads, context, aux_loss) -> Architecture:
    return Architecture(
        "mixtral", layers, hidden, ffn, heads, num_query_groups=8, vocab_size=32000, max_position_embeddings=context,
        rotary_base=1_000_000.0, num_moe_experts=8, moe_router_topk=2, moe_aux_loss_coeff=aux_loss,
    )  # fmt: skip


SMOLLM2_135M = Architecture(
    "llama", 30, 576, 1536, 9, num_query_groups=3, vocab_size=49152, max_position_embeddings=8192,
    rotary_base=100_000.0, share_embeddings_and_output_weights=True,
)  # fmt: skip

PHI4 = Architecture(
    "phi3", 40, 5120, 17920, 40, num_query_groups=10, vocab_size=100352, max_position_embeddings=16384, rotary_base=250_000.0
)

PHI2 = Architecture(
    "phi", 32, 2560, 10240, 32, num_query_groups=32, vocab_size=51200, max_position_embeddings=2048, normalization="LayerNorm",
    rotary_percent=0.4, gated_linear_unit=False, add_bias_linear=True, add_output_bias=True,
    parallel_residual=True,
)  # fmt: skip

# 24 layers, hidden 2048, 16 heads: 1.3 billion parameters at a vocabulary of 50,000
CUSTOM_1B3 = Architecture(
    "llama", 24, 2048, 5504, 16, num_query_groups=16, vocab_size=50_000, max_position_embeddings=2048,
    share_embeddings_and_output_weights=True,
)  # fmt: skip


def _small(architecture: Architecture) -> Size:
    """A family's kind of decoder, small enough to train from scratch on a laptop, with the embedded tokenizer's vocabulary."""
    small = dict(num_layers=4, hidden_size=256, ffn_hidden_size=768, num_attention_heads=4, num_query_groups=2, kv_channels=64)
    if (window := architecture.sliding_window) is not None:
        small["sliding_window"] = replace(window, size=64, every=min(window.every, 2), global_rope_factor=1.0)
    if architecture.softmax_scale is not None:
        small["softmax_scale"] = small["kv_channels"] ** -0.5
    return Size(replace(architecture, **small, vocab_size=SMOLLM2_135M.vocab_size, max_position_embeddings=2048))


FAMILIES = {
    "llama3": Family(
        "Llama 3.1 and 3.2",
        {
            "8b": Size(_llama3(32, 4096, 14336, 32, 8.0), "meta-llama/Llama-3.1-8B"),
            "70b": Size(_llama3(80, 8192, 28672, 64, 8.0), "meta-llama/Llama-3.1-70B"),
            "1b": Size(_llama3(16, 2048, 8192, 32, 32.0, tied=True), "meta-llama/Llama-3.2-1B"),
            "3b": Size(_llama3(28, 3072, 8192, 24, 32.0, tied=True), "meta-llama/Llama-3.2-3B"),
            "smoke": Size(SMOLLM2_135M, EMBEDDED),
        },
        "8b",
    ),
    "gemma3": Family(
        "Gemma 3, text",
        {
            "1b": Size(_gemma3(26, 1152, 6912, 4, 1, 256, 512, rope_factor=1.0, vocab=262144), "google/gemma-3-1b-pt"),
            "4b": Size(_gemma3(34, 2560, 10240, 8, 4, 256, 1024), "google/gemma-3-4b-pt"),
            "12b": Size(_gemma3(48, 3840, 15360, 16, 8, 256, 1024), "google/gemma-3-12b-pt"),
            "27b": Size(_gemma3(62, 5376, 21504, 32, 16, 128, 1024, scale=168), "google/gemma-3-27b-pt"),
        },
        "4b",
    ),
    "gemma2": Family(
        "Gemma 2",
        {
            "2b": Size(_gemma2(26, 2304, 9216, 8, 4), "google/gemma-2-2b"),
            "9b": Size(_gemma2(42, 3584, 14336, 16, 8), "google/gemma-2-9b"),
            "27b": Size(_gemma2(46, 4608, 36864, 32, 16, head_dim=128, scale=144), "google/gemma-2-27b"),
        },
        "2b",
    ),
    "mistral": Family(
        "Mistral 7B v0.3 and Mistral Nemo",
        {
            "7b": Size(_mistral(32, 4096, 32768, 32768), "mistralai/Mistral-7B-v0.3"),
            "12b": Size(_mistral(40, 5120, 131072, 128000), "mistralai/Mistral-Nemo-Base-2407"),
        },
        "7b",
    ),
    "stablelm2": Family(
        "StableLM 2",
        {
            "1.6b": Size(_stablelm2(24, 2048, 5632, 32), "stabilityai/stablelm-2-1_6b"),
            "12b": Size(_stablelm2(40, 5120, 13824, 8, large=True), "stabilityai/stablelm-2-12b"),
        },
        "1.6b",
    ),
    "phi2": Family("Phi-2", {"2.7b": Size(PHI2, "microsoft/phi-2")}, "2.7b"),
    "phi4": Family("Phi-4", {"14b": Size(PHI4, "microsoft/phi-4")}, "14b"),
    "qwen2.5": Family(
        "Qwen 2.5",
        {
            "0.5b": Size(_qwen25(24, 896, 4864, 14, 2, 151936, True, context=32768), "Qwen/Qwen2.5-0.5B"),
            "1.5b": Size(_qwen25(28, 1536, 8960, 12, 2, 151936, True), "Qwen/Qwen2.5-1.5B"),
            "3b": Size(_qwen25(36, 2048, 11008, 16, 2, 151936, True, context=32768), "Qwen/Qwen2.5-3B"),
            "7b": Size(_qwen25(28, 3584, 18944, 28, 4), "Qwen/Qwen2.5-7B"),
            "14b": Size(_qwen25(48, 5120, 13824, 40, 8, epsilon=1e-5), "Qwen/Qwen2.5-14B"),
            "32b": Size(_qwen25(64, 5120, 27648, 40, 8, epsilon=1e-5), "Qwen/Qwen2.5-32B"),
            "72b": Size(_qwen25(80, 8192, 29568, 64, 8, epsilon=1e-5), "Qwen/Qwen2.5-72B"),
        },
        "7b",
    ),
    "qwen3": Family(
        "Qwen 3, dense",
        {
            "0.6b": Size(_qwen3(28, 1024, 3072, 16, tied=True), "Qwen/Qwen3-0.6B-Base"),
            "1.7b": Size(_qwen3(28, 2048, 6144, 16, tied=True), "Qwen/Qwen3-1.7B-Base"),
            "4b": Size(_qwen3(36, 2560, 9728, 32, tied=True), "Qwen/Qwen3-4B-Base"),
            "8b": Size(_qwen3(36, 4096, 12288, 32), "Qwen/Qwen3-8B-Base"),
            "14b": Size(_qwen3(40, 5120, 17408, 40), "Qwen/Qwen3-14B-Base"),
            "32b": Size(_qwen3(64, 5120, 25600, 64), "Qwen/Qwen3-32B"),
        },
        "8b",
    ),
    "mixtral": Family(  # balancing losses of 0.02 and 0.001 in Hugging Face's count, which is not by layer
        "Mixtral, eight experts",
        {
            "8x7b": Size(_mixtral(32, 4096, 14336, 32, 32768, 0.00125), "mistralai/Mixtral-8x7B-v0.1"),
            "8x22b": Size(_mixtral(56, 6144, 16384, 48, 65536, 3.57142857143e-5), "mistralai/Mixtral-8x22B-v0.1"),
        },
        "8x7b",
    ),
    "custom": Family("a decoder of any depth, width and vocabulary", {"1b3": Size(CUSTOM_1B3)}, "1b3"),
}
for _name, _family in FAMILIES.items():
    if "smoke" not in _family.sizes:
        _family.sizes["smoke"] = _small(next(iter(_family.sizes.values())).architecture)


def size(family: str, name: str) -> Size:
    """One size of a family. Raises UserError that lists the family's sizes."""
    sizes = FAMILIES[family].sizes
    if name not in sizes:
        raise UserError(f"size={name} is not a size of {family}: {', '.join(sizes)}")
    return sizes[name]
