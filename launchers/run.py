"""The one command.

python launchers/run.py                                        lists the recipes
python launchers/run.py recipe=cpt_llama3 --help               shows a recipe's keys
python launchers/run.py recipe=cpt_llama3 nodes=1 gpus=2       runs it; the same command again continues it
python launchers/run.py recipe=cpt_llama3 size=8b plan=true    shows layout and memory, and stops
python launchers/run.py recipe=cpt_llama3 nodes=2 gpus=8 executor=slurm partition=h100      submits it

Exit codes: 0 complete, 1 the run failed, 2 bad input, 128 + signal when a signal stopped it after it saved.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import recipes
from launchers import allocation, executors, folder, grammar, inputs, layout, senses
from launchers.memory import element_bytes
from nemo_ext.command_line import ending
from nemo_ext.errors import RunError, UserError, explain
from recipes import device
from recipes.grpo import GrpoKeys
from recipes.keys import bytes_per_parameter

GIB = 2**30


def main(arguments: list[str]) -> int:
    with ending("debug=true" in arguments, "the same command goes on") as end:
        command = grammar.parse(arguments)
        end.debug = command.debug
        if command.recipe is None:
            if command.keys or command.overrides:
                raise UserError("recipe= is missing; run without arguments to list the recipes")
            list_recipes()
        elif command.help:
            method, _ = recipes.split(command.recipe)
            print("\n".join(grammar.help_lines(command.recipe, method.defaults, command.executor)))
        elif (submit := executors.submitter(command.executor)) is not None:
            end.code = submit(command)
        elif command.sweep:
            from launchers import sweep

            end.code = sweep.run(command, launch)
        else:
            end.code = launch(command)
    return end.code


def launch(command: grammar.Command) -> int:
    """Train on this machine, whatever the recipe, or do one step of it in a cluster's job. Returns the exit code."""
    if recipes.schema(command.recipe) is GrpoKeys:
        from launchers import grpo

        return grpo.start(command)
    return start(command)


def list_recipes() -> None:
    """A line for each recipe, for a person who does not know what to type."""
    width = max(map(len, recipes.names()))
    for name, text in recipes.names().items():
        print(f"{name:<{width}}  {text}")
    print("\npython launchers/run.py recipe=NAME [key=value ...]; recipe=NAME --help shows its keys")


def start(command: grammar.Command) -> int:
    """Plan, prepare, train, report. Returns the exit code."""
    from launchers import plan
    from nemo_ext.platform import hardware

    if command.dryrun:
        raise UserError("dryrun=true is for executor=slurm, executor=k8s and engine=nemo_rl; plan=true shows what would run")
    method, family = recipes.split(command.recipe)
    machine = hardware.detect()
    if not machine.cuda and not {"device", "gpu"} & set(command.keys):
        print("no CUDA device: training on CPU processes over gloo (size=smoke unless model= or size= is given)")
    keys = recipes.resolve(command.recipe, command.keys, cuda=machine.cuda)
    keys["gpus"] = keys["gpus"] or max(1, len(machine.gpus))
    if command.plan:
        checkpoint, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=True)
        planned = plan.plan(architecture, senses.request(method, keys, machine, checkpoint, architecture))
        recipes.check_layout(command.recipe, {**keys, **layout.keys_of(planned)}, architecture)
        print("\n".join([*planned.lines(), *device.lines(keys, command.keys, planned.request.gpu)]))
        return 0
    _check_machine(keys, machine, command.executor)
    keys = inputs.absolute(keys, inputs.PATHS)
    run_dir = Path(keys["out"])
    return allocation.hold(
        command, run_dir, keys, export=lambda: _export(run_dir, keys, recipes.saves_part(method, keys)),
        run=lambda: _run(command, keys, machine, run_dir),
    )  # fmt: skip


def _run(command: grammar.Command, keys: dict[str, Any], machine, run_dir: Path) -> int:
    """`start`, of a run that is not complete and whose folder is held: all of it, or the step that an allocation asks for."""
    from launchers import local

    threads = max(1, machine.cpu_count // keys["gpus"])

    def train(ready: _Ready) -> signal.Signals | None:
        keys = ready.keys
        return local.run(run_dir, keys["gpus"], threads, max_steps=keys["steps"], restarts=keys["restarts"], ahead=ahead)

    def start_workers() -> None:
        if machine.cuda and allocation.phase(command) is None:  # a CPU has its hands full
            ahead.start(run_dir, keys["gpus"], threads)

    if allocation.phase(command) == allocation.FINISH and "preview" in keys:
        keys = {**keys, "preview": 0}  # shown before training
    with local.Ahead() as ahead:
        return allocation.carry_out(
            command, run_dir, ready=lambda: _ready(command, keys, machine, run_dir, start_workers),
            hand_over=_hand_over, train=train, finish=_finish,
        )  # fmt: skip


@dataclass(frozen=True)
class _Ready:
    """A run whose layout, tokenizer and data are known: `keys` are final."""

    command: grammar.Command
    keys: dict[str, Any]
    run_dir: Path
    checkpoint: Any
    architecture: Any
    planned: Any
    trained: int
    tokenizer: Path
    text: Any
    senses: list[dict[str, Any]] | None


def _ready(command: grammar.Command, keys: dict[str, Any], machine, run_dir: Path, start_workers: Callable[[], None]) -> _Ready:
    """Plan the run and prepare its data, which is quick when it was done before. `start_workers` is called in between."""
    from launchers import plan, prepare

    method, family = recipes.split(command.recipe)
    prepare.sources(method, keys)  # what is not there is said before anything is made
    checkpoint, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=False)
    if recipes.saves_part(method, keys) and keys["export"] == "hf" and checkpoint.kind == "nemo":
        raise UserError(f"export=hf merges the adapter into a Hugging Face model, and model={keys['model']} is none: export=lora")
    request = senses.request(method, keys, machine, checkpoint, architecture)
    trained = layout.trained(method, keys, architecture) + (request.tower.trained if request.tower else 0)
    planned = plan.plan(architecture, request)
    keys = {**keys, **layout.keys_of(planned)}
    recipes.check_layout(command.recipe, keys, architecture)
    if command.overrides:
        _check_overrides(command, keys, architecture)
    media = None
    if method.modality:
        checkpoint = senses.whole(checkpoint, keys, method.modality)
        architecture, media = prepare.shape(checkpoint), senses.inputs(checkpoint, keys, method.modality)
    tokenizer = _tokenizer(keys, checkpoint, architecture)
    print(layout.brief(planned, trained))
    start_workers()
    text = prepare.conversations(keys, tokenizer, media) if method.conversations else prepare.corpus(keys, tokenizer)
    rows = keys["epochs"] * prepare.rows_per_epoch(text, keys)
    keys["steps"] = keys["steps"] or max(1, int(rows // keys["global_batch"]))
    keys = recipes.finish(keys)
    folder.check_same_run(run_dir, command, keys)
    return _Ready(command, keys, run_dir, checkpoint, architecture, planned, trained, tokenizer, text, media)


def _hand_over(ready: _Ready) -> bool:
    """Write down what the workers need; False where all steps are made: the run was killed before its summary."""
    from launchers import prepare

    command, keys, run_dir = ready.command, ready.keys, ready.run_dir
    method, _ = recipes.split(command.recipe)
    found = folder.usable_checkpoint(run_dir)
    if found and found[0] >= keys["steps"]:
        return False
    partial = recipes.saves_part(method, keys)
    size = ready.trained * bytes_per_parameter(keys)
    if not partial:  # a checkpoint holds what is frozen too
        size += (ready.planned.parameters - ready.trained) * element_bytes(keys["precision"])
    folder.check_disk(run_dir, size, keys)
    weights = prepare.weights(ready.checkpoint) if ready.checkpoint and (partial or not found) else None
    adapter = keys if partial else None
    template = getattr(ready.text, "template", None)
    kind = recipes.adapter(method, keys)
    prepare.describe(run_dir, ready.architecture, ready.tokenizer, ready.checkpoint, template, adapter, kind, nf4=method.nf4)
    job = {
        "architecture": ready.architecture.to_dict(), "tokenizer": str(ready.tokenizer), "blend": ready.text.blend(),
        "weights": str(weights) if weights else None, "senses": ready.senses,
    }  # fmt: skip
    folder.hand_over(run_dir, command, keys, ready.planned.to_dict(), found, job)
    return True


def _finish(ready: _Ready) -> None:
    """Report on a run that has made all its steps, and export it."""
    from launchers import prepare
    from nemo_ext import report, run_folder

    keys, run_dir = ready.keys, ready.run_dir
    method, _ = recipes.split(ready.command.recipe)
    try:
        summary = report.write(run_dir, _facts(ready))
    except OSError as error:
        raise RunError(f"the run is complete, its summary is not: {explain(error, run_dir)}") from error
    _export(run_dir, keys, recipes.saves_part(method, keys))
    if method.conversations and keys["answers"] and (run_dir / run_folder.EXPORT).is_dir():
        from launchers import answers

        before = prepare.as_hf(ready.checkpoint) if ready.checkpoint.kind != "nemo" else None
        if ready.senses:
            found = answers.with_media(ready.text, ready.senses, before, run_dir, keys["answers"], keys["scored"])
        else:
            found = {"answers": answers.side_by_side(ready.text, before, run_dir / run_folder.EXPORT, keys["answers"])}
        summary = report.write(run_dir, {**_facts(ready), **found})
    allocation.show(summary)


def _export(run_dir: Path, keys: dict[str, Any], adapter: bool) -> None:
    """Convert the last checkpoint where `export=` asks for it, and compare what both models compute.

    An adapter becomes PEFT's and, for a Hugging Face folder, is merged into its base.
    """
    from nemo_ext import run_folder

    if keys["export"] is None:
        return
    from conversion import convert, nemo_folder

    options = [convert.Options(from_=f"nemo:{run_dir}", to=f"hf:{run_dir / run_folder.EXPORT}")]
    if adapter:
        peft = run_dir / run_folder.ADAPTER
        base = (run_folder.read_json(run_dir / run_folder.MODEL / nemo_folder.ADAPTER) or {}).get("base")
        merged = convert.Options(from_=f"lora:{peft}", base=f"hf:{base}", to=f"hf:{run_dir / run_folder.EXPORT}")
        options = [convert.Options(from_=f"nemo:{run_dir}", to=f"lora:{peft}"), *([merged] if keys["export"] == "hf" else [])]
    try:
        for each in options:
            target = Path(each.to.partition(":")[2])
            if not target.exists():
                convert.command(each)
            if adapter:  # with the template that it was trained with
                shutil.copytree(run_dir / run_folder.MODEL / nemo_folder.TOKENIZER, target, dirs_exist_ok=True)
    except (UserError, RunError) as error:
        raise RunError(f"the run is complete, its export is not: {error}") from error


def _check_machine(keys: dict[str, Any], machine, executor: str) -> None:
    """Refuse what this machine, or with executor=allocation one of several like it, cannot run; planning for another machine is
    allowed."""
    if keys["device"] == "gpu" and not machine.cuda:
        raise UserError("device=gpu: this machine has no CUDA device; plan=true plans for one")
    if keys["export"] and not keys["keep"]:
        raise UserError(f"export={keys['export']} converts the last checkpoint, and keep=0 saves none: keep=1")
    if keys["nodes"] > 1 and executor == "local":
        raise UserError(f"nodes={keys['nodes']}: executor=local runs on one machine, executor=slurm on more")
    available = len(machine.gpus) if keys["device"] == "gpu" else max(2, machine.cpu_count)
    if keys["gpus"] > available:
        gpus = f"{available} GPU{'s' if available > 1 else ''}"
        what = gpus if keys["device"] == "gpu" else f"room for {available} CPU processes"
        raise UserError(f"gpus={keys['gpus']}: this machine has {what}")


def _tokenizer(keys: dict[str, Any], checkpoint, architecture) -> Path:
    """The tokenizer's folder: the one asked for, the checkpoint's, or the embedded model's."""
    from launchers import prepare
    from recipes.models import EMBEDDED

    if keys["tokenizer"]:
        folder = Path(keys["tokenizer"])
        if not folder.is_dir():
            raise UserError(f"tokenizer={folder}: there is no such folder")
    else:
        folder = prepare.tokenizer_folder(checkpoint or prepare.find(EMBEDDED))
    prepare.check_tokenizer(folder, architecture)
    return folder


def _check_overrides(command: grammar.Command, keys: dict[str, Any], architecture) -> None:
    """Build the recipe here, before anything is prepared, so that a wrong path or type stops the command."""
    recipes.load(command.recipe, shape=architecture, overrides=command.overrides, **keys)


def _facts(ready: _Ready) -> dict[str, Any]:
    planned = ready.planned
    return {
        **folder.facts(ready.run_dir, ready.command),
        "parameters": planned.parameters,
        "layout": dataclasses.asdict(planned.layout),
        "train_tokens": ready.text.train_tokens,
        "heldout_tokens": ready.text.heldout_tokens,
        "planned_memory": (planned.memory.total if ready.keys["device"] == "cpu" else planned.memory.allocated) / GIB,
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
