"""Forward and backward passes of one GPU's micro batches, under several settings of the model in one process.

    python benchmarks/micro_batch.py size=1b seq=8192 variant=bf16 variant=bf16,unfused-gradients variant=fp8 out=RESULTS.json
    python benchmarks/micro_batch.py size=8b layers=6 variant=fp8 variant=fp8,use_te_activation_func=true out=RESULTS.json

A variant is a precision (bf16, or fp8 with delayed scaling; fp8-tensorwise, fp8-blockwise) and what is changed: a field of
NeMo's configuration as NAME=VALUE, `unfused-gradients` (weight gradients are added by kernels of their own), `waiting-loss`
(the loss waits for the GPU), `micro=N` rows at once. Random weights and tokens, the same for all; no optimizer. Milliseconds
are the median of three times `count=` (8) micro batches, TFLOP/s by `Architecture.flops_per_token`; `attributed` is where two
more, under torch's profiler, spent theirs (`nemo_ext/attribution.py`), and `waits` where the host waited for the GPU in them.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import gc
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_gpu import _gpu, _versions  # noqa: E402

FIELDS = {"fp8": "delayed", "fp8-tensorwise": "tensorwise", "fp8-blockwise": "blockwise"}


def build(shape, seq: int, precision: str, changes: dict[str, Any], waiting: bool):
    """Megatron's data-parallel model of one process, on the GPU."""
    import fiddle as fdl
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.common.language_module import language_module

    from nemo_ext.modeling import model_config

    config = fdl.build(model_config(shape, seq, cross_entropy_fusion_impl="te")).config
    config.bf16, config.params_dtype, config.pipeline_dtype = True, torch.bfloat16, torch.bfloat16
    if precision != "bf16":
        config.fp8, config.fp8_recipe = "hybrid", FIELDS[precision]
        if precision == "fp8":
            config.fp8_amax_history_len, config.fp8_amax_compute_algo = 1024, "max"
    for name, value in changes.items():
        if not hasattr(config, name):
            raise SystemExit(f"{name} is no field of {type(config).__name__}")
        setattr(config, name, value)
    loss = language_module.te_parallel_cross_entropy
    build.loss = loss if hasattr(loss, "__wrapped__") else build.loss
    language_module.te_parallel_cross_entropy = build.loss.__wrapped__ if waiting else build.loss

    class Tokenizer:
        vocab_size = shape.padded_vocab_size

    torch.manual_seed(0)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return DistributedDataParallel(config, settings, config.configure_model(Tokenizer()).cuda())


def measure(variant: str, shape, options: dict[str, Any]) -> dict[str, Any]:
    """The figures of one variant."""
    import torch

    from nemo_ext import attribution
    from nemo_ext.callbacks.profile import intervals

    precision, *rest = variant.split(",")
    pairs = dict(each.split("=", 1) if "=" in each else (each, "true") for each in rest)
    micro, waiting = int(pairs.pop("micro", 1)), bool(pairs.pop("waiting-loss", False))
    changes = {name: json.loads(value) for name, value in pairs.items() if name != "unfused-gradients"}
    if "unfused-gradients" in pairs:
        changes["gradient_accumulation_fusion"] = False
    before = torch.cuda.memory_allocated()  # what Transformer Engine keeps of the variants before
    model = build(shape, options["seq"], precision, changes, waiting)
    drawn = torch.Generator("cuda").manual_seed(5)
    tokens = torch.randint(0, shape.vocab_size, (micro, options["seq"]), device="cuda", generator=drawn)
    positions = torch.arange(options["seq"], device="cuda").expand(micro, -1).contiguous()
    torch.cuda.reset_peak_memory_stats()

    def run(count: int):
        model.zero_grad_buffer()
        for _ in range(count):
            loss = model(tokens, positions, None, labels=tokens).mean()
            (loss / count).backward()
        torch.cuda.synchronize()
        return loss

    run(2), run(2)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        loss = run(options["count"])
        times.append((time.perf_counter() - began) / options["count"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run(2)
        torch.cuda.set_sync_debug_mode("default")
    waits = collections.Counter(f"{Path(each.filename).name}:{each.lineno}" for each in caught)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        began = time.time_ns()
        run(2)
        ended = time.time_ns()
    found = intervals(profiler, True)
    spent = attribution.attribute(found, began / 1e9, ended / 1e9)
    seconds = statistics.median(times)
    return {
        "ms": 1000 * seconds,
        "tflops": micro * options["seq"] / seconds * shape.flops_per_token(options["seq"]) / 1e12,
        "loss": loss.item(),
        "gradient_norm": torch.cat([buffer.grad_data.flatten() for buffer in model.buffers]).norm().item(),
        "memory_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
        "attributed": {name: 500 * value for name, value in spent.items() if value > 0},
        "longest": [(name[:120], calls / 2, 500 * total) for name, calls, total in attribution.longest(found)],
        "waits": dict(waits),
    }


def main(arguments: list[str]) -> None:
    pairs = [argument.split("=", 1) for argument in arguments]
    options = {"size": "1b", "layers": 0, "seq": 8192, "count": 8} | {
        name: value if name in ("size", "out") else int(value) for name, value in pairs if name != "variant"
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    from nemo_ext import platform

    if platform.activate():
        raise SystemExit("no GPU here")
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from recipes.models import size

    torch.distributed.init_process_group("nccl", world_size=1, rank=0)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    shape = size("llama3", options["size"]).architecture
    if options["layers"]:
        shape = dataclasses.replace(shape, num_layers=options["layers"])
    out = Path(options["out"])
    for variant in [value for name, value in pairs if name == "variant"]:
        try:
            found = measure(variant, shape, options)
        except Exception as error:  # the others go on
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
        print(variant, json.dumps({name: value for name, value in found.items() if name != "longest"}), flush=True)
        held = json.loads(out.read_text()) if out.exists() else {}
        row = {**options, "gpu": _gpu(), "date": datetime.date.today().isoformat(), "versions": _versions(), **found}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**held, f"{options['size']}-{shape.num_layers} {variant}": row}, indent=1) + "\n")
        for name in [name for name in os.environ if name.startswith("NVTE_")]:
            del os.environ[name]  # Megatron notes one model's attention backend there and refuses another's
        gc.collect()
        torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
