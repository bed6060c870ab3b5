"""NeMo 2 without CUDA: seeding, checkpoint restore and layer specs that test for a device."""

from __future__ import annotations

import random
import types

import numpy as np
import torch


def install() -> None:
    """Redirect what NeMo 2.7 does on CUDA, in this process. torch and Megatron must have been redirected before."""
    import nemo.collections.llm.gpt.model.base as gpt_base
    import nemo.collections.llm.peft.lora as lora
    import nemo.lightning.io.pl as checkpoint_io
    import nemo.lightning.megatron_init as megatron_init

    megatron_init._set_random_seed = _seed_model_parallel
    # asserts that CUDA is initialised; there is nothing to move
    checkpoint_io._fix_tensors_device = lambda state: state
    gpt_base.HAVE_TE = True  # chooses its layer spec, built from nemo_ext.platform.te_layers, and allows batches without a mask
    if hasattr(lora, "te"):  # `module.__class__ == te.Linear` raises where Transformer Engine is missing
        lora.te = types.SimpleNamespace(Linear=type("Linear", (), {}), __name__="transformer_engine.pytorch")


def _seed_model_parallel(seed: int) -> None:
    """Seed Python, numpy, torch and the model-parallel tracker: upstream skips the tracker when it counts no CUDA device."""
    from megatron.core import parallel_state, tensor_parallel

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
