"""One GRPO run inside NeMo-RL's container: the driver process, which Ray's workers answer to.

    python -m nemo_ext.grpo.nemo_rl.train run=RUN version=v0.8.0

It does what NeMo-RL's `examples/run_grpo.py` of the version does, with our problems and our rewards, and writes what the run's
folder holds: metrics.jsonl and status.json. Needs NeMo-RL, Ray and GPUs. Untested: no NeMo-RL container was at hand; what it
calls, and with what, was read in the sources that `versions/` names.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_ext import run_folder
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.errors import RunError, UserError, explain
from nemo_ext.grpo.nemo_rl import emit, problems, tree

# A run's name of a figure, and where NeMo-RL logs it: (prefix, name). The same names in both versions.
FIGURES = {
    "loss": ("train", "loss"),
    "reward": ("train", "reward"),
    "kl": ("train", "kl_penalty"),
    "entropy": ("train", "approx_entropy"),
    "length": ("train", "mean_gen_tokens_per_sample"),
    "grad_norm": ("train", "grad_norm"),
    "lr": ("train", "lr"),
    "step_time": ("timing/train", "total_step_time"),
    "generation_time": ("timing/train", "generation"),
    "training_time": ("timing/train", "policy_training"),
    "tokens_per_s": ("timing/train", "valid_tokens_per_sec_per_gpu"),  # times the GPUs
}
LAST_PREFIX = "timing/train"  # NeMo-RL logs a step's figures in several calls, these last
VALIDATION = {"val_reward": "accuracy", "val_length": "avg_length"}


@dataclass
class Options:
    """The command's keys."""

    run: str = key(NO_DEFAULT, f"folder of the run, in which the launcher has written {emit.FILE}")
    version: str = key(NO_DEFAULT, "NeMo-RL version that it is for: v0.5.0 or v0.8.0")
    save_within: int | None = key(None, "save and end after so long, before a time limit", unit="seconds", auto="no limit")


def train(options: Options) -> None:
    """Train to the end. Raises UserError for a configuration that the version does not take, RunError for a loss that is no
    number."""
    run_dir = Path(options.run)
    config = OmegaConf.to_container(OmegaConf.load(run_dir / emit.FILE), resolve=True)
    tree.check(config, options.version)
    if tree.installed() is None:
        raise UserError("NeMo-RL is not installed here: this command runs inside its container")
    if options.version not in STARTS:
        raise UserError(f"version={options.version}: no start of this version is known, only {', '.join(STARTS)}")
    if options.save_within is not None:
        config["checkpointing"]["checkpoint_must_save_by"] = _clock(options.save_within)
    steps = config["grpo"]["max_num_steps"]
    run_folder.write_status(run_dir, "starting", 0, steps)
    try:
        STARTS[options.version](config, run_dir)
    except Exception as error:
        code = getattr(error, "exit_code", RunError.exit_code)
        run_folder.write_failure(run_dir, explain(error, run_dir), code, max_steps=steps)
        raise
    made, _ = run_folder.read_records(run_dir)
    last = made[-1]["step"] if made else 0
    if options.save_within is not None and last < steps:
        run_folder.write_status(run_dir, "stopped", last, steps, signal=signal.SIGUSR1.name)
    else:
        run_folder.write_status(run_dir, "finished", steps, steps)


def _clock(seconds: int) -> str:
    """Seconds as NeMo-RL's DD:HH:MM:SS; none are left where they are negative."""
    seconds = max(0, seconds)
    return f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def recording(log_metrics: Callable, run_dir: Path, steps: int, gpus: int) -> Callable:
    """NeMo-RL's `Logger.log_metrics`, that also adds a line to metrics.jsonl a step and an evaluation, and moves status.json.

    `gpus`: of all machines. Raises RunError at a loss that is not a number.
    """
    started = time.time()
    run_folder.write_status(run_dir, "training", 0, steps, started=started)
    waiting: dict[int, dict[str, Any]] = defaultdict(dict)

    def log(metrics: dict[str, Any], step: int, prefix: str = "", *more: Any, **named: Any) -> None:
        log_metrics(metrics, step, prefix, *more, **named)
        if prefix == "validation":
            figures = {name: float(metrics[theirs]) for name, theirs in VALIDATION.items() if theirs in metrics}
            _append(run_dir, {"step": step, **figures})
            return
        found = {name: theirs for name, (where, theirs) in FIGURES.items() if where == prefix and theirs in metrics}
        waiting[step] |= {name: float(metrics[theirs]) for name, theirs in found.items()}
        if "loss" in found and not math.isfinite(waiting[step]["loss"]):
            raise RunError(f"the loss of step {step} is {waiting[step]['loss']}: lower lr=, or look at the data")
        if prefix == LAST_PREFIX:
            record = waiting.pop(step)
            if "tokens_per_s" in record:
                record["tokens_per_s"] *= gpus
            _append(run_dir, {"step": step, **record})
            run_folder.write_status(run_dir, "training", step, steps, started=started)

    return log


def _append(run_dir: Path, record: dict[str, Any]) -> None:
    with open(run_dir / run_folder.METRICS, "a") as file:
        file.write(json.dumps(run_folder.finite(record | {"time": time.time()})) + "\n")


def _register() -> None:
    """Make our environment and processor known to NeMo-RL under the names that the configuration has."""
    from nemo_rl.data.processors import register_processor
    from nemo_rl.distributed import ray_actor_environment_registry as actors
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env

    register_processor(emit.PROCESSOR, problems.process)
    register_env(emit.ENVIRONMENT, emit.ENVIRONMENT_CLASS)
    actors.ACTOR_ENVIRONMENT_REGISTRY[emit.ENVIRONMENT_CLASS] = PY_EXECUTABLES.SYSTEM


def _datasets(train: str, validation: str | None, longest: int, prompts: int, tokenizer: Any) -> tuple[Any, Any]:
    """The problems to learn from and the held-out ones (None without a file), as NeMo-RL's datasets."""
    from nemo_rl.data.datasets import AllTaskProcessedDataset
    from nemo_rl.data.interfaces import TaskDataSpec

    spec = TaskDataSpec(task_name=emit.ENVIRONMENT)
    processors = {emit.ENVIRONMENT: (spec, problems.process)}
    rows = problems.read(train)
    if len(rows) < prompts:  # its loader drops what is left of an epoch, which would be everything
        raise UserError(f"{train} has {len(rows)} problems, and a step takes {prompts}: prompts={len(rows)}")
    datasets = [AllTaskProcessedDataset(rows, tokenizer, spec, processors, max_seq_length=longest)]
    if validation:
        rows = problems.read(validation)
        datasets.append(AllTaskProcessedDataset(rows, tokenizer, spec, processors, max_seq_length=longest))
    return datasets[0], datasets[1] if validation else None


def _start_v050(config: dict[str, Any], run_dir: Path) -> None:
    """NeMo-RL v0.5.0, whose configuration is a dictionary."""
    from nemo_rl.algorithms.grpo import grpo_train, setup
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.distributed.virtual_cluster import init_ray
    from nemo_rl.environments.utils import create_env
    from nemo_rl.models.generation import configure_generation_config

    _register()
    init_ray()
    tokenizer = get_tokenizer(config["policy"]["tokenizer"])
    config["policy"]["generation"] = configure_generation_config(config["policy"]["generation"], tokenizer)
    data = config["data"]
    prompts = config["grpo"]["num_prompts_per_step"]
    dataset, held_out = _datasets(
        data["train_data_path"], data.get("val_data_path"), data["max_input_seq_length"], prompts, tokenizer
    )
    environment = create_env(env_name=emit.ENVIRONMENT, env_configs=config["env"])
    environments = {emit.ENVIRONMENT: environment}
    policy, generation, _, loader, held_out_loader, loss, logger, checkpointer, state, config = setup(
        config, tokenizer, dataset, held_out
    )
    _follow(logger, run_dir, config["grpo"]["max_num_steps"], config["cluster"], state["total_steps"])
    grpo_train(
        policy, generation, loader, held_out_loader, tokenizer, loss, environments, environments, logger, checkpointer, state,
        config,
    )  # fmt: skip


def _start_v080(config: dict[str, Any], run_dir: Path) -> None:
    """NeMo-RL v0.8.0, whose configuration is a pydantic model."""
    from nemo_rl.algorithms.grpo import MasterConfig, grpo_train, setup, shutdown_environments
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.distributed.virtual_cluster import init_ray
    from nemo_rl.environments.utils import create_env
    from nemo_rl.models.generation import configure_generation_config

    master = MasterConfig(**config)
    _register()
    init_ray()
    tokenizer = get_tokenizer(master.policy["tokenizer"])
    master.policy["generation"] = configure_generation_config(master.policy["generation"], tokenizer)
    data, prompts = master.data, master.grpo.num_prompts_per_step
    held_out_path = (data.get("validation") or {}).get("data_path")
    dataset, held_out = _datasets(data["train"]["data_path"], held_out_path, data["max_input_seq_length"], prompts, tokenizer)
    environment = create_env(env_name=emit.ENVIRONMENT, env_config=master.env[emit.ENVIRONMENT])
    environments = {emit.ENVIRONMENT: environment}
    policy, generation, _, _, loader, held_out_loader, loss, logger, checkpointer, state, master, *_ = setup(
        master, tokenizer, dataset, held_out
    )
    _follow(logger, run_dir, master.grpo.max_num_steps, master.cluster, state.total_steps)
    try:
        with checkpointer:  # waits for checkpoints that are still being written
            grpo_train(
                policy, generation, loader, held_out_loader, tokenizer, loss, environments, environments, logger, checkpointer,
                state, master,
            )  # fmt: skip
    finally:
        shutdown_environments(environments, environments)
        generation.shutdown()


def _follow(logger: Any, run_dir: Path, steps: int, cluster: dict[str, Any], done: int) -> None:
    """Record the steps from `done` on, those of a killed run after its checkpoint taken back."""
    run_folder.truncate_records(run_dir, done)
    logger.log_metrics = recording(logger.log_metrics, run_dir, steps, cluster["num_nodes"] * cluster["gpus_per_node"])


STARTS = {"v0.5.0": _start_v050, "v0.8.0": _start_v080}


if __name__ == "__main__":
    sys.exit(main(Options, train, sys.argv[1:], about="Train by GRPO inside NeMo-RL's container.",
                  example="python -m nemo_ext.grpo.nemo_rl.train run=RUN version=v0.8.0"))  # fmt: skip
