"""`recipe=grpo_FAMILY engine=nemo_rl`: what launchers/grpo.py does for the embedded engine, for NeMo-RL in its container.

Planning and the configuration are tested; starting needs the container and is untested (docs/grpo.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import recipes
from launchers import folder, grammar, grpo, inputs
from launchers import nemo_rl_engine as engine
from nemo_ext import run_folder
from nemo_ext.errors import UserError
from nemo_ext.grpo.nemo_rl import emit, problems, tree

GIB = 2**30


def start(command: grammar.Command, keys: dict[str, Any], machine: Any) -> int:
    """Plan, prepare, train through NeMo-RL, report. Returns the exit code."""
    method, family = recipes.split(command.recipe)
    version = tree.choose(keys["nemo_rl_version"], tree.installed())
    keys["gpus"] = keys["gpus"] or max(1, len(machine.gpus))
    if keys["filter"]:
        raise UserError(
            "filter=true: it samples with the embedded engine's device before a run: filter the data with engine=embedded"
        )
    if keys["recompute"] is not None:
        raise UserError(f"recompute={str(keys['recompute']).lower()}: with engine=nemo_rl the planner decides it")
    if command.plan:
        _, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=True)
        print("\n".join(engine.plan(keys, architecture, _gpu_memory(keys, machine), version).lines()))
        return 0
    engine.require_local(keys)
    keys = inputs.absolute(keys, grpo.PATHS)
    run_dir = Path(keys["out"])
    with folder.owned(run_dir):
        grpo.check_same_run(run_dir, command, {k: v for k, v in keys.items() if v is not None})
        if (summary := folder.complete(run_dir)) is not None:
            return grpo.done(f"{run_dir} is complete at step {summary['steps']}", summary)
        return _run(command, keys, machine, run_dir, version)


def _run(command: grammar.Command, keys: dict[str, Any], machine: Any, run_dir: Path, version: str) -> int:
    from nemo_ext import report
    from nemo_ext.grpo.embedded import HELDOUT, TRAIN, read_rows

    method, family = recipes.split(command.recipe)
    checkpoint, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=False)
    planned = engine.plan(keys, architecture, _gpu_memory(keys, machine), version)
    print("\n".join(planned.lines()))
    model = grpo.model_folder(checkpoint)
    counts = grpo.prepare_problems(run_dir, keys, model)
    steps = keys["steps"] or max(1, int(keys["epochs"] * counts["train"] // keys["prompts"]))
    keys = recipes.grpo.finish({**planned.keys, "steps": steps})
    grpo.check_same_run(run_dir, command, keys)
    rows = {side: run_dir / "nemo_rl" / f"{side}.jsonl" for side in ("train", "heldout")}
    problems.write(rows["train"], read_rows(run_dir / TRAIN))
    problems.write(rows["heldout"], read_rows(run_dir / HELDOUT)[: keys["val_samples"]])
    template = run_dir / grpo.TOKENIZER / "chat_template.jinja"
    paths = emit.Paths(
        model=str(model), train=str(rows["train"]), validation=str(rows["heldout"]) if counts["heldout"] else None,
        run=str(run_dir), template=str(template) if template.is_file() else None,
    )  # fmt: skip
    chosen = engine.Planned(keys, planned.recompute, planned.policy, planned.generation, planned.reference)
    engine.write(run_dir, engine.configuration(chosen, architecture, paths, version, command.overrides))
    grammar.save(run_dir / run_folder.CONFIG, command.recipe, keys, command.overrides)
    engine.run_local(run_dir, version)
    newest = engine.newest_checkpoint(run_dir)
    summary = report.write(run_dir, {
        "recipe": command.recipe, "engine": f"NeMo-RL {version}", "parameters": planned.policy.parameters,
        "problems": counts["train"], "heldout_problems": counts["heldout"], "checkpoint": str(newest[1]) if newest else None,
    })  # fmt: skip
    if keys["export"] == "hf" and not (run_dir / run_folder.EXPORT).is_dir():
        engine.export(run_dir, run_dir / run_folder.EXPORT)
    return grpo.done("", summary)


def _gpu_memory(keys: dict[str, Any], machine: Any) -> float:
    if keys["gpu_memory"]:
        return keys["gpu_memory"] * GIB
    if machine.gpus:
        return min(gpu.memory_bytes for gpu in machine.gpus)
    raise UserError("planning for GPUs this machine does not have: give gpu_memory= in GiB (80 for an H100, 48 for an L40)")
