"""Compares a converted checkpoint with its original: the same tokens through transformers and through the Megatron model."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' logits `[b, s, vocab]` for the same tokens lie apart."""

    max_abs: float
    mean_abs: float
    largest_logit: float  # of the reference, absolute: the scale of the differences
    kl: float  # largest Kullback-Leibler divergence of a position, in nats, from the reference
    top1_agreement: float  # fraction of positions with the same most likely token

    @property
    def relative(self) -> float:
        """The largest difference as a fraction of the largest logit."""
        return self.max_abs / self.largest_logit


def logits_match(
    hf_dir: Path, nemo_dir: Path, tokens: torch.Tensor | None = None, *, seq: int = 64, seed: int = 0
) -> LogitDifference:
    """Run both checkpoints in fp32 on the same tokens and compare their logits over the real (unpadded) vocabulary.

    `tokens` is `[b, s]`, int64; without it two sequences of `seq` random ids are used. The reference is transformers with
    eager attention; the other is NeMo's Megatron model, built from `architecture.json` and loaded through Megatron's
    distributed checkpointing. One model is in memory at a time. Call from one process, not under torchrun.
    """
    from nemo_ext import platform

    platform.activate()
    import torch

    architecture = read_architecture(nemo_dir)
    if tokens is None:
        tokens = torch.randint(architecture.vocab_size, (2, seq), generator=torch.Generator().manual_seed(seed))
    reference = hf_logits(hf_dir, tokens)
    gc.collect()
    return compare(reference, nemo_logits(nemo_dir, tokens))


def compare(reference: torch.Tensor, other: torch.Tensor) -> LogitDifference:
    """Differences of two `[b, s, vocab]` fp32 logit tensors."""
    import torch

    difference = (reference - other).abs()
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (reference, other))
    return LogitDifference(
        max_abs=difference.max().item(),
        mean_abs=difference.mean().item(),
        largest_logit=reference.abs().max().item(),
        kl=(p.exp() * (p - q)).sum(-1).max().item(),
        top1_agreement=(reference.argmax(-1) == other.argmax(-1)).double().mean().item(),
    )


def read_architecture(nemo_dir: Path) -> Architecture:
    """The `architecture.json` of a converted folder; UserError if it is not one."""
    file = Path(nemo_dir) / "architecture.json"
    if not file.is_file():
        raise UserError(f"{nemo_dir} is not a converted NeMo folder: it has no architecture.json")
    return Architecture(**json.loads(file.read_text()))


def hf_logits(hf_dir: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[b, s, vocab]` of transformers' model in fp32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(tokens).logits.float()


def nemo_logits(nemo_dir: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[b, s, vocab]` of the Megatron model in fp32, padding of the vocabulary removed."""
    import torch

    architecture = read_architecture(nemo_dir)
    b, s = tokens.shape
    with single_process():
        model = load_megatron(nemo_dir, architecture, seq_length=s)
        positions = torch.arange(s, device="cuda").expand(b, s)
        mask = torch.ones(s, s, dtype=torch.bool, device="cuda").triu(1)[None, None]  # True: not attended
        with torch.inference_mode():
            logits = model(tokens.cuda(), positions, mask)
    return logits[..., : architecture.vocab_size].float().cpu()


def load_megatron(nemo_dir: Path, architecture: Architecture, seq_length: int, **overrides: Any) -> GPTModel:
    """This process's part of Megatron's GPTModel with the checkpoint's weights, fp32, in evaluation mode.

    Megatron's parallel state must be there; `overrides` are fields of the NeMo configuration that go with it, such as
    `tensor_model_parallel_size`. Raises UserError if the checkpoint does not have the model's tensors.
    """
    import fiddle
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from nemo_ext.modeling import model_config

    options = dict(params_dtype=torch.float32, bf16=False, **overrides)
    config = fiddle.build(model_config(architecture, seq_length, **options)).config
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = config.configure_model(tokenizer=None, pre_process=first, post_process=last).cuda().eval()
    wanted = {"state_dict": model.sharded_state_dict(prefix="module.")}
    loaded = dist_checkpointing.load(wanted, str(Path(nemo_dir) / "weights"))["state_dict"]
    state = {name.removeprefix("module."): value for name, value in loaded.items() if not name.endswith("_extra_state")}
    result = model.load_state_dict(state, strict=False)
    if missing := [name for name in result.missing_keys if not name.endswith("_extra_state")] + result.unexpected_keys:
        raise UserError(f"{nemo_dir} does not fit its architecture.json: {', '.join(missing[:4])}")
    return model


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Megatron's parallel state for one process, taken down afterwards unless it was there before."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from nemo_ext import platform

    # Megatron tells Transformer Engine a model's attention backend through the environment and refuses to change it
    environment = {name: os.environ.pop(name) for name in ATTENTION_VARIABLES if name in os.environ}
    own_group = not torch.distributed.is_initialized()
    own_state = not parallel_state.model_parallel_is_initialized()
    if own_group:
        torch.distributed.init_process_group(
            platform.distributed_backend(), store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    try:
        if own_state:
            parallel_state.initialize_model_parallel()
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        for name in ATTENTION_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(environment)
        if own_state:
            parallel_state.destroy_model_parallel()
        if own_group:
            torch.distributed.destroy_process_group()
