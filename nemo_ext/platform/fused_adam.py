"""AdamW with the interface and state layout of apex's and Transformer Engine's FusedAdam, in plain torch.

Megatron-Core writes optimizer checkpoints for that layout (`step` in the parameter group, `exp_avg` and `exp_avg_sq` in
fp32 per parameter); torch.optim.AdamW's per-parameter `step` cannot be saved by its distributed optimizer.
Loshchilov & Hutter 2019, "Decoupled weight decay regularization" (arXiv:1711.05101).
"""

from __future__ import annotations

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled (`adam_w_mode`) or L2 weight decay over the horizontally fused `torch._foreach_*` operations."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0, **unused
    ):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None, **unused):
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            if group["params"]:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict) -> None:
        group["step"] = step = int(group.get("step", 0)) + 1
        beta1, beta2 = group["betas"]
        correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p] = {name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        grads = [p.grad for p in params]
        means = [self.state[p]["exp_avg"] for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        if self.adam_w_mode and group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, correction2**0.5)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, means, denominators, value=-group["lr"] / correction1)
