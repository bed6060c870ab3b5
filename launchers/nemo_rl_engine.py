"""GRPO through NeMo-RL: planning its layout, writing its configuration, and starting it.

Not named nemo_rl.py: `python launchers/run.py` puts this folder first on Python's path, where it would hide NeMo-RL itself.

    planned = nemo_rl_engine.plan(keys, architecture, gpu_memory, version)  # layout and memory; a UserError if nothing fits
    config = nemo_rl_engine.configuration(planned, architecture, paths, version, overrides)
    nemo_rl_engine.write(run_dir, config)
    nemo_rl_engine.run_local(run_dir, version)                           # inside the container
    nemo_rl_engine.export(run_dir, out)                                  # the last checkpoint as a Hugging Face folder

On more machines than one a batch script starts it (`launchers/slurm/ray.py`). Starting is untested: NeMo-RL's container was not
at hand. What is started follows `docs/cluster.md`, `docs/local-workstation.md` and `ray.sub` of the sources that
`nemo_ext/grpo/nemo_rl/versions` names.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launchers import plan as planner
from launchers.memory import GiB, Layout, Request
from nemo_ext import run_folder
from nemo_ext.architecture import Architecture
from nemo_ext.disk import write_atomic
from nemo_ext.errors import RunError, UserError
from nemo_ext.grpo.nemo_rl import emit, limits, tree

ROOT = Path(__file__).resolve().parents[1]
CONVERTED = "megatron"  # in a run's folder: the model as NeMo-RL converts it, once
HOME = "/opt/nemo-rl"  # NeMo-RL's source in its container
IMAGE = "nvcr.io#nvidia/nemo-rl"
LOG = "nemo_rl.log"
PATIENCE = 60.0  # seconds that a stopped run has to end
VLLM_BYTES = {"bf16": 2, "fp32": 4, "fp8": 1}


@dataclass(frozen=True)
class Planned:
    """A GRPO run whose layout is chosen: `keys` have no free layout key left."""

    keys: dict[str, Any]
    policy: planner.Plan
    generation: list[str]  # lines for people
    reference: list[str]

    def lines(self) -> list[str]:
        """The plan for people: policy, reference and generation."""
        own = "the policy, while it trains (vLLM asleep)" if not self.keys["generation_gpus"] else "the policy"
        return [own, *self.policy.lines(), "", "the reference", *self.reference, "", "generation", *self.generation]


def plan(
    keys: Mapping[str, Any], architecture: Architecture, gpu_memory: float, version: str, gpu: Mapping[str, Any] | None = None
) -> Planned:
    """Choose what `keys` leave open of `tp pp cp ep micro_batch recompute generation_tp`, and check the rest.

    `gpu_memory`: bytes of a GPU; `gpu`: its kind, as `launchers.layout.device` says it. The policy's layout is the planner's for
    its GPUs, without a virtual pipeline, which NeMo-RL has no key for, and with all activations recomputed only where nothing
    fits otherwise. No time is expected: nothing of NeMo-RL was measured. Raises UserError where a rule is broken or something
    does not fit.
    """
    limits.refuse(keys, architecture, version)
    keys = {**keys, "precision": keys["precision"] or "bf16"}
    nodes, gpus = emit.policy_machine(keys)
    request = Request(
        nodes=nodes, gpus=gpus, gpu_memory=gpu_memory, device="gpu", seq=emit.sequence_length(keys, architecture),
        global_batch=keys["prompts"] * keys["group"], micro_batch=keys["micro_batch"], tp=keys["tp"], pp=keys["pp"], vp=1,
        cp=1 if architecture.attn_logit_softcapping is not None else keys["cp"], ep=keys["ep"], precision=keys["precision"],
        grad_bytes=4 if keys["precision"] == "fp32" else 2, fp8_recipe=emit.FP8_RECIPE, **gpu or {},
    )  # fmt: skip
    modes = {None: ("none", "full"), False: ("none",), True: ("full",)}[keys["recompute"]]
    for mode in modes:
        try:
            policy = planner.plan(architecture, dataclasses.replace(request, recompute=mode))
            break
        except UserError as error:
            problem = error
    else:
        raise UserError(_in_our_words(str(problem))) from None
    policy = dataclasses.replace(policy, why=[_in_our_words(why) for why in policy.why if why != "fixed: vp=1"], expected=None)
    layout = policy.layout
    keys |= {name: getattr(layout, name) for name in ("tp", "pp", "cp", "ep", "micro_batch")}
    keys["recompute"] = layout.recompute == "full"
    keys["generation_tp"] = _generation_tp(keys, architecture, gpu_memory)
    return Planned(
        keys, policy, _generation_lines(keys, architecture, gpu_memory),
        _reference_lines(keys, architecture, layout),
    )  # fmt: skip


def configuration(
    planned: Planned, architecture: Architecture, paths: emit.Paths, version: str, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The complete NeMo-RL configuration of a planned run, with values set by path (`{"nemo_rl.grpo.val_period": 5}`).

    Raises UserError for a path that the version does not have, naming the nearest, or a value of another type.
    """
    config = emit.emit(planned.keys, architecture, paths, version)
    return tree.set_paths(config, {path.removeprefix(tree.PREFIX): value for path, value in (overrides or {}).items()}, version)


def yaml_text(config: dict[str, Any]) -> str:
    """A configuration as YAML."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def write(run_dir: Path, config: dict[str, Any]) -> Path:
    """Write a run's configuration; returns the file."""
    write_atomic(run_dir / emit.FILE, yaml_text(config))
    return run_dir / emit.FILE


def command(run_dir: Path, version: str, home: str = HOME) -> list[str]:
    """The driver's command with its keys. `environment` belongs to it."""
    return [*driver(home), f"run={run_dir}", f"version={version}"]


def driver(home: str = HOME) -> list[str]:
    """The driver's command without its keys, as `uv run` of NeMo-RL's project starts it."""
    return ["uv", "run", "--directory", home, "python", "-m", "nemo_ext.grpo.nemo_rl.train"]


def environment(run_dir: Path) -> dict[str, str]:
    """What the command needs in its environment: this project on Python's path, and a place of the run's own for the converted
    model, as NeMo-RL would take an older one that was converted from the same path."""
    return {"PYTHONPATH": str(ROOT), "NRL_MEGATRON_CHECKPOINT_DIR": str(run_dir / CONVERTED), "PYTHONUNBUFFERED": "1"}


def command_line(run_dir: Path, version: str, home: str = HOME) -> str:
    """Command and environment as a line for a shell."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment(run_dir).items()]
    return " ".join([*variables, shlex.join(command(run_dir, version, home))])


def export_command(checkpoint: Path, out: Path, home: str = HOME) -> list[str]:
    """The command that writes a checkpoint (`newest_checkpoint`) as a Hugging Face folder, by NeMo-RL's converter."""
    options = ["--config", checkpoint / "config.yaml", "--megatron-ckpt-path", checkpoint / "policy/weights/iter_0000000",
               "--hf-ckpt-path", out]  # fmt: skip
    script = f"{home}/examples/converters/convert_megatron_to_hf.py"
    return ["uv", "run", "--directory", home, "--extra", "mcore", "python", script, *map(str, options)]


def newest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """The newest checkpoint that NeMo-RL has finished, as (step, folder), or None."""
    found = (run_dir / run_folder.CHECKPOINTS).glob("step_*")
    steps = [(int(match[1]), path) for path in found if (match := re.fullmatch(r"step_(\d+)", path.name))]
    return max(steps, default=None)


def export(run_dir: Path, out: Path) -> None:
    """Write the run's newest checkpoint as a Hugging Face folder, inside the container. Raises RunError if that fails."""
    found = newest_checkpoint(run_dir)
    if found is None:
        raise RunError(f"{run_dir} holds no checkpoint to export: keep=1")
    beside = out.with_name(out.name + run_folder.PARTIAL)
    log = run_dir / run_folder.LOGS / "export.log"
    with open(log, "w") as output:
        done = subprocess.run(export_command(found[1], beside, _home()), stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RunError(f"the run is complete, its export is not: the log is {log}")
    os.rename(beside, out)


def require_local(keys: Mapping[str, Any]) -> str:
    """NeMo-RL's folder on this machine. Raises UserError where executor=local cannot start NeMo-RL."""
    if keys["nodes"] > 1:
        raise UserError(f"nodes={keys['nodes']}: executor=local is one machine, executor=slurm is for more")
    if tree.installed() is None:
        image = f"{IMAGE.replace('#', '/')}:{tree.choose(keys['nemo_rl_version'], None)}"
        raise UserError(
            f"engine=nemo_rl: NeMo-RL is not installed here: run this inside {image}, or take engine=embedded; dryrun=true shows "
            "the configuration and the command"
        )
    return _home()


def run_local(run_dir: Path, version: str) -> None:
    """Train on this machine, inside the container: NeMo-RL starts Ray on it by itself. Shows progress.

    Raises UserError where the run refuses its input, RunError where it failed; what stops this process stops the run.
    """
    log = run_dir / run_folder.LOGS / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    from launchers.progress import follow

    with open(log, "a") as output:
        process = subprocess.Popen(
            command(run_dir, version, _home()), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment(run_dir)}, start_new_session=True,
        )  # fmt: skip
        try:
            code = follow(run_dir, process)
        finally:
            _end(process)
    if code:
        status = run_folder.read_status(run_dir) or {}
        known = status.get("phase") == "failed" and status.get("message")
        if known and status.get("exit_code") == UserError.exit_code:
            raise UserError(status["message"])
        cause = status["message"] if known else f"NeMo-RL ended with exit code {code}"
        raise RunError(f"{cause}; the log is {log}, the same command continues from the newest checkpoint")


def _home() -> str:
    """The folder of the installed NeMo-RL's project: where its pyproject.toml is."""
    import importlib.util

    folder = Path(next(iter(importlib.util.find_spec("nemo_rl").submodule_search_locations))).parent
    return str(folder) if (folder / "pyproject.toml").is_file() else HOME


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started, where it still runs."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _in_our_words(message: str) -> str:
    """The planner's message with the keys of GRPO, which has no global_batch and no seq, and no choice of vp and recompute."""
    message = re.sub(r" (vp=1|recompute=\w+)\b", "", message)
    message = re.sub(r"fp8_recipe=\w+: (.*) has no such.*", r"precision=fp8: \1 has no scales of blocks: precision=bf16", message)
    message = re.sub(r"\bglobal_batch=(\d+)", r"prompts x group = \1", message)
    return re.sub(r"\bseq=(\d+)", r"max_prompt + max_answer of about \1", message)


def _weights(keys: Mapping[str, Any], architecture: Architecture) -> float:
    """Bytes of the model's weights in vLLM, on all its GPUs together."""
    return architecture.num_parameters() * VLLM_BYTES[keys["precision"]]


def _cache_bytes(keys: Mapping[str, Any], architecture: Architecture) -> float:
    """Bytes of keys and values of one token, on all GPUs of a vLLM replica together."""
    return 2 * architecture.kv_width * architecture.num_layers * (4 if keys["precision"] == "fp32" else 2)


def _share(keys: Mapping[str, Any]) -> float:
    return emit.OWN_MEMORY if keys["generation_gpus"] else emit.SHARED_MEMORY


def _generation_tp(keys: Mapping[str, Any], architecture: Architecture, gpu_memory: float) -> int:
    """vLLM's tensor parallel size: the one asked for, else the smallest from the policy's up that holds weights and a sequence.

    Raises UserError where none does.
    """
    first = emit.generation_tp(keys, architecture)
    gpus = keys["generation_gpus"] if keys["generation_gpus"] and keys["nodes"] == 1 else keys["gpus"]
    length = emit.sequence_length(keys, architecture)
    needed = _weights(keys, architecture) + length * _cache_bytes(keys, architecture)
    sizes = [n for n in range(first, gpus + 1) if gpus % n == 0 and architecture.num_attention_heads % n == 0]
    sizes = sizes[:1] if keys["generation_tp"] else sizes
    for size in sizes:
        if needed / size <= _share(keys) * gpu_memory:
            return size
    raise UserError(
        f"does not fit: vLLM needs {needed / GiB:.1f} GiB for the weights and one sequence on generation_tp={sizes[-1]} GPUs, of "
        f"which it has {_share(keys):.0%} of {gpu_memory / GiB:.1f} GiB each: a larger generation_tp=, or GPUs with more memory"
    )


def _generation_lines(keys: Mapping[str, Any], architecture: Architecture, gpu_memory: float) -> list[str]:
    size = keys["generation_tp"]
    weights = _weights(keys, architecture) / size
    cache = _share(keys) * gpu_memory - weights
    length = emit.sequence_length(keys, architecture)
    fit = int(cache / (length * _cache_bytes(keys, architecture) / size))
    apart = emit.generation_nodes(keys)
    if apart:
        gpus, where = apart * keys["gpus"], f"{apart} of {keys['nodes']} machines, of their own"
    elif keys["generation_gpus"]:
        gpus, where = keys["generation_gpus"], f"{keys['generation_gpus']} of {keys['gpus']} GPUs, of their own"
    else:
        gpus, where = keys["nodes"] * keys["gpus"], "the policy's GPUs, in turns with it"
    replicas = gpus // size
    held = f"{fit:,} sequences of {length:,} tokens a replica"
    return [
        f"{'where':<11} {where}",
        f"{'layout':<11} vLLM, {replicas} replica{'s' if replicas > 1 else ''} of TP {size}",
        f"{'memory':<11} {'weights':<11} {weights / GiB:8.2f} GiB a GPU {weights / gpu_memory:6.1%}",
        f"{'':<11} {'cache':<11} {cache / GiB:8.2f} GiB a GPU {cache / gpu_memory:6.1%}, {held}",
    ]


def _reference_lines(keys: Mapping[str, Any], architecture: Architecture, layout: Layout) -> list[str]:
    """NeMo-RL keeps the reference's weights in the machine's memory and swaps them in to score answers."""
    if keys["kl"] == 0:
        return [f"{'memory':<11} kl=0: it has no weight in the loss"]
    each = architecture.num_parameters() * (4 if keys["precision"] == "fp32" else 2) / (layout.tp * layout.pp)
    place = "of the machine's memory for each GPU; on the GPU in place of the policy's weights"
    return [f"{'memory':<11} {each / GiB:.2f} GiB {place}"]
