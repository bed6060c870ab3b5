"""What a quantizer has to know of a decoder: its linear layers, which of them read the same input, and where scales can go.

A scale s on the channels of a linear layer's input is free where what writes the input can be divided by it instead: the weight
of the norm before, the rows of the value projection (attention weighs values, channel by channel), the rows of the up projection
(which multiplies the gate). Then y = (x / s)(W s)^T is computed by the same layers with other weights.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn

from nemo_ext.errors import UserError

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what runtimes compute as one product
# model_type: (the norm before gate and up, what a norm adds to its weight)
FOLDABLE = {
    "llama": ("post_attention_layernorm", 0.0),
    "mistral": ("post_attention_layernorm", 0.0),
    "qwen2": ("post_attention_layernorm", 0.0),
    "qwen3": ("post_attention_layernorm", 0.0),
    "gemma2": ("pre_feedforward_layernorm", 1.0),
    "gemma3_text": ("pre_feedforward_layernorm", 1.0),
}


@dataclass(frozen=True)
class Fold:
    """Linear layers that read one input, and what writes it: a norm, or a linear layer whose rows can be scaled.

    `offset` is what the norm adds to its weight. `repeat`: how many groups of heads read each of the writer's rows, and `head`
    the size of a head (0: row i writes channel i).
    """

    readers: tuple[nn.Linear, ...]
    writer: nn.Module
    offset: float = 0.0
    repeat: int = 1
    head: int = 0


def linears(model: nn.Module, exclude: list[str]) -> dict[str, nn.Linear]:
    """The decoder's linear layers by name, without those that a pattern of `exclude` matches (lm_head, *.down_proj, *layers.0.*).

    Raises UserError for a pattern that matches nothing or a part of what runtimes compute as one product, if nothing is left, or
    if the output layer that is left shares its weight with the embedding.
    """
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in exclude:
        if not any(_matches(name, pattern) for name in every):
            raise UserError(f"exclude={pattern} matches no linear layer: there are {', '.join(list(every)[:8])}, ...")
    left = {name: module for name, module in every.items() if not any(_matches(name, pattern) for pattern in exclude)}
    if not left:
        raise UserError("exclude= leaves no linear layer to quantize")
    for members in groups(list(every)):
        if 0 < sum(name in left for name in members) < len(members):
            raise UserError(f"{', '.join(members)} are computed as one product: exclude all of them or none")
    shared = model.get_input_embeddings().weight
    for name, module in left.items():
        if module.weight is shared:
            raise UserError(f"{name} shares its weight with the embedding and cannot be quantized alone: exclude it")
    return left


def groups(names: list[str]) -> list[tuple[str, ...]]:
    """`names` in the groups that a runtime computes as one product; the others alone."""
    found: dict[tuple[str, tuple[str, ...] | str], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        fused = next((members for members in FUSED if last in members), last)
        found.setdefault((parent, fused), []).append(name)
    return [tuple(members) for members in found.values()]


def check_smoothable(model: nn.Module) -> None:
    """Raises UserError for a model whose layers this module does not know how to scale."""
    if (kind := model.config.model_type) not in FOLDABLE:
        raise UserError(
            f"scales cannot be folded into a {kind} here ({', '.join(FOLDABLE)} can): use method=fp8, int4_gptq or nvfp4"
        )


def folds(model: nn.Module) -> list[Fold]:
    """Where scales can go, layer by layer. Raises UserError as `check_smoothable` does."""
    check_smoothable(model)
    norm, offset = FOLDABLE[model.config.model_type]
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        found += [
            Fold(qkv, layer.input_layernorm, offset),
            Fold((attention.o_proj,), attention.v_proj, repeat=heads, head=attention.head_dim),
            Fold((mlp.gate_proj, mlp.up_proj), getattr(layer, norm), offset),
            Fold((mlp.down_proj,), mlp.up_proj),
        ]
    return found


@torch.no_grad()
def apply(fold: Fold, scale: torch.Tensor, dtype: torch.dtype) -> None:
    """Multiply the readers' input channels by `scale` (fp32 [in], what ModelOpt calls pre_quant_scale) and divide their weights.

    Where several rows of heads share a writer's row they get the mean of their logarithms. A norm's weight is rounded to `dtype`,
    in which it is stored, and the readers are divided by what became of it, so that nothing but their rounding changes.
    """
    if fold.head:
        shared = scale.view(-1, fold.repeat, fold.head).log().mean(1).exp()  # [kv heads, head]
        rows, scale = shared.reshape(-1), shared[:, None].expand(-1, fold.repeat, -1).reshape(-1)
    else:
        rows = scale
    if isinstance(fold.writer, nn.Linear):
        fold.writer.weight.mul_(rows[:, None])
        if fold.writer.bias is not None:
            fold.writer.bias.mul_(rows)
    else:
        before = fold.writer.weight + fold.offset
        fold.writer.weight.copy_((before * scale - fold.offset).to(dtype))
        scale = torch.where(before == 0, scale, (fold.writer.weight + fold.offset) / before)
        if not (scale > 0).all():
            raise UserError("a norm's weight is too small to take the scales: use method=fp8, int4_gptq or nvfp4")
    for reader in fold.readers:
        reader.weight.div_(scale)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
