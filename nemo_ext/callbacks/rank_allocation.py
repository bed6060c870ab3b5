"""AdaLoRA's part of a training step: the orthogonality term, the importance of singular values, and the budget they share.

(Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3.) Steps and formulas are those of PEFT's `update_and_allocate`, called
after each optimizer step with the number of steps done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn


def budget(step: int, *, steps: int, warmup: int, final: int, interval: int, first: int, last: int) -> int | None:
    """How many singular values are left after optimizer step `step` (from 1), or None where the step allocates nothing.

    `first` of them during `warmup` steps, then a cubic fall to `last`, which is reached `final` steps before the end
    (equation 12); in between every `interval` steps.
    """
    end = steps - final
    if step <= warmup or step > end or (step < end and step % interval):
        return None
    return int((first - last) * (1 - (step - warmup) / (end - warmup)) ** 3 + last)


class RankAllocation(Callback):
    """Trains `nemo_ext.adapters.adalora.SVDAdapter` modules: adds the orthogonality term's gradient, and allocates ranks.

    The budget is shared by all layers and linears: scores are gathered over tensor and pipeline ranks, so that every rank cuts
    the same values. A cut value becomes zero in the weights and in the optimizer's fp32 copy and goes on learning until the last
    allocation, so that it may return. Statistics are buffers of the adapters and lie in the checkpoint with them.

    `figures` of the last step, which `MetricsCallback` writes: where it allocated, "budget", "ranks" {linear: [rank of each
    layer]} and "orthogonality", the mean of |P^T P - I| and |Q Q^T - I|.

    Args:
        linears: {Megatron's target: Hugging Face's name} of the adapted linears of a layer.
        num_layers: of the whole model.
        init_rank, target_rank: mean rank at the start and in the end.
        steps: all steps of the run.
        warmup, final: steps at full rank before, and at the target after the allocation.
        interval: steps between allocations.
        importance_decay, uncertainty_decay: of the moving averages (the paper's beta 1 and 2).
        orthogonality: weight of the term in the loss.
    """

    def __init__(
        self, linears: dict[str, str], num_layers: int, init_rank: int, target_rank: int, steps: int, warmup: int,
        final: int, interval: int, importance_decay: float, uncertainty_decay: float, orthogonality: float,
    ) -> None:  # fmt: skip
        self.linears, self.num_layers = linears, num_layers
        self.init_rank, self.target_rank = init_rank, target_rank
        self.steps, self.warmup, self.final, self.interval = steps, warmup, final, interval
        self.decays = (importance_decay, uncertainty_decay)
        self.orthogonality = orthogonality
        self.figures: dict[str, Any] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        chunks = list(trainer.strategy.megatron_parallel)
        self.chunks = [chunk.module for chunk in chunks]
        self.adapters = list(_adapters(chunks, list(self.linears)))
        optimizer = trainer.optimizers[0].mcore_optimizer
        optimizer.step = self._around(optimizer.step, optimizer, trainer)

    def _around(self, step: Callable[[], tuple], optimizer: Any, trainer: Any) -> Callable[[], tuple]:
        @wraps(step)
        @torch.no_grad()
        def stepped() -> tuple:
            norms = self._add_orthogonality(float(optimizer.get_loss_scale()))
            result = step()
            self._after(trainer.global_step + 1, result[0], norms, optimizer)
            return result

        return stepped

    def _add_orthogonality(self, loss_scale: float) -> Tensor:
        """Add the term's gradient to gradients that are complete otherwise; returns |P^T P - I| and |Q Q^T - I| [adapters, 2].

        The gradient of |A^T A - I| (Frobenius) is 2 A (A^T A - I) / |A^T A - I|, that of |A A^T - I| likewise.
        """
        if not self.adapters:
            return torch.zeros(0, 2)
        ranks, group = _tensor_parallel()
        grams = []
        for adapter, _, _ in self.adapters:
            left, right = adapter.left.float(), adapter.right.float()
            for name, gram in (("left", left.T @ left), ("right", right @ right.T)):
                grams.append(gram if name == adapter.sharded else gram / ranks)
        gram = torch.stack(grams)
        if ranks > 1:
            torch.distributed.all_reduce(gram, group=group)
        gram -= torch.eye(gram.shape[-1], device=gram.device)
        norms = torch.linalg.matrix_norm(gram)
        count = 2 * self.num_layers * len(self.linears)
        factors = torch.where(norms > 0, 2 * self.orthogonality * loss_scale / count / norms, 0.0)
        gram *= factors[:, None, None]
        for i, (adapter, _, _) in enumerate(self.adapters):
            adapter.left.main_grad.add_(adapter.left.float() @ gram[2 * i])
            adapter.right.main_grad.add_(gram[2 * i + 1] @ adapter.right.float())
        return norms.reshape(-1, 2)

    def _after(self, step: int, stepped: bool, norms: Tensor, optimizer: Any) -> None:
        """What follows the optimizer's step: measure, allocate, cut. `stepped` is False where fp16's gradients overflowed."""
        end = self.steps - self.final
        if step <= end:
            for chunk in self.chunks:
                _complete_parameters(chunk)
        if step < end and stepped:
            for chunk in self.chunks:
                _complete_gradients(chunk)
            self._measure()
        left = budget(
            step, steps=self.steps, warmup=self.warmup, final=self.final, interval=self.interval,
            first=self.init_rank * self.num_layers * len(self.linears),
            last=self.target_rank * self.num_layers * len(self.linears),
        )  # fmt: skip
        self.figures = {}
        if left is not None:
            table = self._gather(norms)
            scores = table[..., : self.init_rank]
            threshold = scores.flatten().kthvalue(scores.numel() - left).values
            for adapter, layer, position in self.adapters:
                adapter.kept.copy_(scores[layer, position] > threshold)
            counts = (scores > threshold).sum(-1).T.tolist()
            self.figures = {
                "budget": left,
                "ranks": dict(zip(self.linears.values(), counts, strict=True)),
                "orthogonality": table[..., self.init_rank :].mean().item(),
            }
        if left is not None or step > end:
            for adapter, _, _ in self.adapters:
                _cut(adapter.values, adapter.kept == 0, optimizer)

    def _measure(self) -> None:
        """Move the averages of |w dL/dw| and of its distance from that average on (equations 8 to 11)."""
        weights, gradients, importance, uncertainty = [], [], [], []
        for adapter, _, _ in self.adapters:
            for name, parameter in adapter.matrices():
                weights.append(parameter.float())
                gradients.append(parameter.main_grad)
                importance.append(getattr(adapter, f"{name}_importance"))
                uncertainty.append(getattr(adapter, f"{name}_uncertainty"))
        if not weights:
            return
        now = torch._foreach_mul(weights, gradients)
        torch._foreach_abs_(now)
        for averages, decay in zip((importance, uncertainty), self.decays, strict=True):
            torch._foreach_mul_(averages, decay)
            torch._foreach_add_(averages, now, alpha=1 - decay)
            if averages is importance:
                torch._foreach_sub_(now, importance)
                torch._foreach_abs_(now)

    def _gather(self, norms: Tensor) -> Tensor:
        """[layers, linears, rank + 2] of the whole model on every rank: each triplet's score, and both norms.

        A triplet scores importance times uncertainty: that of its singular value and the means over its two vectors (equation 7).
        """
        ranks, _ = _tensor_parallel()
        shape = (self.num_layers, len(self.linears), self.init_rank + 2)
        table = torch.zeros(shape, device=next(iter(self.chunks[0].parameters())).device)
        for (adapter, layer, position), norm in zip(self.adapters, norms, strict=True):
            left, values, right = (
                getattr(adapter, f"{name}_importance") * getattr(adapter, f"{name}_uncertainty") for name, _ in adapter.matrices()
            )
            means = {"left": left.sum(0) / adapter.outputs, "right": right.sum(1) / adapter.inputs}
            shared = means.pop(adapter.sharded)
            replicated = values + next(iter(means.values()))
            table[layer, position, : self.init_rank] = shared + replicated / ranks
            table[layer, position, self.init_rank :] = norm / ranks
        if (group := _model_parallel()) is not None:
            torch.distributed.all_reduce(table, group=group)
        return table


def _adapters(chunks: list[nn.Module], targets: list[str]) -> Iterator[tuple[nn.Module, int, int]]:
    """(adapter, its layer's number in the whole model, its linear's in the layer) of this process's part of the model."""
    from nemo_ext.adapters.adalora import SVDAdapter

    for chunk in chunks:
        decoder = next(module for name, module in chunk.named_modules() if name.split(".")[-1] == "decoder")
        for layer in decoder.layers:
            for module in layer.modules():
                if isinstance(module, SVDAdapter):
                    yield module, layer.layer_number - 1, targets.index(module.target)


def _tensor_parallel() -> tuple[int, Any]:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_group()


def _model_parallel() -> Any:
    """The ranks that a replica of the model is split over; None for one."""
    from megatron.core import parallel_state

    group = parallel_state.get_model_parallel_group()
    return group if torch.distributed.get_world_size(group) > 1 else None


def _complete_parameters(chunk: nn.Module) -> None:
    """Fetch now what the distributed optimizer would gather while the next step begins."""
    if chunk.ddp_config.use_distributed_optimizer and chunk.ddp_config.overlap_param_gather:
        chunk.start_param_sync(force_sync=True)


def _complete_gradients(chunk: nn.Module) -> None:
    """Gather the gradients of which the distributed optimizer reduced this rank's shard only."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for bucket_group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        group = bucket_group.intra_distributed_optimizer_instance_group
        if (ranks := torch.distributed.get_world_size(group)) == 1:
            continue
        for bucket in bucket_group.buckets:
            own = bucket.grad_data.chunk(ranks)[torch.distributed.get_rank(group)]
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _cut(parameter: nn.Parameter, cut: Tensor, optimizer: Any) -> None:
    """Zero elements of a parameter, and of the fp32 copy that the optimizer updates."""
    parameter.masked_fill_(cut, 0.0)
    if (main := getattr(parameter, "main_param", None)) is None:
        return  # fp32 parameters are their own; or another rank's shard has these elements
    cut = cut.flatten()
    if getattr(parameter, "main_param_sharded", False):
        each = getattr(optimizer, "chained_optimizers", [optimizer])
        owner = next(one for one in each if parameter in one.model_param_gbuf_map)
        own = owner._get_model_param_range_map(parameter)["param"]
        cut = cut[own.start : own.end]
    main.view(-1).masked_fill_(cut, 0.0)
