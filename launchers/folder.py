"""Who writes a run's folder, whether a command may continue what is in it, and from where."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import recipes
from launchers import grammar
from launchers.worker import JOB
from nemo_ext import run_folder
from nemo_ext.command_line import keys_of
from nemo_ext.disk import LOCK, held
from nemo_ext.errors import UserError, free_bytes
from recipes.grpo import GrpoKeys
from recipes.keys import TrainKeys

GIB = 2**30
# A run's folder may be continued with other values of these: they change where, how fast and how long, not what is learnt.
FREE_TO_CHANGE = {
    TrainKeys: set(
        "nodes gpus tp pp vp cp ep sp balance_stages micro_batch recompute overlap cuda_graphs attention device gpu gpu_memory "
        "workers every keep async_save val_every tensorboard wandb out export preview answers scored profile "
        "restarts hang_timeout on_nan on_spike spike_factor spike_window straggler_factor".split()
    ),
    GrpoKeys: set(
        "nodes gpus tp pp cp ep generation_tp generation_gpus micro_batch recompute device gpu gpu_memory every keep val_every "
        "tensorboard wandb out export answers dynamic_limit reward_timeout tool_timeout sandbox_memory judge_key_env backend "
        "restarts hang_timeout on_nan".split()
    ),
}


@contextmanager
def owned(run_dir: Path, patience: float = 0) -> Iterator[None]:
    """Hold the run's folder (`nemo_ext.disk.held`). A new one goes again if nothing came to lie in it."""
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    with held(run_dir, patience):
        try:
            yield
        finally:
            if new and [path.name for path in run_dir.iterdir()] == [LOCK]:
                (run_dir / LOCK).unlink()
                for folder in new:
                    folder.rmdir()


def check_same_run(run_dir: Path, command: grammar.Command, keys: dict[str, Any]) -> None:
    """A folder continues only the run it holds: refuse other values of what decides the result, which `FREE_TO_CHANGE` does not.

    Keys that are newer than the folder have had their defaults. Raises UserError.
    """
    if not (run_dir / run_folder.CONFIG).is_file():
        return
    try:
        held = grammar.read_config(run_dir / run_folder.CONFIG)
    except UserError as error:
        raise UserError(f"out={run_dir} holds a run that cannot be read ({error}): give another out=") from None
    schema = recipes.schema(command.recipe)
    free, defaults = FREE_TO_CHANGE[schema], {name: field.default for name, field in keys_of(schema).items()}
    wanted = {"recipe": command.recipe, **keys, **command.overrides}
    changed = [k for k, v in wanted.items() if k not in free and held.get(k, defaults.get(k)) != v]
    changed += [k for k in held if "." in k and k not in command.overrides]
    if changed:
        shown = ", ".join(f"{k}={held.get(k)} and not {wanted.get(k)}" for k in changed[:3])
        raise UserError(f"out={run_dir} holds a run with {shown}: give another out=, or the same keys to continue it")


def complete(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a run that has made all its steps."""
    summary = run_folder.read_json(run_dir / run_folder.SUMMARY_JSON)
    if summary is None or not (run_dir / run_folder.CONFIG).is_file():
        return None
    steps = grammar.read_config(run_dir / run_folder.CONFIG).get("steps")
    return summary if steps and summary.get("steps", 0) >= steps else None


def newest_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """The newest checkpoint as (step, path)."""
    return run_folder.newest_checkpoint(run_dir / run_folder.CHECKPOINTS)


def place(at: tuple[int, Path] | None) -> str:
    """Where a run goes on whose newest checkpoint (step and path) is `at`, in words."""
    return f"from step {at[0]}, {at[1]}" if at else "from the start"


def usable_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """The newest checkpoint that is as it was written. Half-written ones are removed, damaged ones set aside."""
    run_folder.clear_partial(run_dir / run_folder.CHECKPOINTS)
    while (found := newest_checkpoint(run_dir)) and (damage := run_folder.damage(found[1])):
        aside = found[1].with_name(found[1].name + run_folder.DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        found[1].rename(aside)
        print(f"{found[1]} is damaged ({damage}): set aside as {aside.name}", file=sys.stderr)
    if not found and any((run_dir / run_folder.CHECKPOINTS).glob(f"*{run_folder.DAMAGED}")):
        raise UserError(f"out={run_dir}: no checkpoint is left undamaged: give another out=, or remove the folder to start anew")
    return found


def check_disk(run_dir: Path, bytes_each: float, keys: dict[str, Any]) -> None:
    """Refuse a run whose checkpoints, of `bytes_each`, will not fit: `keep` of them and one being written. Raises UserError."""
    if not keys["keep"]:
        return
    count = min(keys["keep"], max(1, keys["steps"] // keys["every"]))
    count += 1 - len(run_folder.checkpoints(run_dir / run_folder.CHECKPOINTS))  # of an earlier start: they are there
    need, free = bytes_each * count, free_bytes(run_dir)
    if need > free:
        raise UserError(
            f"out={run_dir}: checkpoints need {need / GIB:.1f} GiB (keep={keys['keep']} and one being written), "
            f"{free / GIB:.1f} GiB are free: make space, lower keep= or give another out="
        )


def hand_over(
    run_dir: Path, command: grammar.Command, keys: dict[str, Any], plan: dict, found: tuple[int, Path] | None, job: dict
) -> None:
    """Write down what the workers need: the `job` of their engine, and from where they go on, the checkpoint `found`."""
    grammar.save(run_dir / run_folder.CONFIG, command.recipe, keys, command.overrides)
    run_folder.write_json(run_dir / run_folder.PLAN, plan)
    started_at, checkpoint = found or (0, None)
    place = {"checkpoint": str(checkpoint) if found else None, "resumed_from_step": started_at}
    common = {"recipe": command.recipe, "keys": keys, "overrides": command.overrides}
    run_folder.write_json(run_dir / JOB, common | job | place)
    if found:
        print(f"continuing {run_dir} from step {started_at}")


def facts(run_dir: Path, command: grammar.Command) -> dict[str, Any]:
    """What the folder of a run that has made all its steps tells its report."""
    newest = newest_checkpoint(run_dir)
    return {
        "recipe": command.recipe,
        "resumed_from_step": (run_folder.read_json(run_dir / JOB) or {}).get("resumed_from_step", 0),
        "checkpoint": str(newest[1]) if newest else None,
        "peak_memory": peak / GIB if (peak := run_folder.peak_memory(run_dir)) else None,
    }
