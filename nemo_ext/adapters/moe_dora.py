"""MoE-DoRA as a NeMo transform: several DoRA experts for each linear of the last layers, and a router that mixes them.

For an input x of a linear W with bias b, experts e = 1 ... E with A_e, B_e and magnitudes m_e, and a router R `[E, in]`:

    p = softmax(R x)                                   over the experts, in fp32
    g_e = p_e / (sum of the top_k largest p)           for these top_k experts, 0 for the others
    n_e = lengths of the rows of W + s B_e A_e         constants for the gradient, as in DoRA
    y = b + sum_e g_e (m_e / n_e) (W + s B_e A_e) x    a mixture of what E DoRA models compute

Every linear of the Hugging Face model has a router of its own. As top layers learn more specific features (Gao et al. 2024,
arXiv:2402.08562), only the last `top_layers` have experts; the layers below have a plain DoRA. R and the A_e begin as
U(-1/sqrt(in), 1/sqrt(in)), B_e as zero and m_e as the lengths of W's rows, so that the model begins as its base.

The balancing loss of a router and a row of the batch is that of Fedus et al. 2021 (arXiv:2101.03961) over the row's tokens:

    E sum_e f_e P_e      f_e: share of the row's choices that are e, P_e: mean of p_e

which is 1 where the experts share the tokens. Its mean over routers and over the rows of the global batch, times `balance`, is
added to the loss: the same at every layout and size of micro batch. The filling at a row's end counts as its tokens do.

All experts work on all tokens, in one product: they are one adapter of rank E * rank, whose rank-wide space the g_e weigh.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from nemo_ext.adapters.dora import DoRA, DoRAAdapter, Matrix


class RoutedDoRAAdapter(DoRAAdapter):
    """The experts and the router of one linear of the Hugging Face model.

    A is `[experts * rank, in]`, B `[out, experts * rank]`, `weight_magnitude` fp32 `[experts, out]`, `router` `[experts, in]`.
    """

    loss_scale: ClassVar[float] = 0.0  # of the gradient of each row's balancing loss, set by `Balance` before a step

    def __init__(self, linear: nn.Module, *arguments: Any, experts: int, top_k: int):
        super().__init__(linear, *arguments, experts=experts)
        self.top_k = top_k
        self.router = Matrix((experts, self.inputs), linear)
        self.share(self.router.weight, 1 if self.input_is_parallel else None)
        self.balance: list[Tensor] = []  # the balancing losses of the rows of this step

    def gate(self, x: Tensor) -> Tensor:
        """g of the tokens that `enter` gives: [s, b, in] -> [s, b, experts]."""
        probabilities = self.enter(x, self.router()).float().softmax(-1)
        values, chosen = probabilities.topk(self.top_k, dim=-1)
        gate = torch.zeros_like(probabilities).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
        if self.training:
            choices = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
            if self.sequence_parallel:  # the loss and its gradient are the same on all ranks: each takes its tokens'
                probabilities, choices = (
                    mappings.gather_from_sequence_parallel_region(each, tensor_parallel_output_grad=False)
                    for each in (probabilities, choices)
                )
            balance = balancing_loss(probabilities, choices)
            self.balance.append(balance.detach())
            gate = _WithLoss.apply(gate, balance.sum(), RoutedDoRAAdapter.loss_scale)
        return gate.to(x.dtype)

    def weigh(self, inner: Tensor, gate: Tensor) -> Tensor:
        return (inner.unflatten(-1, (self.experts, -1)) * gate[..., None]).flatten(-2)

    def mix(self, each: Tensor, gate: Tensor) -> Tensor:
        return self.leave(gate) @ each


def balancing_loss(probabilities: Tensor, choices: Tensor) -> Tensor:
    """E sum_e f_e P_e of each row: probabilities, and choices of 0 and 1, [s, b, E] -> [b]."""
    experts = probabilities.shape[-1]
    return experts * (choices.sum(0) / choices.sum((0, -1))[:, None] * probabilities.mean(0)).sum(-1)


class _WithLoss(torch.autograd.Function):
    """Hands a tensor on, and on the way back gives `loss` the gradient `scale`."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, loss: Tensor, scale: float) -> Tensor:
        context.scale = loss.new_tensor(scale)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, context.scale, None


@dataclass
class MoEDoRA(DoRA):
    """`experts` DoRA for each linear of the last `top_layers`, of which a token gets `top_k`; a plain DoRA below."""

    experts: int = 4
    top_k: int = 2
    top_layers: int = 1
    first_layer: int = 0  # number of the model chunk's first layer, from 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} of experts={self.experts}")

    def place(self, model: nn.Module) -> None:
        """Take note of which layers Megatron's model has, and make it save them one by one: unlike ones cannot be stacked."""
        if len(model.decoder.layers):
            self.first_layer = model.decoder.layers[0].layer_number - 1
        model.config.hetereogenous_dist_checkpoint = True

    def adapter(self, m: nn.Module, width: int, part: str, full_name: str) -> nn.Module:
        number = self.first_layer + int(full_name.split("layers.")[1].split(".")[0])
        top = number >= m.config.num_layers - self.top_layers
        if not top:
            return super().adapter(m, width, part, full_name)
        settings = (*self.of(part, full_name), self.dropout)
        return RoutedDoRAAdapter(m, width, *settings, experts=self.experts, top_k=self.top_k)


class Balance(pl.Callback):
    """Gives the balancing losses their part in the gradient, and says their mean: `figures`, for the step's record.

    Megatron divides a step's gradient by the weight T of the tokens that the global batch learns, which is not known before
    all is computed: the data module is asked for it, and every row's loss is multiplied by T first.

    Args: `balance`, what the mean is multiplied by; `routers`, of the whole model; `rows`, of a global batch.
    """

    def __init__(self, balance: float, routers: int, rows: int) -> None:
        self.balance, self.routers, self.rows = balance, routers, rows
        self.figures: dict[str, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        scale = trainer.strategy.megatron_parallel.config.grad_scale_func
        scale = 1.0 if scale is None else float(scale(torch.ones(())))
        tokens = trainer.datamodule.learnt(trainer.global_step)
        RoutedDoRAAdapter.loss_scale = self.balance * scale * tokens / (self.routers * self.rows)

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        mine = [m for chunk in trainer.strategy.megatron_parallel for m in chunk.modules() if isinstance(m, RoutedDoRAAdapter)]
        losses = [loss for module in mine for loss in module.balance]
        total = torch.zeros(2, device=next(trainer.strategy.megatron_parallel.parameters()).device)
        if losses:
            total += torch.stack([torch.cat(losses).sum(), total.new_tensor(sum(map(len, losses)))])
        for module in mine:
            module.balance.clear()
        torch.distributed.all_reduce(total)
        self.figures = {"balance": float(total[0] / total[1])}
