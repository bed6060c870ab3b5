"""Adapters made by PEFT itself on the tiny models, with a B that is not zero."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

TOKENS = torch.randint(247, (2, 24), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make(base: Path, folder: Path, dtype: torch.dtype | None = None, **options) -> torch.Tensor:
    """Save a random adapter of PEFT's `LoraConfig(**options)` for the model in `base`; returns the logits with it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(load(base), LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.15)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            if dtype is not None and "lora_" in name:
                parameter.copy_(parameter.to(dtype))
    model.eval()
    with torch.inference_mode():
        logits = model(TOKENS).logits
    if dtype is not None:
        model.to(dtype)
    model.save_pretrained(folder)
    return logits


def plain_logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load(folder)(TOKENS).logits
