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
from launchers import executors
from nemo_ext import command_line
from nemo_ext.command_line import keys_of, read_config, typed
from nemo_ext.disk import write_atomic
from nemo_ext.errors import UserError
from recipes.grpo import REFUSED as GRPO_REFUSED
from recipes.grpo import GrpoKeys

__all__ = ["Command", "help_lines", "parse", "read_config", "save"]

LAUNCH_KEYS = {
    "recipe": "what to train: METHOD_FAMILY",
    "config": "YAML file of keys, the command line's go over it; a run's own config.yaml repeats it",
    "plan": "print layout, memory and what would run, then stop",
    "dryrun": "print what would be submitted (engine=nemo_rl: its configuration and command), then stop",
    "debug": "show stack traces",
    "executor": "where to run: " + " | ".join(executors.names()) + "; --help with it shows its keys",
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
    executor_keys: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)


def parse(arguments: list[str]) -> Command:
    """Raises UserError for a token that is not `key=value`, an unknown key, a wrong type or an unreadable `config=`."""
    given, help = command_line.settings(arguments, "recipe=cpt_llama3 gpus=2")
    command = Command(help=help)
    _take(command, given)
    return command


def with_settings(command: Command, settings: dict[str, Any]) -> Command:
    """The command with more settings, which are checked as a command line's. Raises UserError, also for a key it has already."""
    more = Command()
    _take(more, {"recipe": command.recipe, "executor": command.executor, **settings})
    parts = ("keys", "overrides", "executor_keys")
    for part in parts:
        if both := getattr(command, part).keys() & getattr(more, part).keys():
            raise UserError(f"{min(both)}= is given twice: plainly and in the sweep")
    return dataclasses.replace(command, **{part: {**getattr(command, part), **getattr(more, part)} for part in parts})


def _take(command: Command, settings: dict[str, Any]) -> None:
    schema = recipes.schema(settings.get("recipe"))
    fields, paths = keys_of(schema), _paths(schema)
    roots = GRPO_ROOTS if schema is GrpoKeys else PATH_ROOTS
    command.executor = str(settings.get("executor", command.executor))
    own = executors.fields(command.executor)
    for name, value in settings.items():
        if name in ("plan", "dryrun", "debug"):
            if not isinstance(value, bool):
                raise UserError(f"{name}={value} must be true or false")
            setattr(command, name, value)
        elif name == "recipe":
            command.recipe = str(value)
        elif name == "executor":
            pass
        elif name in own:
            command.executor_keys[name] = typed(name, value, own[name])
        elif name.startswith("env.") and "env" in own:
            command.executor_keys.setdefault("env", {})[name.removeprefix("env.")] = _environment(name, value)
        elif name.startswith("sweep."):
            command.sweep[name.removeprefix("sweep.")] = value
        elif name in fields:
            command.keys[name] = typed(name, value, fields[name])
        elif (short := paths.get(name)) is not None:
            if short in settings:
                raise UserError(f"{name} and {short} are one key: give one of them")
            command.keys[short] = typed(short, value, fields[short])
        elif name.split(".")[0] in roots and "." in name:
            command.overrides[name] = value
        elif owners := executors.owners(name.split(".")[0]):
            raise UserError(f"{name}= is for executor={owners[0]}, not for executor={command.executor}")
        elif schema is GrpoKeys and name in GRPO_REFUSED:
            raise UserError(f"{name}= is not for {command.recipe}: {GRPO_REFUSED[name]}")
        else:
            raise UserError(f"unknown key {name}{command_line.nearest(name, [*fields, *own, *LAUNCH_KEYS, *paths])}")


def _environment(name: str, value: Any) -> str:
    """The value of an environment variable as text; YAML's true and false are what people write into variables as such."""
    if isinstance(value, (dict, list)) or value is None:
        raise UserError(f"{name}={value} must be text")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _paths(schema: type) -> dict[str, str]:
    """The short name of each field of a recipe that has one: `trainer.max_steps` is `steps`."""
    return {field.metadata["path"]: name for name, field in keys_of(schema).items() if field.metadata["path"]}


def help_lines(recipe: str, defaults: dict[str, Any], executor: str = "local") -> list[str]:
    """The keys of a recipe, and of an executor where it is not the local one, with defaults, units and a line each."""
    lines = [
        f"python launchers/run.py recipe={recipe} key=value ...",
        "",
        *command_line.key_lines(recipes.schema(recipe), defaults, recipes.method_of(recipe)),
    ]
    if own := executors.schema(executor):
        lines += ["", f"executor={executor}", *command_line.key_lines(own)]
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
