"""A Hugging Face model with an adapter beside its weights: PEFT's kinds, MoE-DoRA, and QLoRA's rounded base."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_ext.errors import UserError

BLOCK = 64  # elements of a weight in NF4 with one magnitude


def with_peft(network: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter of a PEFT folder in it, unmerged; its class stays.

    Raises UserError for an adapter that lacks tensors for what it says it adapts; PEFT raises its own errors for others.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys")  # said of every AdaLoRA adapter, and used
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(network, folder).base_model.model
        except UserWarning as error:
            raise UserError(f"{folder} lacks tensors of what it adapts: it is incomplete or for another base") from error


@dataclass(frozen=True)
class Experts:
    """DoRA experts of one linear `[out, in]`: `a` [E, rank, in], `b` [E, out, rank], `magnitude` [E, out], `router` [E, in].

    A plain DoRA is one expert without a router.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor
    router: Tensor | None
    scale: float
    top_k: int


class ExpertLinear(nn.Module):
    """A linear with `Experts`, by the equations of `nemo_ext.adapters.moe_dora`, for use and not for training."""

    def __init__(self, linear: nn.Linear, experts: Experts) -> None:
        super().__init__()
        place = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        self.linear, self.top_k = linear, experts.top_k
        a, b = (each.to(linear.weight.device).float() for each in (experts.a, experts.b))
        whole = (linear.weight.float() + experts.scale * each for each in (up @ down for up, down in zip(b, a, strict=True)))
        lengths = torch.stack([torch.linalg.vector_norm(each, dim=1) for each in whole])
        ratio = experts.magnitude.to(lengths) / lengths  # [E, out]
        self.register_buffer("down", a.flatten(0, 1).to(**place), persistent=False)
        self.register_buffer(
            "up", (experts.scale * ratio[..., None] * b).transpose(0, 1).flatten(1).to(**place), persistent=False
        )
        self.register_buffer("stretch", (ratio - 1).to(**place), persistent=False)
        self.register_buffer("router", None if experts.router is None else experts.router.to(**place), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        output = self.linear(x)
        plain = output if self.linear.bias is None else output - self.linear.bias
        inner = F.linear(x, self.down)
        if self.router is None:
            return output + F.linear(inner, self.up) + self.stretch[0] * plain
        gate = gates(F.linear(x, self.router), self.top_k).to(x.dtype)
        inner = (inner.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(-2)
        return output + F.linear(inner, self.up) + (gate @ self.stretch) * plain


def gates(logits: Tensor, top_k: int) -> Tensor:
    """What each expert weighs, fp32: softmax probabilities of the `top_k` largest, divided by their sum, else 0."""
    probabilities = logits.float().softmax(-1)
    values, chosen = probabilities.topk(top_k, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, chosen, values / values.sum(-1, keepdim=True))


def with_experts(network: nn.Module, experts: Mapping[str, Experts]) -> nn.Module:
    """The model with experts in place of its linears, by their names. Raises UserError for linears that it does not have."""
    modules = dict(network.named_modules())
    for name, each in experts.items():
        linear, shape = modules.get(name), (each.b.shape[1], each.a.shape[2])
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
            raise UserError(f"the adapter adapts {name} {list(shape)}, which its base does not have: it is for another base")
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, ExpertLinear(linear, each))
    return network


def round_to_nf4(network: nn.Module, double_quant: bool) -> nn.Module:
    """The model with the linears of its layers rounded to NF4 by bitsandbytes and kept dequantized: QLoRA's base.

    Routers of experts, embeddings and the output stay, as in training (`nemo_ext.adapters.nf4`).
    """
    try:
        from bitsandbytes import functional as bnb
    except ImportError:
        raise UserError("a base in NF4 needs bitsandbytes, which is not installed: pip install bitsandbytes") from None
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name and not name.endswith(".gate"):
                weight = module.weight.data.contiguous()
                packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=double_quant)
                module.weight.data = bnb.dequantize_4bit(packed, state).to(weight.dtype)
    return network
