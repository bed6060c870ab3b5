"""Which versions of NVIDIA's packages this project is written for, and what is done where they differ: the one module that knows.

Two sets are meant: what pip installs from `requirements/` and what NVIDIA's container brings. Nothing is imported before it is
needed, so that `launchers/doctor.py` can read the tables where nothing is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import sys
import types

from nemo_ext.errors import RunError, UserError

CONTAINER = "nvcr.io/nvidia/nemo:26.02.01"

# Distribution: releases that this project is written for, first pip's, then the container's. A prefix stands for its releases.
WRITTEN_FOR = {
    "torch": ("2.13", "2.11"),
    "nemo_toolkit": ("2.7.3", "2.7.0"),
    "megatron-core": ("0.15.3", "0.16"),
    "nemo_run": ("0.4.0", "0.11.1"),
    "lightning": ("2.4.0",),
    "transformers": ("4.57",),
    "transformer_engine": ("2.12",),
    "nvidia-modelopt": ("0.37", "0.41"),
    "tensorrt_llm": ("1.1", "1.2"),
    "vllm": ("0.14",),
    "bitsandbytes": ("0.50",),
    "trl": ("1.16",),
}
# The redirections of training without CUDA reach into these; another release must be read before it is allowed here.
READ_FOR_CPU = {
    "nemo_toolkit": ("2.7.3", "2.7.0"),
    "megatron-core": ("0.15.3", "0.16.1"),
    "lightning": ("2.4.0",),
    "torch": ("2.13.0", "2.11.0"),
}


def matches(version: str, prefix: str) -> bool:
    """Whether `version` is `prefix` or a release, build or local version of it: 2.13.0+cpu matches 2.13, 0.15.30 not 0.15.3."""
    public = version.split("+")[0]
    return public == prefix or public.startswith(prefix + ".")


def check_cpu() -> None:
    """Raises UserError where a package is missing, or of a release that the CPU redirections were not written for."""
    for package, known in READ_FOR_CPU.items():
        try:
            found = importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{package} is not installed: run `make setup`") from None
        if found not in known:
            raise UserError(
                f"training without CUDA was written for {package} {' or '.join(known)}, found {found}: run `make setup`"
            )


def bridge() -> None:
    """Let NeMo 2.7, which was written against Megatron-Core 0.15, call 0.16 too. Call it before NeMo is imported; idempotent.

    What differs is found by looking, and nothing is done where nothing does. `let_rotary_be_called` belongs to it, for what NeMo
    builds. Handled in place: 0.16 reads `vocab_size` of a data set's tokenizer, and None is fine (`nemo_ext/data/module.py`); it
    gives layers a `padding_mask` (`nemo_ext/modeling/parallel_residual.py`).
    """
    _let_optimizer_be_built()
    _let_zarr_be_named()


def _let_optimizer_be_built() -> None:
    """Make `get_megatron_optimizer` take the arguments that NeMo gives it.

    0.16 replaced `no_weight_decay_cond`, `scale_lr_cond` and `lr_mult` by `config_overrides`, and NeMo names them also where they
    say nothing. Given nothing, both releases decay everything but biases and vectors.
    """
    import megatron.core.optimizer as optimizer

    upstream = optimizer.get_megatron_optimizer
    if "no_weight_decay_cond" in inspect.signature(upstream).parameters:
        return

    @functools.wraps(upstream)
    def get_megatron_optimizer(*args, no_weight_decay_cond=None, scale_lr_cond=None, lr_mult=1.0, **kwargs):
        if no_weight_decay_cond is not None or scale_lr_cond is not None or lr_mult != 1.0:
            raise RunError("Megatron-Core 0.16 has no conditions on weight decay and learning rate: leave optim's unset")
        return upstream(*args, **kwargs)

    get_megatron_optimizer.__signature__ = inspect.signature(get_megatron_optimizer, follow_wrapped=False)
    optimizer.get_megatron_optimizer = get_megatron_optimizer


def _let_zarr_be_named() -> None:
    """Put a module where NeMo's checkpoint classes look for 0.15's reader of zarr checkpoints, which 0.16 dropped.

    Without it they take Megatron-Core for missing, and nothing is saved asynchronously.
    """
    name = "megatron.core.dist_checkpointing.strategies.tensorstore"
    if importlib.util.find_spec(name) is not None:
        return

    class TensorStoreLoadShardedStrategy:
        def __init__(self, *args, **kwargs):
            raise RunError("checkpoints in zarr format are not read by Megatron-Core 0.16: convert them with 0.15")

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.TensorStoreLoadShardedStrategy = TensorStoreLoadShardedStrategy
    sys.modules[name] = importlib.import_module(name.rpartition(".")[0]).tensorstore = module


def let_rotary_be_called(rotary) -> None:
    """Make a rotary embedding of NeMo 2.7's take the `cp_group` that Megatron-Core 0.16 names, in place.

    It is None save under context parallelism, which NeMo refuses for the models that have such an embedding.
    """
    if "cp_group" in inspect.signature(rotary.forward).parameters:
        return
    forward = rotary.forward

    def with_group(*args, cp_group=None, **kwargs):
        if cp_group is not None:
            raise ValueError(f"{type(rotary).__name__} is not for context parallelism")
        return forward(*args, **kwargs)

    rotary.forward = with_group
