"""`recipe=grpo_FAMILY`: problems and model prepared, one of two engines started, the result reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipes
from launchers import allocation, folder, grammar, inputs, layout, local
from launchers.memory import Memory, Request
from nemo_ext import run_folder
from nemo_ext.architecture import Architecture
from nemo_ext.disk import write_atomic
from nemo_ext.errors import RunError, UserError
from nemo_ext.progress import bar
from recipes.grpo import finish

GIB = 2**30
PATHS = ("model", "system", "prompt", "template", "reward_model")  # keys that may name files
TOKENIZER = "tokenizer"  # in a run's folder: the model's tokenizer, with the chat template that is used
TRAINING_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "rollout.pt", run_folder.MANIFEST)
VLLM_SHARE = 0.3  # of a GPU's memory, which TRL gives a vLLM that shares the policy's GPU


@dataclass(frozen=True)
class Planned:
    """How a run of the embedded engine fits its device. Sizes in bytes."""

    micro_batch: int
    recompute: bool
    policy: Memory
    reference: float
    generation: float
    device_memory: float
    parameters: int

    @property
    def total(self) -> float:
        """At the fullest moment: training, or sampling without gradients and activations."""
        sampling = self.policy.weights + self.policy.optimizer + self.policy.other + self.generation
        return self.reference + max(self.policy.total, sampling)

    def lines(self) -> list[str]:
        """The plan for people."""
        kinds = ("weights", "gradients", "optimizer", "activations", "logits", "other")
        rows = [
            ("policy", {kind: getattr(self.policy, kind) for kind in kinds}),
            ("reference", {"weights": self.reference}),
            ("generation", {"cache": self.generation}),
            ("together", {"at most": self.total}),
        ]
        lines = [f"{'engine':<11} embedded, one device of {self.device_memory / GIB:.1f} GiB; {self.parameters:,} parameters"]
        lines.append(f"{'batch':<11} {self.micro_batch} answers at once, recompute {'on' if self.recompute else 'off'}")
        for label, parts in rows:
            for place, (name, size) in enumerate(parts.items()):
                lines.append(f"{'' if place else label:<11} {name:<11} {size / GIB:8.2f} GiB {size / self.device_memory:6.1%}")
        return lines


def start(command: grammar.Command) -> int:
    """Plan, prepare, train, report. Returns the exit code."""
    from nemo_ext.grpo.embedded import build_reward, build_tools
    from nemo_ext.platform import hardware

    machine = hardware.detect()
    if not machine.cuda and not {"device", "gpu"} & set(command.keys):
        print("no CUDA device: training on the CPU (size=smoke unless model= or size= is given)")
    keys = recipes.resolve(command.recipe, command.keys, cuda=machine.cuda)
    if keys["engine"] == "nemo_rl":
        from launchers import grpo_nemo_rl

        return grpo_nemo_rl.start(command, keys, machine)
    if command.dryrun:
        raise UserError("dryrun=true is for executor=slurm, executor=k8s and engine=nemo_rl; plan=true shows what would run")
    if command.overrides:
        raise UserError(f"{next(iter(command.overrides))}=: the embedded engine has no fields beside its keys; --help shows them")
    method, family = recipes.split(command.recipe)
    build_reward(keys).close()  # refused here, not after the data is read
    if (tools := build_tools(keys)) is not None:
        tools.close()
    if command.plan:
        _, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=True)
        print("\n".join(plan(keys, architecture, layout.device_memory(keys, machine)).lines()))
        return 0
    if keys["device"] == "gpu" and not machine.cuda:
        raise UserError("device=gpu: this machine has no CUDA device; plan=true plans for one")
    keys = inputs.absolute(keys, PATHS)
    run_dir = Path(keys["out"])
    return allocation.hold(
        command, run_dir, keys, export=lambda: _export(run_dir, keys), run=lambda: _run(command, keys, machine, run_dir)
    )


def _run(command: grammar.Command, keys: dict[str, Any], machine: Any, run_dir: Path) -> int:
    """`start`, of a run of the embedded engine that is not complete and whose folder is held: all of it, or the step that an
    allocation asks for."""

    def train(ready: _Ready) -> signal.Signals | None:
        if machine.cuda:  # the engine takes one GPU
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        else:  # threads that wait soon give their core away: one that something else uses would stall all of them
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        steps, restarts = ready.keys["steps"], ready.keys["restarts"]
        return local.run(run_dir, 1, threads=machine.cpu_count, max_steps=steps, restarts=restarts)

    return allocation.carry_out(
        command, run_dir, ready=lambda: _ready(command, keys, machine, run_dir), hand_over=_hand_over, train=train, finish=_finish
    )


@dataclass(frozen=True)
class _Ready:
    """A run whose plan and problems are there: `keys` are final."""

    command: grammar.Command
    keys: dict[str, Any]
    run_dir: Path
    architecture: Architecture
    planned: Planned
    model: Path
    counts: dict[str, int]


def _ready(command: grammar.Command, keys: dict[str, Any], machine: Any, run_dir: Path) -> _Ready:
    """Plan the run and prepare its problems, unless that was done before."""
    method, family = recipes.split(command.recipe)
    checkpoint, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=False)
    planned = plan(keys, architecture, layout.device_memory(keys, machine))
    keys |= {"micro_batch": planned.micro_batch, "recompute": planned.recompute}
    print(_brief(keys, planned))
    model = model_folder(checkpoint)
    counts = prepare_problems(run_dir, keys, model)
    keys["steps"] = keys["steps"] or keys["updates"] * max(1, int(keys["epochs"] * counts["train"] // keys["prompts"]))
    keys = finish(keys)
    folder.check_same_run(run_dir, command, keys)
    return _Ready(command, keys, run_dir, architecture, planned, model, counts)


def _hand_over(ready: _Ready) -> bool:
    """Write down what the worker needs; False where all steps are made: the run was killed before its summary."""
    keys, run_dir, planned = ready.keys, ready.run_dir, ready.planned
    found = folder.usable_checkpoint(run_dir)
    if found and found[0] >= keys["steps"]:
        return False
    folder.check_disk(run_dir, 12 * planned.parameters, keys)
    job = {
        "architecture": ready.architecture.to_dict(), "tokenizer": str(run_dir / TOKENIZER), "blend": [],
        "weights": str(ready.model),
    }  # fmt: skip
    folder.hand_over(run_dir, ready.command, keys, {"lines": planned.lines(), "total": planned.total}, found, job)
    return True


def _finish(ready: _Ready) -> None:
    """Report on a run that has made all its steps, and export it."""
    from nemo_ext import report
    from nemo_ext.grpo import evaluation

    keys, run_dir, planned = ready.keys, ready.run_dir, ready.planned
    facts = {
        **folder.facts(run_dir, ready.command),
        "engine": "embedded",
        "parameters": planned.parameters,
        "layout": {"tp": 1, "pp": 1, "dp": 1},
        "problems": ready.counts["train"],
        "heldout_problems": ready.counts["heldout"],
        "planned_memory": planned.total / GIB,
        "answers": evaluation.side_by_side(run_dir, keys["steps"], keys["answers"]),
        **evaluation.compare(run_dir, keys["steps"]),
    }
    summary = report.write(run_dir, facts)
    _export(run_dir, keys)
    allocation.show(summary)


def plan(keys: dict[str, Any], architecture: Architecture, memory: float) -> Planned:
    """The largest micro-batch that fits into `memory` bytes, with activations recomputed only where nothing fits otherwise.

    Counts the policy as the planner of the other recipes does, in fp32 (bf16 is autocast). Raises UserError where nothing fits.
    """
    from launchers import plan as planner

    answers, length = keys["prompts"] * keys["group"], keys["max_prompt"] + keys["max_answer"]
    if length > architecture.max_position_embeddings:
        raise UserError(
            f"max_prompt={keys['max_prompt']} and max_answer={keys['max_answer']} are more than the model's "
            f"{architecture.max_position_embeddings:,} positions"
        )
    each = 4 if keys["precision"] == "fp32" else 2
    reference = 4.0 * architecture.num_parameters() if keys["kl"] else 0.0
    cache = 2.0 * answers * length * architecture.kv_width * architecture.num_layers * each
    if keys["backend"] == "vllm":
        cache = VLLM_SHARE * memory
    sizes = [n for n in range(answers, 0, -1) if answers % n == 0]
    for recompute in (False, True) if keys["recompute"] is None else (keys["recompute"],):
        for size in [keys["micro_batch"]] if keys["micro_batch"] else sizes:
            prompts = size if recompute else min(size, keys["prompts"])  # read once for all its answers where they are kept
            rows = -(-(prompts * keys["max_prompt"] + size * keys["max_answer"]) // length)
            request = Request(
                1, 1, memory, keys["device"], length, rows, rows, 1, 1, 1, 1, 1, precision="fp32",
                recompute="full" if recompute else "none", distributed_optimizer=False,
            )  # fmt: skip
            try:
                policy = planner.plan(architecture, request).memory
            except UserError as error:
                refusal = str(error)
                continue
            planned = Planned(size, recompute, policy, reference, cache, memory, architecture.num_parameters())
            if planned.total <= memory:
                return planned
            refusal = f"does not fit: {planned.total / GIB:.1f} GiB are needed, the device has {memory / GIB:.1f} GiB"
    raise UserError(f"{refusal}: a smaller model, fewer answers at once (micro_batch=1), or engine=nemo_rl on more GPUs")


def prepare_problems(run_dir: Path, keys: dict[str, Any], model: Path) -> dict[str, int]:
    """Write the run's problems and tokenizer, unless an earlier start has; the number of problems on each side.

    Raises UserError where the data is no problems, or where `filter` leaves none.
    """
    from conversion import nemo_folder
    from nemo_ext.grpo import data
    from nemo_ext.grpo.embedded import HELDOUT, TRAIN, build_reward, build_tools

    files = {"train": run_dir / TRAIN, "heldout": run_dir / HELDOUT}
    if (run_dir / run_folder.CONFIG).is_file() and all(file.is_file() for file in files.values()):
        counts = {side: len(file.read_bytes().splitlines()) for side, file in files.items()}
        print(f"{counts['train']:,} problems to train on, {counts['heldout']:,} held out, as prepared before")
        return counts
    with ExitStack() as stack:
        tools = stack.enter_context(build_tools(keys)) if keys["tools"] else None
        with bar("reading problems", unit="problems") as progress:
            problems = data.load(
                keys["data"], model, question_key=keys["question_key"], answer_key=keys["answer_key"], system=keys["system"],
                prompt=keys["prompt"], template=keys["template"], heldout=keys["heldout"], max_prompt=keys["max_prompt"],
                seed=keys["seed"], tools=tools, progress=progress,
            )  # fmt: skip
        shutil.rmtree(run_dir / TOKENIZER, ignore_errors=True)
        nemo_folder.copy_tokenizer(model, run_dir / TOKENIZER)
        if problems.template is not None:
            (run_dir / TOKENIZER / "chat_template.jinja").write_text(problems.template, encoding="utf-8")
        if keys["filter"]:
            from nemo_ext.data.chat.render import Renderer, Settings
            from nemo_ext.grpo import difficulty

            renderer = Renderer(run_dir / TOKENIZER, Settings(1))
            with bar("answering for filter=true", unit="problems") as progress:
                problems = difficulty.without_extremes(problems, keys, model, progress, tools, renderer)
    for side, rows in (("train", problems.train), ("heldout", problems.heldout)):
        write_atomic(files[side], "".join(json.dumps(row, default=str) + "\n" for row in rows))
    print("\n".join(problems.report()))
    with build_reward(keys) as reward:
        reward.check(problems.train + problems.heldout)
    return {"train": len(problems.train), "heldout": len(problems.heldout)}


def model_folder(checkpoint: Any) -> Path:
    """The checkpoint as a Hugging Face folder; one of NeMo's is converted once."""
    from launchers import prepare

    if checkpoint.kind != "nemo":
        return prepare.as_hf(checkpoint)
    from conversion import convert

    files = [file for file in (checkpoint.path / "weights").glob("*") if file.is_file()]
    target = prepare.cache_folder() / "hf" / f"{checkpoint.path.name}-{prepare.fingerprint(files)}"
    if not target.is_dir():
        convert.command(convert.Options(from_=f"nemo:{checkpoint.path}", to=f"hf:{target}"))
    return target


def _export(run_dir: Path, keys: dict[str, Any]) -> None:
    """Put the last checkpoint's model, without what only training needs, into the run's folder."""
    from conversion.atomic import new_folder

    target, newest = run_dir / run_folder.EXPORT, folder.newest_checkpoint(run_dir)
    if keys["export"] == "none" or target.is_dir():
        return
    if newest is None:
        raise RunError(f"the run is complete, its export is not: {run_dir} holds no checkpoint")
    with new_folder(target) as partial:
        for file in newest[1].iterdir():
            if file.name not in TRAINING_FILES:
                shutil.copyfile(file, partial / file.name)


def _brief(keys: dict[str, Any], planned: Planned) -> str:
    from nemo_ext.report import count_text

    return (
        f"{count_text(planned.parameters)} parameters, embedded engine, {keys['backend']} samples; {keys['prompts']} problems x "
        f"{keys['group']} answers a step, {planned.micro_batch} at once; {planned.total / GIB:.1f} of "
        f"{planned.device_memory / GIB:.1f} GiB"
    )
