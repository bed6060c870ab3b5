"""Optimizer and learning-rate schedule of the training recipes, over NeMo's Megatron optimizer.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

import re
from unittest import mock

import megatron.core.optimizer as megatron_optimizer
from nemo.lightning import MegatronOptimizerModule
from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from nemo_ext.schedule import schedule_factor

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
B = re.compile(r"linear_out\.weight$")  # of an adapter B A
TOWER = re.compile(r"senses\.\w+\.encoder\.")
PROJECTOR = re.compile(r"senses\.\w+\.(?!encoder\.)")  # and the embedding of newlines between tiles


class WarmupSchedule(LRSchedulerModule):
    """`schedule_factor` as NeMo's scheduler module. `min_lr` and `lr` share a unit; parameter groups keep their ratios."""

    def __init__(self, max_steps: int, lr: float, min_lr: float = 0.0, warmup_steps: int = 0, schedule: str = "cosine",
                 decay_fraction: float = 0.2):  # fmt: skip
        super().__init__()
        self.max_steps, self.warmup_steps, self.schedule = max_steps, warmup_steps, schedule
        self.lr, self.min_lr, self.decay_fraction = lr, min_lr, decay_fraction

    def scheduler(self, model, optimizer):
        def factor(step: int) -> float:
            return schedule_factor(
                step, schedule=self.schedule, max_steps=self.max_steps, warmup_steps=self.warmup_steps,
                floor=self.min_lr / self.lr if self.lr else 0.0, decay_fraction=self.decay_fraction,
            )  # fmt: skip

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step", "frequency": 1},
        }


def depth_of(name: str, layer_offset: int, num_layers: int, tied: bool) -> int:
    """Depth of a parameter: 0 for the embedding, 1 + its global layer number, num_layers + 1 for what follows the layers.

    `name` is the parameter's in a pipeline stage's model chunk, whose first layer is number `layer_offset`. The last stage's
    copy of a tied embedding is called output_layer and must learn at the first stage's rate. Encoders of images and sounds are
    as deep as the embedding; their projectors, which are fresh, learn at the full rate.
    """
    if "senses." in name:
        return num_layers + 1 if ".projector." in name else 0
    if (match := LAYER.search(name)) is not None:
        return 1 + layer_offset + int(match[1])
    return 0 if "embedding" in name or (tied and "output_layer" in name) else num_layers + 1


class MegatronAdam(MegatronOptimizerModule):
    """Megatron's Adam, saved without upstream's shift of its states, and with layer-wise learning-rate decay.

    Depth d of D learns at `lr * layer_decay ** (D - d)`.

    (Howard & Ruder 2018, arXiv:1801.06146, section 3.2; Clark et al. 2020, arXiv:2003.10555.) Tied output embeddings follow the
    input embedding. `layer_decay=1` is plain Adam. Groups are the same on every rank, so that checkpoints reshard.

    `lora_plus` multiplies the learning rate of adapters' B (LoRA+, Hayou et al. 2024, arXiv:2402.12354). `tower_lr` and
    `projector_lr` are the peak learning rates of encoders of images and sounds and of their projectors; None is `lr`.
    """

    def __init__(self, config, lr_scheduler=None, layer_decay: float = 1.0, lora_plus: float = 1.0,
                 tower_lr: float | None = None, projector_lr: float | None = None):  # fmt: skip
        super().__init__(config, lr_scheduler=lr_scheduler)
        self.layer_decay, self.lora_plus, self.tower_lr, self.projector_lr = layer_decay, lora_plus, tower_lr, projector_lr

    def optimizers(self, model):
        upstream = megatron_optimizer._get_param_groups
        lr = self.config.lr
        rates = {B: self.lora_plus, TOWER: (self.tower_lr or lr) / lr, PROJECTOR: (self.projector_lr or lr) / lr}

        def layerwise_groups(model_chunks, *args, **kwargs):
            groups = upstream(model_chunks, *args, **kwargs)
            for names, ratio in rates.items():
                if ratio != 1.0:
                    groups = split_off(groups, _named(model_chunks, names), ratio)
            return groups if self.layer_decay == 1.0 else split_by_depth(groups, *_depths(model_chunks), self.layer_decay)

        with mock.patch.object(megatron_optimizer, "_get_param_groups", layerwise_groups):
            optimizers = super().optimizers(model)
        for chunk in model:
            keep_padding(chunk.module)
        return optimizers


def keep_padding(ddp) -> None:
    """Make the distributed optimizer save its states where the parameters are.

    Gradient buckets are padded at their ends. Megatron-Core 0.15 drops that padding when it gathers the states for a
    `fully_reshardable` checkpoint, but cuts them into parameters at offsets that count it: the fp32 weights and moments of
    every parameter after the first odd bucket are saved shifted, without an error. Buckets that count their padding as
    content are gathered whole.
    """
    for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]:
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.numel


def _depths(model_chunks) -> tuple[dict[int, int], int]:
    """Depth of each parameter by its id, and the deepest."""
    depths, deepest = {}, 0
    for chunk in model_chunks:
        decoder = next(module for name, module in chunk.named_modules() if name.split(".")[-1] == "decoder")
        offset = decoder.layers[0].layer_number - 1 if len(decoder.layers) else 0
        layers, tied = chunk.config.num_layers, chunk.config.share_embeddings_and_output_weights
        deepest = layers + 1
        depths.update({id(p): depth_of(name, offset, layers, tied) for name, p in chunk.named_parameters()})
    return depths, deepest


def split_by_depth(groups: list[dict], depths: dict[int, int], deepest: int, layer_decay: float) -> list[dict]:
    """Each Megatron parameter group as one group a depth, its `lr_mult` multiplied by `layer_decay ** (deepest - depth)`."""
    return [
        {
            **group,
            "params": [p for p in group["params"] if depths[id(p)] == depth],
            "lr_mult": group["lr_mult"] * layer_decay ** (deepest - depth),
        }
        for group in groups
        for depth in range(deepest + 1)
    ]


def _named(model_chunks, names: re.Pattern) -> set[int]:
    """The ids of the parameters in whose names the pattern is found."""
    return {id(p) for chunk in model_chunks for name, p in chunk.named_parameters() if names.search(name)}


def split_off(groups: list[dict], chosen: set[int], ratio: float) -> list[dict]:
    """Each Megatron parameter group as two: without the parameters `chosen`, and those with `ratio` times the learning rate."""
    return [
        {**group, "params": [p for p in group["params"] if (id(p) in chosen) == apart], "lr_mult": group["lr_mult"] * factor}
        for group in groups
        for apart, factor in ((False, 1.0), (True, ratio))
    ]
