"""The platform is found, not asked: with CUDA this package changes no computation (some are made faster);
without it, the same NeMo and Megatron code runs on CPU tensors and gloo.

`activate()` is called once in a process, before anything of NeMo or Megatron is imported. It is the only place that knows
which of the two it is; everything else says "cuda" as upstream does. No numerical code of Megatron is replaced: device names
are redirected, Transformer Engine's modules are stood in for by Megatron's own local layers under the same parameter names,
and the optimizer keeps its state the way apex and Transformer Engine do, so that checkpoints move between CPU and GPU.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import warnings
from collections.abc import Iterator
from unittest import mock

from nemo_ext.platform import gpu_megatron, optimizer_shards, result_queue, versions

_active: bool | None = None


def activate() -> bool:
    """Make NeMo and Megatron importable and trainable on this machine. True where the CPU redirections were installed.

    Idempotent. Raises UserError where a package is of a version that the redirections were not written for.
    """
    global _active
    if _active is not None:
        return _active
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # tensor parallel overlap needs one hardware queue
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import numpy
    import torch

    if not hasattr(numpy, "product"):
        numpy.product = numpy.prod  # dropped by numpy 2; Megatron-Core 0.15.3 saves the checkpoints of several ranks with it
    with uncollected():
        if not torch.cuda.is_available():
            _install_cpu()
            _active = True
        else:
            if importlib.util.find_spec("megatron") is not None:  # GRPO's embedded engine does without
                _install_gpu()
            _active = False
    return _active


def _install_gpu() -> None:
    gpu_megatron.bring_weight_gradient()
    _skip_managed_memory_build()
    versions.bridge()
    gpu_megatron.let_loss_run_on()
    gpu_megatron.bring_swiglu_gradient()
    from nemo_ext.platform import embedding_gradient

    embedding_gradient.install()
    if importlib.util.find_spec("transformer_engine") is not None:
        from nemo_ext.platform import fused_mlp, rotary

        fused_mlp.install()
        rotary.install()
    result_queue.install()
    optimizer_shards.install()


def _install_cpu() -> None:
    versions.check_cpu()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's jit_fuser is torch.compile: minutes of C++ on a CPU
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from nemo_ext.platform import cpu_torch

    cpu_torch.install()
    versions.bridge()
    from nemo_ext.platform import cpu_megatron

    cpu_megatron.install()
    from nemo_ext.platform import cpu_nemo

    cpu_nemo.install()
    result_queue.install()
    optimizer_shards.install()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import without Python's garbage collector, and keep what was imported out of its later rounds.

    NeMo's modules are 800,000 objects that live as long as the process. Looking through them takes the collector a fifth of the
    import's time, and 0.4 seconds of every full round that Lightning and Megatron ask for afterwards.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _skip_managed_memory_build() -> None:
    """Import Megatron without the C++ extension that it compiles at every import: an allocator for inference in managed memory,
    which is used nowhere here."""
    from torch.utils import cpp_extension

    def refuse(*args, **kwargs):
        raise ImportError("not built: unused")

    with mock.patch.object(cpp_extension, "load_inline", refuse), warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore", UserWarning)
        import megatron.core.inference.unified_memory  # noqa: F401


def distributed_backend() -> str:
    """The torch.distributed backend of this machine."""
    return "gloo" if activate() else "nccl"
