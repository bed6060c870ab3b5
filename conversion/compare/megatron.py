"""NeMo's Megatron model of a converted checkpoint, run on prompts at any tensor, pipeline and expert parallel layout.

A layout of one process runs in the caller's; a larger one in processes that `Processes` starts, on gloo or NCCL as the platform
says: `python -m conversion.compare.megatron` is one of them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conversion import nemo_folder
from conversion.compare.activations import (
    LOGITS,
    Activation,
    Trace,
    first_input,
    first_output,
    recording,
    require_memory,
    round_weights,
)
from conversion.compare.media import Media, sense_hooks
from nemo_ext.architecture import Architecture
from nemo_ext.errors import RunError, UserError, explain, is_lost_connection

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

ROOT = Path(__file__).resolve().parents[2]
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@dataclass(frozen=True)
class Layout:
    """How a model is split over processes."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.ep

    def __str__(self) -> str:
        parts = [f"{name.upper()}{size}" for name, size in asdict(self).items() if size > 1]
        return " ".join(parts) or "one process"

    def check(self, a: Architecture) -> None:
        """Refuse what does not divide. Raises UserError."""
        experts = a.num_moe_experts
        wanted = [
            ("tp", self.tp, "num_attention_heads", a.num_attention_heads),
            ("tp", self.tp, "num_query_groups", a.num_query_groups),
            ("tp", self.tp, "ffn_hidden_size", a.ffn_hidden_size),
            ("tp", self.tp, "padded_vocab_size", a.padded_vocab_size),
            ("pp", self.pp, "num_layers", a.num_layers),
        ]
        if experts is not None:
            wanted.append(("ep", self.ep, "num_moe_experts", experts))
        elif self.ep != 1:
            raise UserError(f"ep={self.ep} needs experts, and the model is dense")
        for key, size, name, value in wanted:
            if size < 1 or value % size:
                raise UserError(f"{key}={size} does not divide the model's {name}={value}")
        if torch.cuda.is_available() and self.processes > torch.cuda.device_count():
            raise UserError(
                f"tp={self.tp} pp={self.pp} ep={self.ep} needs {self.processes} GPUs, found {torch.cuda.device_count()}"
            )


def traces(
    checkpoint: nemo_folder.NemoCheckpoint,
    prompts: Sequence[torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    round_to: torch.dtype | None = None,
    layers: bool = False,
    layout: Layout | None = None,
    processes: Processes | None = None,
    media: Sequence[Media | None] | None = None,
) -> list[Trace]:
    """Run each prompt (`[s]`, int64) with its `media` through the model, one at a time without padding; the vocabulary's padding
    is removed.

    `dtype` is the one of weights and computation; `round_to` rounds the weights first. `layers` records the hidden states too.
    `processes` are as many as the layout has; without them they are started and ended here. Raises UserError: the layout does
    not divide the model, the memory does not suffice, the weights do not fit the architecture; RunError if a process died.
    """
    from nemo_ext import platform

    platform.activate()
    layout = layout or Layout()
    layout.check(checkpoint.architecture)
    parameters = checkpoint.architecture.num_parameters()
    width = checkpoint.architecture.hidden_size
    parameters += sum(s.encoder.num_parameters() + s.projector_parameters(width) for s in checkpoint.senses)
    weights = 1.6 * parameters * dtype.itemsize  # loading copies the fused gate and up
    what = f"{checkpoint.folder} in {str(dtype).removeprefix('torch.')}"
    require_memory(weights, what, layout.processes)
    media = list(media or [None] * len(prompts))
    job = dict(checkpoint=checkpoint, prompts=list(prompts), media=media, dtype=dtype, round_to=round_to, layers=layers,
               layout=layout)  # fmt: skip
    if layout.processes == 1:
        with single_process():
            return _stage_traces(**job)
    if processes is not None:
        return processes.run(job)
    with Processes(layout.processes) as started:
        return started.run(job)


def load_megatron(checkpoint: nemo_folder.NemoCheckpoint, seq_length: int, **overrides: Any) -> GPTModel:
    """This process's part of Megatron's GPTModel with the checkpoint's weights and senses, fp32, in evaluation mode.

    Megatron's parallel state must be there; `overrides` are fields of the NeMo configuration, such as
    `tensor_model_parallel_size` or dtypes. Raises UserError if the checkpoint does not have the model's tensors.
    """
    import fiddle
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    from nemo_ext.modeling import model_config

    options = dict(params_dtype=torch.float32, bf16=False) | overrides
    config = fiddle.build(model_config(checkpoint.architecture, seq_length, **options)).config
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = config.configure_model(tokenizer=None, pre_process=first, post_process=last)
    if checkpoint.senses:
        from nemo_ext.multimodal.model import attach

        attach(model, checkpoint.senses)
    model = model.cuda().eval()
    wanted = {"state_dict": model.sharded_state_dict(prefix="module.")}
    try:
        loaded = dist_checkpointing.load(wanted, str(checkpoint.weights))["state_dict"]
    except (CheckpointingException, CheckpointException, KeyError, RuntimeError, OSError) as error:
        if isinstance(error, CheckpointException):  # what each rank met
            error = next(iter(error.failures.values()))[0]
        raise UserError(f"{checkpoint.weights} cannot be loaded: {explain(error, checkpoint.weights)}") from error
    state = {name.removeprefix("module."): value for name, value in loaded.items() if not name.endswith("_extra_state")}
    result = model.load_state_dict(state, strict=False)
    if missing := [name for name in result.missing_keys if not name.endswith("_extra_state")] + result.unexpected_keys:
        raise UserError(f"{checkpoint.folder} does not fit its architecture.json: {', '.join(missing[:4])}")
    return model


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Megatron's parallel state for one process, taken down afterwards unless it was there before."""
    from megatron.core import parallel_state

    from nemo_ext import platform

    own_group = not torch.distributed.is_initialized()
    if own_group:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(platform.distributed_backend(), store=store, rank=0, world_size=1)
    try:
        if parallel_state.model_parallel_is_initialized():
            yield
        else:
            with _parallel_state(Layout()):
                yield
    finally:
        if own_group:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _parallel_state(layout: Layout) -> Iterator[None]:
    from megatron.core import parallel_state, tensor_parallel

    # Megatron tells Transformer Engine a model's attention backend through the environment and refuses to change it
    environment = {name: os.environ.pop(name) for name in ATTENTION_VARIABLES if name in os.environ}
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
    )
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        for name in ATTENTION_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(environment)


def _stage_traces(
    checkpoint: nemo_folder.NemoCheckpoint,
    prompts: Sequence[torch.Tensor],
    media: Sequence[Media | None],
    dtype: torch.dtype,
    round_to: torch.dtype | None,
    layers: bool,
    layout: Layout,
) -> list[Trace]:
    """What this process's pipeline stage computes for each prompt: its layers' points, the last stage the logits too.

    Hidden states `[s, 1, h]` go from stage to stage one prompt after the other: no schedule is needed to look at them.
    """
    from megatron.core import parallel_state, tensor_parallel

    a = checkpoint.architecture
    options = dict(params_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    if layout.pp > 1:
        options["pipeline_dtype"] = dtype
    model = load_megatron(
        checkpoint,
        max(len(ids) for ids in prompts),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        **options,
    )
    round_weights(model, round_to)
    hooks = _hooks(model) if layers else []
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    found = []
    try:
        with torch.inference_mode():
            for ids, given in zip(prompts, media, strict=True):
                s = len(ids)
                more = given.for_megatron("cuda", dtype) if given and first else {}
                positions = torch.arange(s, device="cuda")[None]
                mask = torch.ones(s, s, dtype=torch.bool, device="cuda").triu(1)[None, None]  # True: not attended
                if not first:
                    received = torch.empty(s, 1, a.hidden_size, dtype=dtype, device="cuda")
                    torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
                    model.set_input_tensor(received)
                trace: Trace = {}
                with recording(hooks, trace):
                    output = model(ids[None].cuda(), positions, mask, **more)
                if last:  # [1, s, padded vocabulary / tp]
                    logits = tensor_parallel.gather_from_tensor_model_parallel_region(output.contiguous())
                    trace[LOGITS] = Activation("output_layer", logits[0, :, : a.vocab_size].float().cpu())
                else:
                    torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
                found.append(trace)
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _hooks(model: GPTModel) -> list[tuple[str, str, torch.nn.Module, Callable]]:
    """Where the points of a trace are in this stage of Megatron's GPTModel. A layer's fused norms read the residual stream too:
    `pre_mlp_layernorm` is the identity there."""
    hooks = sense_hooks(model)
    for layer in model.decoder.layers:
        i = layer.layer_number - 1
        name = f"decoder.layers.{i}"
        if i == 0:
            hooks.append(("embedding", "embedding.word_embeddings", layer, first_input))
        hooks.append((f"layers.{i}.attention", f"{name}.self_attention", layer.pre_mlp_layernorm, first_input))
        hooks.append((f"layers.{i}", f"{name}.mlp", layer, first_output))
    if model.decoder.final_layernorm is not None:
        hooks.append(("norm", "decoder.final_layernorm", model.decoder.final_layernorm, first_output))
    return hooks


class Processes:
    """Local processes that run jobs one after another, at any layout of their number. A context manager; it ends them.

    They start with the first job. Their importing NeMo takes most of the time of a small job, so that a second one is cheap.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._workers: list[subprocess.Popen] = []
        self._jobs = 0

    def __enter__(self) -> Processes:
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-")
        self.folder = Path(self._folder.name)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
        self._workers = []
        self._folder.cleanup()

    def run(self, job: dict[str, Any]) -> list[Trace]:
        """Run `_stage_traces(**job)` in all processes and put their stages' traces together.

        Raises the UserError of a process, or RunError with the last it said.
        """
        if not self._workers:
            self._start()
        self._jobs += 1
        torch.save(job, self.folder / f"{self._jobs}.job")
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):  # it has died, and the next line sees that
                worker.stdin.write(f"{self._jobs}\n".encode())
                worker.stdin.flush()
        results = [self.folder / f"{self._jobs}.{rank}" for rank in range(self.count)]
        while not all(result.is_file() for result in results):
            if failed := [rank for rank, worker in enumerate(self._workers) if worker.poll() is not None]:
                self._raise_cause(job["layout"], failed)
            time.sleep(0.02)
        stages = [stage for result in results if (stage := torch.load(result, weights_only=False))]
        return [{point: value for trace in traces for point, value in trace.items()} for traces in zip(*stages, strict=True)]

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ATTENTION_VARIABLES}
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.count)),
        }
        for rank in range(self.count):
            command = [sys.executable, "-m", "conversion.compare.megatron", str(self.folder), str(rank), str(self.count)]
            with open(self.folder / f"{rank}.log", "w") as log:
                streams = dict(stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
                self._workers.append(subprocess.Popen(command, env=environment, cwd=self.folder, **streams))

    def _raise_cause(self, layout: Layout, failed: list[int]) -> None:
        time.sleep(1)  # the rank that knows the cause may not be the first to end
        for file in sorted(self.folder.glob("*.error")):
            said = json.loads(file.read_text())
            raise (UserError if said["exit_code"] == 2 else RunError)(said["message"])
        lines = (self.folder / f"{failed[0]}.log").read_text().strip().splitlines() or ["it wrote nothing"]
        raise RunError(f"process {failed[0]} of {self.count} ({layout}) died: {lines[-1][:300]}")


def _worker(folder: Path, rank: int, count: int) -> None:
    """One process: takes the numbers of jobs from standard input and answers each with a file, JOB.RANK.

    The first of the ranks that hold a stage puts its traces there, the others None. The parent holds the other end of standard
    input: when it ends, however it does, this process goes too.
    """
    numbers: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            numbers.put(line.strip())
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        from nemo_ext import platform

        if not platform.activate():
            torch.cuda.set_device(rank)
        rendezvous = f"file://{folder}/rendezvous"
        torch.distributed.init_process_group(platform.distributed_backend(), init_method=rendezvous, rank=rank, world_size=count)
        from megatron.core import parallel_state

        while True:
            number = numbers.get()
            job = torch.load(folder / f"{number}.job", weights_only=False)
            with _parallel_state(job["layout"]):
                found = _stage_traces(**job)
                mine = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_data_parallel_rank() == 0
            partial = folder / f"{number}.{rank}.partial"
            torch.save(found if mine else None, partial)
            partial.rename(folder / f"{number}.{rank}")
    except BaseException as error:
        traceback.print_exc()
        code = getattr(error, "exit_code", 1)
        if not is_lost_connection(error):
            partial = folder / f"{rank}.error.partial"
            partial.write_text(json.dumps({"message": explain(error, folder), "exit_code": code}))
            partial.rename(folder / f"{rank}.error")
        sys.stdout.flush()
        os._exit(code)  # threads of libraries may wait for ranks that are gone


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
