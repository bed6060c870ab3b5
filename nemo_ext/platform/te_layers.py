"""Megatron's local layers under Transformer Engine's class and parameter names.

Checkpoints, importers, PEFT and layer specs address `linear_qkv.layer_norm_weight` and the like. With Megatron's local
layer spec those parameters have other names, and norms are silently lost on import; with these classes a model built on
a CPU has the same state dict as one built on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from nemo_ext.platform.windows import WindowedSoftmax


class _TransformerEngineFace:
    """The attributes that NeMo's PEFT reads from a Transformer Engine linear."""

    ub_overlap_ag = True  # adapters gather the sequence-parallel input themselves
    return_layernorm_output = False

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def _megatron_arguments(kwargs: dict) -> dict:
    kwargs = {k: v for k, v in kwargs.items() if k not in ("symmetric_ar_type", "parallel_mode", "name")}
    if (
        kwargs.get("init_method") is None
    ):  # vision configurations skip TransformerConfig.__post_init__; Transformer Engine's default
        kwargs["init_method"] = lambda weight: torch.nn.init.normal_(weight, std=0.023)
    return kwargs


class TEColumnParallelLinear(_TransformerEngineFace, ColumnParallelLinear):
    """Linear whose output features are split over tensor-parallel ranks."""

    def __init__(self, input_size, output_size, **kwargs):
        super().__init__(input_size, output_size, **_megatron_arguments(kwargs))


class TERowParallelLinear(_TransformerEngineFace, RowParallelLinear):
    """Linear whose input features are split over tensor-parallel ranks."""

    def __init__(self, input_size, output_size, **kwargs):
        super().__init__(input_size, output_size, **_megatron_arguments(kwargs))


class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
    """Norm, then column-parallel linear: [s, b, h] -> [s, b, output_size / tp]."""

    def __init__(self, input_size, output_size, **kwargs):
        super().__init__(input_size, output_size, **kwargs)
        config = self.config
        initial = 0.0 if config.layernorm_zero_centered_gamma else 1.0
        self.layer_norm_weight = self._norm_parameter(torch.full((input_size,), initial, dtype=config.params_dtype))
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = self._norm_parameter(torch.zeros(input_size, dtype=config.params_dtype))

    def _norm_parameter(self, value: torch.Tensor) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(value)
        parameter.sequence_parallel = self.config.sequence_parallel  # its gradient is summed over tensor-parallel ranks
        return parameter

    def forward(self, x, *args, **kwargs):
        config = self.config
        weight = self.layer_norm_weight + 1 if config.layernorm_zero_centered_gamma else self.layer_norm_weight
        if config.normalization == "LayerNorm":
            x = F.layer_norm(x, x.shape[-1:], weight, self.layer_norm_bias, config.layernorm_epsilon)
        else:
            x = F.rms_norm(x, x.shape[-1:], weight, config.layernorm_epsilon)
        output, bias = super().forward(x, *args, **kwargs)
        return ((output, x) if self.return_layernorm_output else output), bias


class TELinear(_TransformerEngineFace, torch.nn.Module):
    """A linear that every tensor-parallel rank holds whole (`parallel_mode="duplicated"`)."""

    def __init__(self, input_size, output_size, *, parallel_mode=None, config=None, init_method=None, bias=False,
                 skip_bias_add=False, **unused):  # fmt: skip
        super().__init__()
        if parallel_mode not in (None, "duplicated"):
            raise ValueError(f"TELinear is not split over ranks, got parallel_mode={parallel_mode!r}")
        self.config, self.skip_bias_add = config, skip_bias_add
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias = torch.nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype)) if bias else None

    def forward(self, x):
        if self.skip_bias_add:
            return F.linear(x, self.weight), self.bias
        return F.linear(x, self.weight, self.bias), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class TENorm:
    """LayerNorm or RMSNorm, as the configuration says."""

    def __new__(cls, config, hidden_size, eps=1e-5, **unused):
        return WrappedTorchNorm(config=config, hidden_size=hidden_size, eps=eps)


class TEDotProductAttention(DotProductAttention):
    """Unfused attention with the score matrix in memory: [s, b, heads, d] -> [s, b, heads * d]."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
                 k_channels=None, v_channels=None, cp_comm_type="p2p", pg_collection=None, **unused):  # fmt: skip
        super().__init__(config, layer_number, attn_mask_type, attention_type, attention_dropout=attention_dropout,
                         softmax_scale=softmax_scale, cp_comm_type=cp_comm_type, pg_collection=pg_collection)  # fmt: skip
        WindowedSoftmax.adopt(self.scale_mask_softmax)


class TEColumnParallelGroupedLinear(torch.nn.Module):
    """Named by layer specs, never built on a CPU: experts run one by one there."""


class TERowParallelGroupedLinear(torch.nn.Module):
    """Named by layer specs, never built on a CPU: experts run one by one there."""


class CpuSpecProvider(LocalSpecProvider):
    """The backend that Megatron's Transformer Engine layer specs are built from, on a CPU."""

    def linear(self):
        return TELinear

    def column_parallel_linear(self):
        return TEColumnParallelLinear

    def row_parallel_linear(self):
        return TERowParallelLinear

    def fuse_layernorm_and_linear(self):
        return True

    def column_parallel_layer_norm_linear(self):
        return TELayerNormColumnParallelLinear

    def layer_norm(self, rms_norm=False, for_qk=False):
        return TENorm

    def core_attention(self):
        return TEDotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm):
        return SequentialMLP, MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)


STAND_INS = {
    cls.__name__: cls
    for cls in (
        TEColumnParallelLinear,
        TERowParallelLinear,
        TELayerNormColumnParallelLinear,
        TELinear,
        TENorm,
        TEDotProductAttention,
        TEColumnParallelGroupedLinear,
        TERowParallelGroupedLinear,
    )  # fmt: skip
}


def install() -> None:
    """Put the stand-ins where Megatron's and NeMo's layer specs look for Transformer Engine."""
    import megatron.core.extensions.transformer_engine as extension
    import megatron.core.models.gpt.gpt_layer_specs as gpt_specs
    import megatron.core.models.gpt.moe_module_specs as moe_specs

    for name, cls in STAND_INS.items():
        setattr(extension, name, cls)
    gpt_specs.TESpecProvider = moe_specs.TESpecProvider = CpuSpecProvider
    gpt_specs.TENorm, gpt_specs.TEFusedMLP = TENorm, None
