"""The one command.

python launchers/run.py                                        lists the recipes
python launchers/run.py recipe=cpt_llama3 --help               shows a recipe's keys
python launchers/run.py recipe=cpt_llama3 nodes=1 gpus=2       runs it; the same command again continues it
python launchers/run.py recipe=cpt_llama3 size=8b plan=true    shows layout and memory, and stops

Exit codes: 0 complete, 1 the run failed, 2 bad input, 128 + signal when a signal stopped it after it saved.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import recipes
from launchers import grammar
from nemo_ext.errors import RunError, UserError

GIB = 2**30
# A run's folder may be continued with other values of these: they change where and how fast, not what is learnt.
FREE_TO_CHANGE = set(
    "nodes gpus tp pp vp cp sp micro_batch recompute overlap device gpu_memory workers every keep async_save "
    "val_every tensorboard wandb out".split()
)


def main(arguments: list[str]) -> int:
    debug = "debug=true" in arguments
    try:
        command = grammar.parse(arguments)
        debug = command.debug
        if command.recipe is None:
            if command.keys or command.overrides:
                raise UserError("recipe= is missing; run without arguments to list the recipes")
            list_recipes()
            return 0
        if command.help:
            method, _ = recipes.split(command.recipe)
            print("\n".join(grammar.help_lines(command.recipe, method.defaults)))
            return 0
        return start(command)
    except (UserError, RunError) as error:
        return _fail(str(error), error.exit_code, debug)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT, debug)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (debug=true shows where)", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def list_recipes() -> None:
    """A line for each recipe, for a person who does not know what to type."""
    width = max(map(len, recipes.names()))
    for name, text in recipes.names().items():
        print(f"{name:<{width}}  {text}")
    print("\npython launchers/run.py recipe=NAME [key=value ...]; recipe=NAME --help shows its keys")


def start(command: grammar.Command) -> int:
    """Plan, prepare, train, report. Returns the exit code."""
    from launchers import local, plan, prepare
    from nemo_ext import report, run_folder
    from nemo_ext.platform import hardware

    method, family = recipes.split(command.recipe)
    machine = hardware.detect()
    if not machine.cuda and command.keys.get("device") != "gpu":
        print("no CUDA device: training on CPU processes over gloo (size=smoke unless model= or size= is given)")
    keys = recipes.resolve(command.recipe, command.keys, cuda=machine.cuda)
    keys["gpus"] = keys["gpus"] or max(1, len(machine.gpus))
    if not command.plan:
        _check_machine(keys, machine)
    checkpoint, architecture = _starting_point(command.recipe, method, family, keys, planning=command.plan)
    planned = plan.plan(architecture, _request(keys, machine))
    keys = {**keys, **_planned_keys(planned)}
    if command.plan:
        print("\n".join(planned.lines()))
        return 0
    if command.overrides:
        _check_overrides(command, keys, architecture)
    keys = _absolute(keys)
    run_dir = Path(keys["out"])
    tokenizer = _tokenizer(keys, checkpoint, architecture)
    with _owned(run_dir):
        _check_same_run(run_dir, command.recipe, keys, command.overrides)
        print(_brief(planned))
        text = prepare.corpus(keys, tokenizer)
        keys["steps"] = keys["steps"] or max(1, text.train_tokens // (keys["seq"] * keys["global_batch"]))
        keys = recipes.finish(keys)
        found = _newest_checkpoint(run_dir)
        _check_disk(run_dir, planned, keys)
        weights = prepare.weights(checkpoint) if checkpoint and not found else None
        if found and found[0] >= keys["steps"] and (run_dir / run_folder.SUMMARY_JSON).is_file():
            print(f"{run_dir} is complete at step {found[0]}")
            print("\n".join(report.terminal_lines(run_folder.read_json(run_dir / run_folder.SUMMARY_JSON))))
            return 0
        grammar.save(run_dir / run_folder.CONFIG, command.recipe, keys, command.overrides)
        run_folder.write_json(run_dir / run_folder.PLAN, planned.to_dict())
        job = {
            "recipe": command.recipe, "keys": keys, "overrides": command.overrides, "architecture": architecture.to_dict(),
            "tokenizer": str(tokenizer), "blend": text.blend(), "weights": str(weights) if weights else None,
            "checkpoint": str(found[1]) if found else None,
        }  # fmt: skip
        run_folder.write_json(run_dir / "job.json", job)
        if found:
            print(f"continuing {run_dir} from step {found[0]}")
        stopped = local.run(run_dir, keys["gpus"], threads=max(1, machine.cpu_count // keys["gpus"]))
        if stopped:
            at = _newest_checkpoint(run_dir)
            print(f"stopped by {stopped.name}; {f'saved at step {at[0]}, ' if at else ''}the same command continues")
            return 128 + stopped
        summary = report.write(run_dir, _facts(command, keys, planned, text, found, architecture, run_dir))
        print("\n".join(report.terminal_lines(summary)))
    return 0


def _check_machine(keys: dict[str, Any], machine) -> None:
    """Refuse what this machine cannot run; planning for another machine is allowed."""
    if keys["device"] == "gpu" and not machine.cuda:
        raise UserError("device=gpu: this machine has no CUDA device; plan=true plans for one")
    if keys["nodes"] > 1:
        raise UserError(f"nodes={keys['nodes']}: executor=local runs on one machine")
    available = len(machine.gpus) if keys["device"] == "gpu" else max(2, machine.cpu_count)
    if keys["gpus"] > available:
        what = f"{available} GPU{'s' if available > 1 else ''}" if keys["device"] == "gpu" else f"room for {available} CPU processes"
        raise UserError(f"gpus={keys['gpus']}: this machine has {what}")


def _starting_point(recipe: str, method, family: str, keys: dict[str, Any], planning: bool):
    """The checkpoint a run starts from (None for random weights) and the model's architecture."""
    from launchers import prepare
    from recipes import models

    if not method.needs_weights:
        if keys["model"]:
            raise UserError(f"model= is for recipe=cpt_{family}: {recipe} starts from random weights")
        return None, recipes.architecture(recipe, keys)
    size = models.size(family, keys["size"])
    if keys["model"]:
        checkpoint = prepare.find(keys["model"])
        shape = prepare.shape(checkpoint)
        wanted = size.architecture.family
        if shape.family != wanted:
            raise UserError(f"model={keys['model']} is a {shape.family} model, recipe={recipe} trains {wanted}")
        return checkpoint, shape
    if planning:
        return None, size.architecture
    if not size.hub:
        raise UserError(f"{recipe} size={keys['size']} has no published weights: give model=hf:FOLDER, or use recipe=pretrain_{family}")
    try:
        checkpoint = prepare.find(size.hub if size.hub == models.EMBEDDED else f"hf:{size.hub}")
    except UserError:
        raise UserError(
            f"{size.hub} is not in Hugging Face's local cache: give model=hf:FOLDER, or start from random weights with recipe=pretrain_{family}"
        ) from None
    return checkpoint, prepare.shape(checkpoint)


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


def _request(keys: dict[str, Any], machine):
    from launchers.plan import Request

    if keys["gpu_memory"]:
        memory = keys["gpu_memory"] * GIB
    elif keys["device"] == "cpu":
        memory = machine.memory_bytes / keys["gpus"]
    elif machine.gpus:
        memory = min(gpu.memory_bytes for gpu in machine.gpus)
    else:
        raise UserError("planning for GPUs this machine does not have: give gpu_memory= in GiB (80 for an H100, 48 for an L40)")
    wanted = {name: keys[name] for name in ("nodes", "gpus", "seq", "global_batch", "micro_batch", "tp", "pp", "vp", "cp", "precision",
                                            "recompute", "distributed_optimizer", "device")}  # fmt: skip
    return Request(**wanted, gpu_memory=memory, sequence_parallel=keys["sp"], cross_entropy="te")


def _planned_keys(planned) -> dict[str, Any]:
    layout = planned.layout
    return {"tp": layout.tp, "pp": layout.pp, "vp": layout.vp or 1, "cp": layout.cp, "sp": layout.sequence_parallel,
            "micro_batch": layout.micro_batch, "recompute": layout.recompute}  # fmt: skip


def _brief(planned) -> str:
    from nemo_ext.report import layout_text

    memory = planned.memory.total / GIB
    device = "process" if planned.request.device == "cpu" else "GPU"
    return (
        f"{planned.parameters / 1e9:.2f} B parameters, {layout_text(dataclasses.asdict(planned.layout))}, "
        f"{planned.tokens_per_step:,} tokens a step, {memory:.1f} of {planned.request.gpu_memory / GIB:.1f} GiB a {device}"
    )


def _check_overrides(command: grammar.Command, keys: dict[str, Any], architecture) -> None:
    """Build the recipe here, before anything is prepared, so that a wrong path or type stops the command."""
    recipes.load(command.recipe, shape=architecture, overrides=command.overrides, **keys)


def _absolute(keys: dict[str, Any]) -> dict[str, Any]:
    """Paths as absolute ones, so that a saved configuration works from any folder."""

    def absolute(text: str) -> str:
        prefix, separator, rest = text.partition(":")
        if separator and prefix in ("hf", "gguf", "nemo"):
            return f"{prefix}:{Path(rest).expanduser().absolute()}" if Path(rest).expanduser().exists() else text
        path, separator, weight = text.rpartition(":")
        if separator and Path(path).expanduser().exists():
            return f"{Path(path).expanduser().absolute()}:{weight}"
        return str(Path(text).expanduser().absolute()) if Path(text).expanduser().exists() or any(c in text for c in "*?/") else text

    changed = dict(keys)
    for name in ("model", "tokenizer"):
        changed[name] = absolute(keys[name]) if keys[name] else None
    changed["out"] = str(Path(keys["out"]).expanduser().absolute())
    changed["data"] = [absolute(str(d)) for d in keys["data"]] if isinstance(keys["data"], list) else absolute(str(keys["data"]))
    return changed


@contextmanager
def _owned(run_dir: Path):
    """Hold the run's folder: two commands never write into one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"out={run_dir}: another command is running there") from None
        yield


def _check_same_run(run_dir: Path, recipe: str, keys: dict[str, Any], overrides: dict[str, Any]) -> None:
    """A folder continues only the run it holds: refuse other values of what decides the result."""
    from nemo_ext import run_folder

    if not (run_dir / run_folder.CONFIG).is_file():
        return
    held = grammar.read_config(run_dir / run_folder.CONFIG)
    wanted = {"recipe": recipe, **{k: v for k, v in keys.items() if v is not None}, **overrides}
    changed = [k for k, v in wanted.items() if k not in FREE_TO_CHANGE and held.get(k) != v]
    changed += [k for k in held if "." in k and k not in overrides]
    if changed:
        shown = ", ".join(f"{k}={held.get(k)} and not {wanted.get(k)}" for k in changed[:3])
        raise UserError(f"out={run_dir} holds a run with {shown}: give another out=, or the same keys to continue it")


def _newest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    from nemo_ext import run_folder

    return run_folder.newest_checkpoint(run_dir / run_folder.CHECKPOINTS)


def _check_disk(run_dir: Path, planned, keys: dict[str, Any]) -> None:
    """Refuse a run whose checkpoints will not fit: weights, fp32 copies and moments, `keep` of them and one being written."""
    if not keys["keep"]:
        return
    bytes_each = planned.parameters * (12 if keys["precision"] == "fp32" else 14)
    need = bytes_each * (min(keys["keep"], max(1, keys["steps"] // keys["every"])) + 1)
    free = shutil.disk_usage(run_dir).free
    if need > free:
        raise UserError(
            f"out={run_dir}: checkpoints need {need / GIB:.1f} GiB (keep={keys['keep']} and one being written), {free / GIB:.1f} GiB are free: lower keep= or give another out="
        )


def _facts(command, keys, planned, text, found, architecture, run_dir) -> dict[str, Any]:
    newest = _newest_checkpoint(run_dir)
    return {
        "recipe": command.recipe,
        "parameters": planned.parameters,
        "layout": dataclasses.asdict(planned.layout),
        "resumed_from_step": found[0] if found else 0,
        "train_tokens": text.train_tokens,
        "heldout_tokens": text.heldout_tokens,
        "checkpoint": str(newest[1]) if newest else None,
        "planned_memory": planned.memory.total / GIB,
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
