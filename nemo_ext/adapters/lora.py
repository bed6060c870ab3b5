"""NeMo's LoRA transforms, where NeMo 2.7.3's compute something else than LoRA.

The parameter names are NeMo's own (`linear_qkv.adapter.linear_in.weight`, `linear_qkv.adapter.adapter_q.linear_in.weight`), so
that its checkpoints load here and, where NeMo's layer is right, the other way round. What is put right:

- Gemma's linears with a norm behind them (`post_layernorm`): NeMo adds the adapter after the norm. It belongs before it.
- NeMo's CanonicalLoRA adds [all queries, all keys, all values] to Megatron's fused output, which is ordered group by group:
  right for a single query group only. It also needs all of q, k and v (gate and up) to be adapted, takes the query's width to be
  the hidden size, and saves gate's and up's B in pieces that only fit together again at the same tensor parallel size.
- The same pieces for an MLP without a gate, in both LoRA and CanonicalLoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.llm.gpt.model.gemma2 import TERowParallelLinearLayerNorm
from nemo.collections.llm.peft import canonical_lora, lora
from nemo.collections.llm.peft.canonical_lora import ModuleDict
from nemo.collections.llm.peft.lora import LoRALinear
from nemo.collections.llm.peft.utils import ParallelLinearAdapter, get_adapter_attributes_from_linear, is_expert_linear
from nemo.lightning.pytorch.callbacks.peft import AdapterWrapper
from torch import Tensor, nn

from nemo_ext.adapters import low_rank

# The parts of Megatron's fused linears, in their order: {linear: {part: CanonicalLoRA's target}}
PARTS = {
    "linear_qkv": {"adapter_q": "linear_q", "adapter_k": "linear_k", "adapter_v": "linear_v"},
    "linear_fc1": {"adapter_gate": "linear_fc1_gate", "adapter_up": "linear_fc1_up"},
}
TARGETS = {part: target for parts in PARTS.values() for part, target in parts.items()}


class PostNormLoRALinear(LoRALinear):
    """norm(W x + adapter(x)): [s, b, in] -> [s, b, out] for a linear that normalises its output."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with getattr(self.to_wrap, "dense", nullcontext)():  # its forward is passed by, and with it what NF4 weights need
            output, bias = super(TERowParallelLinearLayerNorm, self.to_wrap).forward(x, *args, **kwargs)
        return self.to_wrap.post_layernorm(output + self.adapter(x.contiguous()).reshape(output.shape)), bias


@dataclass(frozen=True)
class Parts:
    """How the output features of a fused linear lie: each of `groups` groups has all parts, side by side.

    `widths` are the parts' whole output features by their names, in order. Tensors are this process's: its groups, or its share
    of every part where there is one group.
    """

    widths: Mapping[str, int]
    groups: int

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Some parts' tensors [..., width] -> [..., out], zero for the other parts."""
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        some = next(iter(tensors.values()))
        lead = some.shape[:-1]
        parts = [tensors[name] if name in tensors else some.new_zeros(*lead, w // ranks) for name, w in self.widths.items()]
        return torch.cat([part.reshape(*lead, self._here(ranks), -1) for part in parts], dim=-1).reshape(*lead, -1)

    def split(self, tensor: Tensor, dim: int) -> dict[str, Tensor]:
        """Views of the parts of a tensor whose axis `dim` are the output features: two axes in them, [groups, width of each]."""
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        here = self._here(ranks)
        dim = dim % tensor.dim()
        sizes = [width // ranks // here for width in self.widths.values()]
        return dict(zip(self.widths, tensor.unflatten(dim, (here, -1)).split(sizes, dim + 1), strict=True))

    def _here(self, ranks: int) -> int:
        return self.groups // ranks if self.groups > 1 else 1


class SplitLoRALinear(AdapterWrapper):
    """A fused linear with an adapter for some or all of its parts (`ModuleDict` of `adapter_q`, ...)."""

    def __init__(self, to_wrap: nn.Module, adapter: ModuleDict, parts: Parts):
        super().__init__(to_wrap, adapter)
        self.parts = parts

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias, x = self.base_linear_forward(x, *args, **kwargs)
        if low_rank.holds(output, x, list(self.adapter.values())):
            return low_rank.add(output, x, dict(self.adapter.items()), self.parts), bias
        x = x.contiguous()
        change = self.parts.join({name: adapter(x) for name, adapter in self.adapter.items()})
        return output + change.reshape(output.shape), bias


class WholeLoRALinear(LoRALinear):
    """A linear with one adapter for all of its output."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias, x = self.base_linear_forward(x, *args, **kwargs)
        if low_rank.holds(output, x, [self.adapter]):
            return low_rank.add(output, x, {low_rank.WHOLE: self.adapter}), bias
        return output + self.adapter(x.contiguous()).reshape(output.shape), bias


@dataclass
class LoRA(lora.LoRA):
    """NeMo's LoRA: one adapter for each of Megatron's linears."""

    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        return _put_right(super().transform(m, name, prefix))


@dataclass
class CanonicalLoRA(canonical_lora.CanonicalLoRA):
    """One adapter for each linear that Hugging Face has, which is what PEFT trains, at any number of query groups.

    `target_modules` may also name `linear_qkv` and `linear_fc1`, for a model whose Hugging Face form has them in one (Phi-3).
    `ranks` and `alphas` are what single targets have instead of `dim` and `alpha`.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        targets = self.target_modules
        whole = [target for target in targets if target.endswith(tuple(PARTS))]
        self.target_modules = [target for target in targets if target not in whole]
        super().__post_init__()
        self.target_modules = targets
        for target in whole:
            self.canonical_mapping[target].add(target)

    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        if (found := self.match(m, name, prefix)) is None:
            return m
        pattern, full_name = found
        targets = self.canonical_mapping[pattern]
        if name not in PARTS or pattern in targets:
            _, _, width, *_ = get_adapter_attributes_from_linear(m)
            return _put_right(self.whole(m, self.adapter(m, width, full_name, full_name)))
        groups, shares = 1, [1, 1]
        if name == "linear_qkv":
            groups = m.config.num_query_groups
            shares = [m.config.num_attention_heads // groups, 1, 1]
        _, _, width, *_ = get_adapter_attributes_from_linear(m)
        widths = {part: width * share // sum(shares) for part, share in zip(PARTS[name], shares, strict=True)}
        adapters = {p: self.adapter(m, widths[p], p, full_name) for p, target in PARTS[name].items() if target in targets}
        return self.split(m, ModuleDict(adapters), Parts(widths, groups))

    def of(self, part: str, full_name: str) -> tuple[str, int, float]:
        """The target that a part of a linear is, its rank and its alpha."""
        target = TARGETS.get(part, full_name.rsplit(".", 1)[-1])
        return target, self.ranks.get(target, self.dim), self.alphas.get(target, self.alpha)

    def adapter(self, m: nn.Module, width: int, part: str, full_name: str) -> nn.Module:
        """The adapter of `width` of m's output features; `part` names it for NeMo, which saves some by their names."""
        input_is_parallel, in_features, _, no_sequence_comm, is_parallel = get_adapter_attributes_from_linear(m)
        _, rank, alpha = self.of(part, full_name)
        return ParallelLinearAdapter(
            in_features,
            width,
            rank,
            base_linear_name=part,
            activation="identity",
            column_init_method=self.lora_A_init_method,
            row_init_method=self.lora_B_init_method,
            input_is_parallel=input_is_parallel,
            dropout=self.dropout,
            dropout_position=self.dropout_position,
            model_parallel_config=m.config,
            alpha=alpha,
            is_expert=is_expert_linear(full_name),
            disable_sequence_parallel_comm=no_sequence_comm,
            base_linear_is_parallel=is_parallel,
        )

    def whole(self, m: nn.Module, adapter: nn.Module) -> nn.Module:
        """The linear with one adapter for all of its output."""
        return WholeLoRALinear(m, adapter)

    def split(self, m: nn.Module, adapters: ModuleDict, parts: Parts) -> nn.Module:
        """The fused linear with an adapter for some or all of its parts."""
        return SplitLoRALinear(m, adapters, parts)


def _put_right(module: nn.Module) -> nn.Module:
    if not isinstance(module, LoRALinear):
        return module
    if not module.to_wrap.config.gated_linear_unit:
        module.adapter.base_linear_name = ""  # one with linear_fc1 is saved as a gate and an up projection
    if isinstance(module.to_wrap, TERowParallelLinearLayerNorm):
        return PostNormLoRALinear(module.to_wrap, module.adapter)
    return module
