"""`recipe=grpo_FAMILY engine=nemo_rl`: what launchers/grpo.py does for the embedded engine, for NeMo-RL in its container.

Planning and the configuration are tested; starting needs the container and is untested (docs/grpo.md).
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipes
from launchers import allocation, folder, grammar, grpo, inputs, layout
from launchers import nemo_rl_engine as engine
from launchers.worker import JOB
from nemo_ext import run_folder
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.grpo.embedded import HELDOUT, TRAIN, build_tools, read_rows
from nemo_ext.grpo.nemo_rl import emit, problems, tree
from recipes.grpo import finish

PROBLEMS = "nemo_rl"  # in a run's folder: the problems as NeMo-RL reads them


def start(command: grammar.Command, keys: dict[str, Any], machine: Any) -> int:
    """Plan, prepare, train through NeMo-RL, report. Returns the exit code."""
    method, family = recipes.split(command.recipe)
    version = tree.choose(keys["nemo_rl_version"], tree.installed())
    keys["gpus"] = keys["gpus"] or max(1, len(machine.gpus))
    if keys["filter"]:
        raise UserError(
            "filter=true: it samples with the embedded engine's device before a run: filter the data with engine=embedded"
        )
    if command.plan:
        _, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=True)
        print("\n".join(_plan(keys, architecture, machine, version).lines()))
        return 0
    keys = inputs.absolute(keys, grpo.PATHS)
    run_dir = Path(keys["out"])
    if command.dryrun:
        with tempfile.TemporaryDirectory() as temporary:
            config = _prepare(command, keys, machine, run_dir, Path(temporary), version).config
        print(engine.yaml_text(config) + "\n" + engine.command_line(run_dir, version))
        return 0
    if allocation.phase(command) is None:
        engine.require_local(keys)
    return allocation.hold(
        command, run_dir, keys, export=lambda: _export(run_dir, keys), run=lambda: _run(command, keys, machine, run_dir, version)
    )


def _plan(keys: dict[str, Any], architecture: Architecture, machine: Any, version: str) -> engine.Planned:
    return engine.plan(keys, architecture, layout.device_memory(keys, machine), version, layout.device(keys, machine))


@dataclass(frozen=True)
class _Prepared:
    """A run whose problems are written: its keys, plan and NeMo-RL's configuration."""

    keys: dict[str, Any]
    planned: engine.Planned
    config: dict[str, Any]
    counts: dict[str, int]


def _prepare(
    command: grammar.Command, keys: dict[str, Any], machine: Any, run_dir: Path, write_to: Path, version: str
) -> _Prepared:
    """Plan the run of `run_dir` and write its problems into the folder `write_to`: the same, but for a dry run."""
    method, family = recipes.split(command.recipe)
    checkpoint, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=False)
    planned = _plan(keys, architecture, machine, version)
    model = grpo.model_folder(checkpoint)
    counts = grpo.prepare_problems(write_to, keys, model)
    steps = keys["steps"] or max(1, int(keys["epochs"] * counts["train"] // keys["prompts"]))
    keys = finish({**planned.keys, "steps": steps})
    tools = None
    if keys["tools"]:
        with build_tools(keys) as started:
            tools = started.schemas
    problems.write(write_to / PROBLEMS / "train.jsonl", read_rows(write_to / TRAIN), tools)
    problems.write(write_to / PROBLEMS / "heldout.jsonl", read_rows(write_to / HELDOUT)[: keys["val_samples"]], tools)
    template = Path(grpo.TOKENIZER) / "chat_template.jinja"
    paths = emit.Paths(
        model=str(model),
        train=str(run_dir / PROBLEMS / "train.jsonl"),
        validation=str(run_dir / PROBLEMS / "heldout.jsonl") if counts["heldout"] else None,
        run=str(run_dir),
        template=str(run_dir / template) if (write_to / template).is_file() else None,
    )
    planned = dataclasses.replace(planned, keys=keys)
    return _Prepared(keys, planned, engine.configuration(planned, architecture, paths, version, command.overrides), counts)


def _run(command: grammar.Command, keys: dict[str, Any], machine: Any, run_dir: Path, version: str) -> int:
    """`start`, of a run that is not complete and whose folder is held: all of it, or the step that an allocation asks for."""

    def ready() -> _Prepared:
        prepared = _prepare(command, keys, machine, run_dir, run_dir, version)
        print("\n".join(prepared.planned.lines()))
        folder.check_same_run(run_dir, command, prepared.keys)
        return prepared

    def hand_over(prepared: _Prepared) -> bool:
        found = engine.newest_checkpoint(run_dir)
        started_at = found[0] if found else 0
        if started_at >= prepared.keys["steps"]:
            return False
        engine.write(run_dir, prepared.config)
        grammar.save(run_dir / run_folder.CONFIG, command.recipe, prepared.keys, command.overrides)
        run_folder.write_json(run_dir / JOB, {"recipe": command.recipe, "resumed_from_step": started_at})
        return True

    return allocation.carry_out(
        command, run_dir, ready=ready, hand_over=hand_over, train=lambda prepared: engine.run_local(run_dir, version),
        finish=lambda prepared: _finish(command, prepared, run_dir, version), newest=engine.newest_checkpoint,
    )  # fmt: skip


def _finish(command: grammar.Command, prepared: _Prepared, run_dir: Path, version: str) -> None:
    """Report on a run that has made all its steps, and export it."""
    from nemo_ext import report

    newest = engine.newest_checkpoint(run_dir)
    facts = {
        "recipe": command.recipe,
        "engine": f"NeMo-RL {version}",
        "parameters": prepared.planned.policy.parameters,
        "problems": prepared.counts["train"],
        "heldout_problems": prepared.counts["heldout"],
        "checkpoint": str(newest[1]) if newest else None,
    }
    summary = report.write(run_dir, facts)
    _export(run_dir, prepared.keys)
    allocation.show(summary)


def _export(run_dir: Path, keys: dict[str, Any]) -> None:
    if keys["export"] == "hf" and not (run_dir / run_folder.EXPORT).is_dir():
        engine.export(run_dir, run_dir / run_folder.EXPORT)
