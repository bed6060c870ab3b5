"""Micro batches or whole steps of training on one or several GPUs, under several settings in one process a GPU.

    python benchmarks/micro_batch.py size=1b seq=8192 variant=bf16 variant=fp8 variant=fp8,graphs=iteration out=RESULTS.json
    python benchmarks/micro_batch.py size=8b layers=6 variant=fp8 variant=fp8,use_te_activation_func=true out=RESULTS.json
    torchrun --standalone --nproc-per-node=2 benchmarks/micro_batch.py size=8b layers=8 optimizer=1 limit=60 \\
        variant=fp8,tp=2 variant=fp8,tp=2,tp_comm_overlap=true variant=fp8,pp=2,vp=2 out=RESULTS.json

A variant is a precision (bf16, or fp8 with delayed scaling; fp8-tensorwise, fp8-blockwise) and what is changed: tp=, pp=, vp=,
cp= (the GPUs left over are data parallel); micro=N rows at once; a field of NeMo's configuration, of Megatron's data-parallel or
of its optimizer's as NAME=VALUE; `graphs=layers` (Megatron's CUDA graphs of single layers) or `graphs=iteration` (one of all
micro batches of a step); `collect=false` (no garbage collection); `unfused-gradients` (weight gradients are added by kernels of
their own); `waiting-loss` (the loss waits for the GPU); `separate-casts` (FP8: SwiGLU in bf16, cast afterwards);
`separate-rotary` (queries, keys and values split, then rotated); `fused-output` (the output layer and the loss in one);
`fp8-output` (the same, with FP8 gradients); `flash4` (attention by FlashAttention-4).

Random weights and tokens, the same for all variants of a layout. A step is `count=` (8) micro batches of one row and, with
`optimizer=1`, the gradient norm and Adam. Milliseconds are a step's by micro batches, in the median of `steps=` (3), TFLOP/s by
`Architecture.flops_per_token`; losses and gradient norms are those of the first steps, which other settings should repeat;
`attributed` is where two more micro batches (with the optimizer: one more step), under torch's profiler, spent theirs on the
last GPU (`nemo_ext/attribution.py`; `attributed_first`: on the first), and `waits` where the host waited for the GPU in a step.
A variant that fails lets the others go on; one that takes longer than `limit=` (180) seconds writes the stacks and ends the
process.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import faulthandler
import gc
import itertools
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

from benchmarks import machine  # noqa: E402

RECIPES = {"fp8": "delayed", "fp8-tensorwise": "tensorwise", "fp8-blockwise": "blockwise"}
ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclasses.dataclass
class Variant:
    """What one measurement runs with."""

    precision: str
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    micro: int = 1
    graphs: str = ""
    collect: bool = True
    waiting: bool = False
    separate_casts: bool = False
    separate_rotary: bool = False
    output: str = "separate"
    flash: bool = False
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Variant:
        precision, *rest = text.split(",")
        pairs = dict(each.split("=", 1) if "=" in each else (each, "true") for each in rest)
        found = cls(precision)
        found.waiting = bool(pairs.pop("waiting-loss", ""))
        found.separate_casts = bool(pairs.pop("separate-casts", ""))
        found.separate_rotary = bool(pairs.pop("separate-rotary", ""))
        found.output = next((each for each in ("fused", "fp8") if pairs.pop(f"{each}-output", "")), "separate")
        found.flash = bool(pairs.pop("flash4", ""))
        if pairs.pop("unfused-gradients", ""):
            found.fields["gradient_accumulation_fusion"] = False
        for name, text in pairs.items():
            value = _value(text)
            if name in ("tp", "pp", "vp", "cp", "micro", "graphs", "collect"):
                setattr(found, name, value)
            else:
                found.fields[name] = value
        return found

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return self.tp, self.pp, self.vp, self.cp


def _value(text: str) -> Any:
    import torch

    if isinstance(getattr(torch, text, None), torch.dtype):
        return getattr(torch, text)
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


def lay_out(variant: Variant) -> None:
    """Megatron's process groups for the variant's layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=variant.tp,
        pipeline_model_parallel_size=variant.pp,
        virtual_pipeline_model_parallel_size=variant.vp if variant.vp > 1 else None,
        context_parallel_size=variant.cp,
        create_gloo_process_groups=False,
    )


def build(shape, seq: int, variant: Variant, optimizing: bool):
    """(Megatron's data-parallel model as a list of chunks, its optimizer or None) on this GPU."""
    import fiddle as fdl
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.common.language_module import language_module
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.mlp import MLP

    from nemo_ext.modeling import FAMILIES, model_config
    from nemo_ext.platform import flash_attention, output_layer, rotary

    own: dict[type, dict[str, Any]] = {DistributedDataParallelConfig: {}, OptimizerConfig: {}}
    model = dict(
        cross_entropy_fusion_impl="te", bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=variant.tp, sequence_parallel=variant.tp > 1, pipeline_model_parallel_size=variant.pp,
        virtual_pipeline_model_parallel_size=variant.vp if variant.vp > 1 else None, context_parallel_size=variant.cp,
    )  # fmt: skip
    if variant.vp > 1:
        model |= dict(overlap_p2p_comm=True, batch_p2p_comm=False)
    if variant.precision != "bf16":
        model |= dict(fp8="hybrid", fp8_recipe=RECIPES[variant.precision])
        if variant.precision == "fp8":
            model |= dict(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
        own[OptimizerConfig]["fp8_recipe"] = RECIPES[variant.precision]
    if variant.graphs == "layers":
        model |= dict(cuda_graph_impl="local")
    elif variant.graphs == "iteration":
        model |= dict(cuda_graph_scope="full_iteration")
    kinds = {**own, FAMILIES[shape.family][1]: model}
    for name, value in variant.fields.items():
        takers = [fields for kind, fields in kinds.items() if name in {each.name for each in dataclasses.fields(kind)}]
        if not takers:
            raise ValueError(f"{name} is no field of the model, the data-parallel model or the optimizer")
        for fields in takers:
            fields[name] = value
    if model.get("tp_comm_overlap"):
        share_buffers(variant, seq, shape.hidden_size)
    config = fdl.build(model_config(shape, seq, **model)).config

    if variant.waiting:
        language_module.te_parallel_cross_entropy = language_module.te_parallel_cross_entropy.__wrapped__
    if variant.separate_casts:
        MLP.forward = MLP.forward.__wrapped__
    if variant.separate_rotary:
        rotary.remove()

    class Tokenizer:
        vocab_size = shape.padded_vocab_size

    tensor_parallel.model_parallel_cuda_manual_seed(1, te_rng_tracker=True, force_reset_rng=True)  # graphs need that tracker
    settings = dict(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    ddp = DistributedDataParallelConfig(**{**settings, **own[DistributedDataParallelConfig]})
    chunks = []
    for number in range(variant.vp):
        chunk = config.configure_model(Tokenizer(), vp_stage=number if variant.vp > 1 else None).cuda()
        if variant.output != "separate":
            output_layer.use(chunk, fp8=variant.output == "fp8")
        if variant.flash:
            flash_attention.use(chunk)
        with torch.cuda.stream(torch.cuda.Stream()):  # as NeMo does: a graph must not touch the default stream
            chunks.append(DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0))
    torch.cuda.synchronize()
    if ddp.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if variant.vp > 1 else chunks[0].no_sync
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = None
    if optimizing:
        settings = dict(optimizer="adam", lr=1e-5, weight_decay=0.1, adam_beta2=0.95, bf16=True, params_dtype=torch.bfloat16,
                        use_distributed_optimizer=True, clip_grad=1.0)  # fmt: skip
        optimizer = get_megatron_optimizer(
            OptimizerConfig(**{**settings, **own[OptimizerConfig]}), chunks, use_gloo_process_groups=False
        )
        config.grad_scale_func = optimizer.scale_loss
    return chunks, optimizer


def share_buffers(variant: Variant, seq: int, width: int) -> None:
    """Transformer Engine's user buffers of a tensor-parallel group, without MPI."""
    from transformer_engine.pytorch.module import base

    mode = base.UserBufferQuantizationMode
    base.initialize_ub(
        shape=[seq * variant.micro // variant.cp, width],
        tp_size=variant.tp,
        quantization_modes=[mode.NONE if variant.precision == "bf16" else mode.FP8],
        bootstrap_backend="gloo",
    )


class Step:
    """A model's training step, called again and again."""

    def __init__(self, shape, variant: Variant, options: dict[str, Any]) -> None:
        import torch
        from megatron.core.full_cuda_graph import FullCudaGraphWrapper
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.utils import get_batch_on_this_cp_rank

        self.seq, self.micro, self.count = options["seq"], variant.micro, options["count"] // variant.micro
        self.chunks, self.optimizer = build(shape, self.seq, variant, bool(options["optimizer"]))
        tokens = torch.randint(0, shape.vocab_size, (self.micro, self.seq), generator=torch.Generator().manual_seed(5)).cuda()
        positions = torch.arange(self.seq, device="cuda").expand(self.micro, -1).contiguous()
        self.batch = {k: v.contiguous() for k, v in get_batch_on_this_cp_rank(dict(tokens=tokens, positions=positions)).items()}
        self.run_micro_batches = get_forward_backward_func()
        if variant.graphs == "iteration":
            self.run_micro_batches = FullCudaGraphWrapper(self.run_micro_batches, cuda_graph_warmup_steps=1)

    def __call__(self, count: int | None = None) -> tuple[Any, float | None]:
        """(mean loss on the last pipeline stage, gradient norm where there is an optimizer) of a step."""
        import torch

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        found = self.run_micro_batches(
            forward_step_func=self._forward,
            data_iterator=[itertools.repeat(self.batch) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=count or self.count,
            seq_length=self.seq,
            micro_batch_size=self.micro,
            forward_only=False,
        )
        loss = torch.stack([each["loss"] for each in found]).mean() if found else None
        if self.optimizer is None:
            return loss, None
        done, norm, _ = self.optimizer.step()
        assert done
        return loss, norm

    @staticmethod
    def _forward(iterator, model):
        batch = next(iterator)
        out = model(batch["tokens"], batch["positions"], None, labels=batch["tokens"])
        return out, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})


def measure(variant: Variant, shape, options: dict[str, Any]) -> dict[str, Any]:
    """The figures of one variant, the same on every rank."""
    import torch

    from nemo_ext import attribution
    from nemo_ext.callbacks.profile import intervals

    before = torch.cuda.memory_allocated()  # what Transformer Engine keeps of the variants before
    step = Step(shape, variant, options)
    torch.cuda.reset_peak_memory_stats()
    seen = []
    for _ in range(3):  # compiles, and captures graphs
        loss, norm = step()
        seen.append((loss.item() if loss is not None else None, norm if norm is not None else _norm(step.chunks)))
    if not variant.collect:
        gc.disable()
    torch.distributed.barrier()
    torch.cuda.synchronize()
    moments = [time.perf_counter()]
    for _ in range(options["steps"]):
        step()
        torch.cuda.synchronize()
        moments.append(time.perf_counter())
    gc.enable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    waits = collections.Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)
    )
    torch.distributed.barrier()
    whole = step.optimizer is not None or variant.graphs == "iteration" or variant.pp > 1
    count = step.count if whole else 2  # a graph holds all micro batches, and a pipeline fills
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        began = time.time_ns()
        step(count)
        torch.cuda.synchronize()
        ended = time.time_ns()
    kernels = intervals(profiler, True)
    spent = {name: 1000 / count * value for name, value in attribution.attribute(kernels, began / 1e9, ended / 1e9).items()}
    times = [(b - a) / step.count for a, b in itertools.pairwise(moments)]
    rows = step.count * step.micro * torch.distributed.get_world_size() // (variant.tp * variant.pp * variant.cp)
    seconds = statistics.median(times)
    flops = rows * options["seq"] * shape.flops_per_token(options["seq"])
    own = {
        "losses": [loss for loss, _ in seen],
        "gradient_norms": [norm for _, norm in seen],
        "memory_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
        "attributed": {name: value for name, value in spent.items() if value > 0},
        "longest": [(name[:120], calls / count, 1000 / count * total) for name, calls, total in attribution.longest(kernels)],
        "waits": dict(waits),
    }
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    last = everyone[-1]
    return {
        "ms": 1000 * seconds,
        "spread": max(times) / min(times) - 1,
        "tflops": flops / (seconds * step.count) / torch.distributed.get_world_size() / 1e12,
        "losses": last["losses"],
        "gradient_norms": last["gradient_norms"],
        "memory_gib": max(each["memory_gib"] for each in everyone),
        "attributed": last["attributed"],
        **({"attributed_first": everyone[0]["attributed"]} if len(everyone) > 1 else {}),
        "longest": last["longest"],
        "waits": last["waits"],
    }


def _norm(chunks: list) -> float:
    """Of this rank's gradients."""
    import torch

    return torch.stack([buffer.grad_data.norm() for chunk in chunks for buffer in chunk.buffers]).norm().item()


def forget() -> None:
    """Drop what Megatron and Transformer Engine keep of a variant beside its model."""
    import torch
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader
    from megatron.core.transformer import cuda_graphs
    from transformer_engine.pytorch.module import base
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from nemo_ext.platform import fused_mlp, gpu_megatron, rotary

    gpu_megatron.let_loss_run_on()
    fused_mlp.install()
    rotary.install()
    gc.enable()
    torch.cuda.set_stream(torch.cuda.default_stream())  # layers' graphs choose another
    for kept in (FullCudaGraphWrapper.cuda_graph, FullCudaGraphWrapper.result):
        kept.update(training=None, validation=None)
    FullCudaGraphWrapper.curr_iteration.update(training=0, validation=0)
    StaticBufferLoader.static_buffers = {"training": [], "validation": []}
    base.destroy_ub()
    FP8GlobalStateManager.reset()
    cuda_graphs.delete_cuda_graphs()
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]  # Megatron notes one model's attention backend there and refuses another's
    gc.collect()
    gc.freeze()  # layers' graphs have let the collector look through all that was imported
    torch.cuda.empty_cache()


def main(arguments: list[str]) -> None:
    pairs = [argument.split("=", 1) for argument in arguments]
    options = {"size": "1b", "layers": 0, "seq": 8192, "count": 8, "steps": 3, "optimizer": 0, "limit": 180} | {
        name: value if name in ("size", "out") else int(value) for name, value in pairs if name != "variant"
    }
    os.environ |= {name: os.environ.get(name, value) for name, value in ALONE.items()}
    os.environ.setdefault("UB_SKIPMC", "1")  # user buffers by CUDA's IPC, without NVLink multicast
    from nemo_ext import platform

    if platform.activate():
        raise SystemExit("no GPU here")
    import torch

    from recipes.models import size

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    shape = size("llama3", options["size"]).architecture
    if options["layers"]:
        shape = dataclasses.replace(shape, num_layers=options["layers"])
    connections = os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    out, layout = Path(options["out"]), None
    for text in [value for name, value in pairs if name == "variant"]:
        faulthandler.dump_traceback_later(options["limit"], exit=True)
        began = time.perf_counter()
        try:
            variant = Variant.parse(text)
            if variant.layout != layout:
                layout = None
                lay_out(variant)
                layout = variant.layout
            found = measure(variant, shape, options)
        except Exception as error:  # the others go on
            found = {"error": f"{type(error).__name__}: {error}"[:1500]}
        forget()
        found["took_s"] = round(time.perf_counter() - began, 1)
        if torch.distributed.get_rank() and "error" not in found:
            continue
        print(text, json.dumps({name: value for name, value in found.items() if name != "longest"}), flush=True)
        if torch.distributed.get_rank():
            continue
        held = json.loads(out.read_text()) if out.exists() else {}
        row = {**options, "gpus": torch.distributed.get_world_size(), "connections": connections, "gpu": machine.device(),
               "date": datetime.date.today().isoformat(), "versions": machine.versions(), **found}  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        name = f"{options['size']}-{shape.num_layers} {text}" + (" with optimizer" if options["optimizer"] else "")
        out.write_text(json.dumps({**held, machine.on(name): row}, indent=1) + "\n")
    faulthandler.cancel_dump_traceback_later()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
