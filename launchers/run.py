"""The one command.

python launchers/run.py                                        lists the recipes
python launchers/run.py recipe=cpt_llama3 --help               shows a recipe's keys
python launchers/run.py recipe=cpt_llama3 nodes=1 gpus=2       runs it; the same command again continues it
python launchers/run.py recipe=cpt_llama3 size=8b plan=true    shows layout and memory, and stops

Exit codes: 0 complete, 1 the run failed, 2 bad input, 128 + signal when a signal stopped it after it saved.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import recipes
from launchers import folder, grammar, inputs
from launchers.worker import JOB
from nemo_ext.command_line import ending
from nemo_ext.errors import RunError, UserError, explain
from recipes.grpo import GrpoKeys
from recipes.keys import fields

GIB = 2**30
# A run's folder may be continued with other values of these: they change where and how fast, not what is learnt.
FREE_TO_CHANGE = set(
    "nodes gpus tp pp vp cp ep sp micro_batch recompute overlap device gpu_memory workers every keep async_save "
    "val_every tensorboard wandb out export preview answers".split()
)


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
            print("\n".join(grammar.help_lines(command.recipe, method.defaults)))
        elif recipes.schema(command.recipe) is GrpoKeys:
            from launchers import grpo

            end.code = grpo.start(command)
        else:
            end.code = start(command)
    return end.code


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
        raise UserError("dryrun=true is for engine=nemo_rl; plan=true shows what would run")
    method, family = recipes.split(command.recipe)
    machine = hardware.detect()
    if not machine.cuda and command.keys.get("device") != "gpu":
        print("no CUDA device: training on CPU processes over gloo (size=smoke unless model= or size= is given)")
    keys = recipes.resolve(command.recipe, command.keys, cuda=machine.cuda)
    keys["gpus"] = keys["gpus"] or max(1, len(machine.gpus))
    if command.plan:
        _, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=True)
        share = _trained(method, keys, architecture) / architecture.num_parameters()
        print("\n".join(plan.plan(architecture, _request(keys, machine, share, method.nf4)).lines()))
        return 0
    _check_machine(keys, machine)
    keys = inputs.absolute(keys, ("model", "tokenizer"))
    run_dir = Path(keys["out"])
    with folder.owned(run_dir):
        _check_same_run(run_dir, command, {k: v for k, v in keys.items() if v is not None})
        if (summary := folder.complete(run_dir)) is not None:
            _export(run_dir, keys, method.adapter)
            return _done(f"{run_dir} is complete at step {summary['steps']}", summary)
        return _run(command, keys, machine, run_dir)


def _run(command: grammar.Command, keys: dict[str, Any], machine, run_dir: Path) -> int:
    """`start`, of a run that is not complete and whose folder is held."""
    from launchers import local, plan, prepare
    from nemo_ext import report, run_folder

    method, family = recipes.split(command.recipe)
    checkpoint, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=False)
    if method.adapter and keys["export"] == "hf" and checkpoint.kind == "nemo":
        raise UserError(f"export=hf merges the adapter into a Hugging Face model, and model={keys['model']} is none: export=lora")
    trained = _trained(method, keys, architecture)
    planned = plan.plan(architecture, _request(keys, machine, trained / architecture.num_parameters(), method.nf4))
    keys = {**keys, **_planned_keys(planned)}
    recipes.check_layout(command.recipe, keys)
    if command.overrides:
        _check_overrides(command, keys, architecture)
    tokenizer = _tokenizer(keys, checkpoint, architecture)
    print(_brief(planned, trained))
    text = prepare.conversations(keys, tokenizer) if method.conversations else prepare.corpus(keys, tokenizer)
    rows = keys["epochs"] * prepare.rows_per_epoch(text, keys)
    keys["steps"] = keys["steps"] or max(1, int(rows // keys["global_batch"]))
    keys = recipes.finish(keys)
    _check_same_run(run_dir, command, keys)
    found = folder.usable_checkpoint(run_dir)
    started_at = found[0] if found else 0
    if started_at < keys["steps"]:
        folder.check_disk(run_dir, trained * (12 if keys["precision"] == "fp32" else 14), keys)
        weights = prepare.weights(checkpoint) if checkpoint and (method.adapter or not found) else None
        adapter = keys if method.adapter else None
        template = getattr(text, "template", None)
        prepare.describe(run_dir, architecture, tokenizer, checkpoint, template, adapter, method.adapter or "lora")
        grammar.save(run_dir / run_folder.CONFIG, command.recipe, keys, command.overrides)
        run_folder.write_json(run_dir / run_folder.PLAN, planned.to_dict())
        job = {
            "recipe": command.recipe, "keys": keys, "overrides": command.overrides, "architecture": architecture.to_dict(),
            "tokenizer": str(tokenizer), "blend": text.blend(), "weights": str(weights) if weights else None,
            "checkpoint": str(found[1]) if found else None, "resumed_from_step": started_at,
        }  # fmt: skip
        run_folder.write_json(run_dir / JOB, job)
        if found:
            print(f"continuing {run_dir} from step {started_at}")
        stopped = local.run(run_dir, keys["gpus"], threads=max(1, machine.cpu_count // keys["gpus"]), max_steps=keys["steps"])
        if stopped:
            print(f"stopped by {stopped.name}; the same command continues {folder.place(run_dir)}")
            return 128 + stopped
    else:  # killed between its last checkpoint and its summary
        started_at = (run_folder.read_json(run_dir / JOB) or {}).get("resumed_from_step", 0)
    try:
        summary = report.write(run_dir, _facts(command, keys, planned, text, started_at, run_dir))
    except OSError as error:
        raise RunError(f"the run is complete, its summary is not: {explain(error, run_dir)}") from error
    _export(run_dir, keys, method.adapter)
    if method.conversations and keys["answers"] and (run_dir / run_folder.EXPORT).is_dir():
        from launchers import answers

        before = prepare.as_hf(checkpoint) if checkpoint.kind != "nemo" else None
        rows = answers.side_by_side(text, before, run_dir / run_folder.EXPORT, keys["answers"])
        facts = _facts(command, keys, planned, text, started_at, run_dir)
        summary = report.write(run_dir, {**facts, "answers": rows})
    return _done("", summary)


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


def _done(headline: str, summary: dict[str, Any]) -> int:
    from nemo_ext import report

    print("\n".join(filter(None, [headline, *report.terminal_lines(summary)])))
    return 0


def _check_machine(keys: dict[str, Any], machine) -> None:
    """Refuse what this machine cannot run; planning for another machine is allowed."""
    if keys["device"] == "gpu" and not machine.cuda:
        raise UserError("device=gpu: this machine has no CUDA device; plan=true plans for one")
    if keys["export"] and not keys["keep"]:
        raise UserError(f"export={keys['export']} converts the last checkpoint, and keep=0 saves none: keep=1")
    if keys["nodes"] > 1:
        raise UserError(f"nodes={keys['nodes']}: executor=local runs on one machine")
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


def _trained(method, keys: dict[str, Any], architecture) -> int:
    """Parameters that have gradients and optimizer states."""
    from nemo_ext import adapters

    if not method.adapter:
        return architecture.num_parameters()
    return adapters.trained(architecture, method.adapter, keys)


def _request(keys: dict[str, Any], machine, trainable: float, nf4: bool):
    from launchers.plan import Request

    if keys["gpu_memory"]:
        memory = keys["gpu_memory"] * GIB
    elif keys["device"] == "cpu":
        memory = machine.memory_bytes / keys["gpus"]
    elif machine.gpus:
        memory = min(gpu.memory_bytes for gpu in machine.gpus)
    else:
        raise UserError("planning for GPUs this machine does not have: give gpu_memory= in GiB (80 for an H100, 48 for an L40)")
    names = "nodes gpus seq global_batch micro_batch tp pp vp cp ep precision recompute distributed_optimizer device double_quant"
    wanted = {"nf4": nf4, **{name: keys[name] for name in names.split()}}
    return Request(**wanted, gpu_memory=memory, trainable=trainable, sequence_parallel=keys["sp"], cross_entropy="te")


def _planned_keys(planned) -> dict[str, Any]:
    layout = planned.layout
    return {"tp": layout.tp, "pp": layout.pp, "vp": layout.vp or 1, "cp": layout.cp, "ep": layout.ep,
            "sp": layout.sequence_parallel, "micro_batch": layout.micro_batch, "recompute": layout.recompute}  # fmt: skip


def _brief(planned, trained: int) -> str:
    from nemo_ext.report import batch_text, count_text, layout_text

    layout, memory = dataclasses.asdict(planned.layout), planned.memory.total / GIB
    device = "process" if planned.request.device == "cpu" else "GPU"
    only = f", {count_text(trained)} trained" if trained < planned.parameters else ""
    return (
        f"{count_text(planned.parameters)} parameters{only}; {layout_text(layout)}; {planned.tokens_per_step:,} tokens a step in "
        f"{batch_text(layout)}; {memory:.1f} of {planned.request.gpu_memory / GIB:.1f} GiB a {device}"
    )


def _check_overrides(command: grammar.Command, keys: dict[str, Any], architecture) -> None:
    """Build the recipe here, before anything is prepared, so that a wrong path or type stops the command."""
    recipes.load(command.recipe, shape=architecture, overrides=command.overrides, **keys)


def _check_same_run(run_dir: Path, command: grammar.Command, keys: dict[str, Any]) -> None:
    defaults = {name: field.default for name, field in fields().items()}
    folder.check_same_run(run_dir, command.recipe, keys, command.overrides, free=FREE_TO_CHANGE, defaults=defaults)


def _facts(command: grammar.Command, keys: dict[str, Any], planned, text, started_at: int, run_dir: Path) -> dict[str, Any]:
    from nemo_ext import run_folder

    newest = folder.newest_checkpoint(run_dir)
    return {
        "recipe": command.recipe,
        "parameters": planned.parameters,
        "layout": dataclasses.asdict(planned.layout),
        "resumed_from_step": started_at,
        "train_tokens": text.train_tokens,
        "heldout_tokens": text.heldout_tokens,
        "checkpoint": str(newest[1]) if newest else None,
        "peak_memory": peak / GIB if (peak := run_folder.peak_memory(run_dir)) else None,
        "planned_memory": (planned.memory.total if keys["device"] == "cpu" else planned.memory.allocated) / GIB,
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
