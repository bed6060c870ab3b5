"""Phi-1, 1.5 and 2: parallel residual, LayerNorm, biases everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from nemo.collections import llm

from nemo_ext.modeling.gemma import tanh_gelu
from nemo_ext.modeling.parallel_residual import parallel_residual_spec


@dataclass
class PhiConfig(llm.LlamaConfig):
    """Phi-2 at any size; its GELU is the tanh approximation that Hugging Face calls gelu_new."""

    add_bias_linear: bool = True
    gated_linear_unit: bool = False
    activation_func: object = F.gelu
    transformer_layer_spec: object = parallel_residual_spec

    def __post_init__(self):
        super().__post_init__()
        self.activation_func = tanh_gelu(self)

    def configure_model(self, *args, **kwargs) -> GPTModel:
        """Megatron's model with a bias in the output layer, which it builds without."""
        model = super().configure_model(*args, **kwargs)
        if model.post_process:
            add_bias(model.output_layer)
        return model


def add_bias(linear: ColumnParallelLinear) -> None:
    """Give a column-parallel linear layer a bias of zeros, split over tensor-parallel ranks as its output is."""
    config = linear.config
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    linear.bias = torch.nn.Parameter(torch.zeros(linear.output_size_per_partition, dtype=config.params_dtype, device=device))
    set_tensor_model_parallel_attributes(linear.bias, True, 0, 1)
