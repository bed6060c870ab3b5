"""`key=value` and `config=file.yaml`: one grammar for every entry point.

A command line becomes a `Command`: what to do, the recipe's keys with their types checked, and paths into the recipe. An
unknown key stops with the nearest valid one; nothing here imports torch or NeMo.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import recipes
from nemo_ext import command_line
from nemo_ext.command_line import keys_of, read_config, typed
from nemo_ext.disk import write_atomic
from nemo_ext.errors import UserError
from recipes.grpo import GrpoKeys

__all__ = ["Command", "help_lines", "parse", "read_config", "save"]

LAUNCH_KEYS = {
    "recipe": "what to train: METHOD_FAMILY",
    "config": "YAML file of keys, the command line's go over it; a run's own config.yaml repeats it",
    "plan": "print layout, memory and what would run, then stop",
    "dryrun": "with engine=nemo_rl: print its configuration and command, then stop",
    "debug": "show stack traces",
    "executor": "where to run: local",
}
PATH_ROOTS = ("model", "data", "trainer", "optim", "resume", "log")
GRPO_ROOTS = ("nemo_rl",)


@dataclass
class Command:
    """A parsed command line."""

    recipe: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    plan: bool = False
    dryrun: bool = False
    debug: bool = False
    help: bool = False
    executor: str = "local"


def parse(arguments: list[str]) -> Command:
    """Raises UserError for a token that is not `key=value`, an unknown key, a wrong type or an unreadable `config=`."""
    given, help = command_line.settings(arguments, "recipe=cpt_llama3 gpus=2")
    command = Command(help=help)
    _take(command, given)
    return command


def _take(command: Command, settings: dict[str, Any]) -> None:
    schema = recipes.schema(settings.get("recipe"))
    fields, paths = keys_of(schema), _paths(schema)
    roots = GRPO_ROOTS if schema is GrpoKeys else PATH_ROOTS
    for name, value in settings.items():
        if name in ("plan", "dryrun", "debug"):
            if not isinstance(value, bool):
                raise UserError(f"{name}={value} must be true or false")
            setattr(command, name, value)
        elif name in ("recipe", "executor"):
            setattr(command, name, str(value))
        elif name in fields:
            command.keys[name] = typed(name, value, fields[name])
        elif (short := paths.get(name)) is not None:
            if short in settings:
                raise UserError(f"{name} and {short} are one key: give one of them")
            command.keys[short] = typed(short, value, fields[short])
        elif name.split(".")[0] in roots and "." in name:
            command.overrides[name] = value
        else:
            raise UserError(f"unknown key {name}{command_line.nearest(name, [*fields, *LAUNCH_KEYS, *paths])}")
    if command.executor != "local":
        raise UserError(f"executor={command.executor} is unknown: local")


def _paths(schema: type) -> dict[str, str]:
    """The short name of each field of a recipe that has one: `trainer.max_steps` is `steps`."""
    return {field.metadata["path"]: name for name, field in keys_of(schema).items() if field.metadata["path"]}


def help_lines(recipe: str, defaults: dict[str, Any]) -> list[str]:
    """The keys of a recipe with defaults, units and a line each, for `--help`."""
    lines = [
        f"python launchers/run.py recipe={recipe} key=value ...",
        "",
        *command_line.key_lines(recipes.schema(recipe), defaults, recipes.method_of(recipe)),
    ]
    lines += ["", "launch"] + [f"  {name + '=':<23}{text}" for name, text in LAUNCH_KEYS.items() if name != "recipe"]
    if recipes.schema(recipe) is GrpoKeys:
        paths = "With engine=nemo_rl any field of its configuration is a path: nemo_rl.grpo.val_at_start=false"
    else:
        paths = (
            "Any other field of the recipe is a path: trainer.strategy.ckpt_parallel_save=false, model.config.hidden_dropout=0.1"
        )
    return [*lines, "", paths]


def save(file: Path, recipe: str, keys: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Write a run's resolved configuration, in the schema's order; `config=` takes it back."""
    ordered = {"recipe": recipe, **{f.name: keys[f.name] for f in dataclasses.fields(recipes.schema(recipe))}, **overrides}
    write_atomic(file, OmegaConf.to_yaml(OmegaConf.create({"settings": ordered}).settings))
