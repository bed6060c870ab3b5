"""StableLM 2: Llama with LayerNorms; the 12B with a parallel residual and a norm of its own for each head of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import divide, make_sharded_tensor_for_checkpoint
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import transformer_engine_layer_spec
from torch import Tensor

from nemo_ext.modeling.parallel_residual import parallel_residual_spec


class HeadwiseLayerNorm(torch.nn.Module):
    """LayerNorms without bias, one for each of this rank's heads: [s, b, heads / tp, d] -> the same.

    `heads` names the field of the configuration that counts them. Each weight is a parameter, as weight decay spares vectors
    only; a checkpoint has them stacked, `[layers, heads, d]`.
    """

    def __init__(self, hidden_size: int, config, eps: float, heads: str):
        super().__init__()
        self.heads, self.eps = getattr(config, heads), eps
        local = divide(self.heads, parallel_state.get_tensor_model_parallel_world_size())
        self.first = local * parallel_state.get_tensor_model_parallel_rank()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        ones = torch.ones(local, hidden_size, dtype=config.params_dtype, device=device)
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(weight.clone()) for weight in ones)
        for weight in self.weights:
            set_tensor_model_parallel_attributes(weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * torch.stack(list(self.weights))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        axis = len(sharded_offsets)
        replica = (0, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True))
        return {
            f"{prefix}weights.{head}": make_sharded_tensor_for_checkpoint(
                weight,
                f"{prefix}weight",
                prepend_offsets=(*sharded_offsets, (axis, self.first + head, self.heads)),
                replica_id=replica,
            )
            for head, weight in enumerate(self.weights)
        }


def stablelm_spec(config) -> ModuleSpec:
    """NeMo's Transformer Engine layer, with a parallel residual and a norm for each head where the configuration says so."""
    spec = parallel_residual_spec(config) if config.parallel_residual else transformer_engine_layer_spec(config)
    if config.qk_layernorm_per_head:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = ModuleSpec(HeadwiseLayerNorm, params={"heads": "num_attention_heads"})
        attention.k_layernorm = ModuleSpec(HeadwiseLayerNorm, params={"heads": "num_query_groups"})
    return spec


@dataclass
class StableLMConfig(llm.LlamaConfig):
    """StableLM 2 at any size.

    Megatron's own `qk_layernorm` stays off: it would sum those norms' gradients over tensor-parallel ranks.
    """

    architecture_fields = ("parallel_residual", "qk_layernorm_per_head")

    normalization: str = "LayerNorm"
    parallel_residual: bool = False
    qk_layernorm_per_head: bool = False
    transformer_layer_spec: object = stablelm_spec
