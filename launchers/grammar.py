"""`key=value` and `config=file.yaml`: one grammar for every entry point.

A command line becomes a `Command`: what to do, the recipe's keys with their types checked, and paths into the recipe. An
unknown key stops with the nearest valid one; nothing here imports torch or NeMo.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_ext.errors import UserError
from recipes.keys import TYPES, fields, key_of_path

LAUNCH_KEYS = {
    "recipe": "what to train: METHOD_FAMILY",
    "config": "YAML file of keys, the command line's go over it; a run's own config.yaml repeats it",
    "plan": "print layout, memory and what would run, then stop",
    "debug": "show stack traces",
    "executor": "where to run: local",
}
PATH_ROOTS = ("model", "data", "trainer", "optim", "resume", "log")


@dataclass
class Command:
    """A parsed command line."""

    recipe: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    plan: bool = False
    debug: bool = False
    help: bool = False
    executor: str = "local"


def parse(arguments: list[str]) -> Command:
    """Raises UserError for a token that is not `key=value`, an unknown key, a wrong type or an unreadable `config=`."""
    command = Command()
    pairs: list[str] = []
    for token in arguments:
        if token in ("--help", "-h", "help"):
            command.help = True
        elif "=" not in token or token.startswith("="):
            raise UserError(f"{token!r} is not key=value (for example: recipe=cpt_llama3 gpus=2); --help shows the keys")
        else:
            pairs.append(token)
    line = {}
    for token in pairs:  # split here and not by OmegaConf, which would nest dotted keys
        key, text = token.split("=", 1)
        if key in line:
            raise UserError(f"{key}= is given twice")
        line[key] = _value(key, text)
    settings = {}
    if (file := line.pop("config", None)) is not None:
        settings.update(read_config(Path(str(file))))
    settings.update(line)
    _take(command, settings)
    return command


def read_config(file: Path) -> dict[str, Any]:
    """The settings of a YAML file, nested mappings flattened to paths: `{"trainer.max_steps": 5, "lr": 1e-5}`."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except FileNotFoundError:
        raise UserError(f"config={file}: there is no such file") from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"config={file}: {_line(error)}") from None
    except Exception as error:  # YAML's own errors share no base with OmegaConf's
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"config={file} is not YAML: {_line(error)}") from None
        raise
    if not isinstance(content, dict) or not content or any(" " in str(key) for key in content):  # text is a mapping to OmegaConf
        raise UserError(f"config={file} holds no keys")
    return _flat(content)


def _flat(content: dict, prefix: str = "") -> dict[str, Any]:
    settings = {}
    for key, value in content.items():
        if isinstance(value, dict):
            settings.update(_flat(value, f"{prefix}{key}."))
        else:
            settings[f"{prefix}{key}"] = value
    return settings


def _value(key: str, text: str) -> Any:
    """A value as YAML reads it, with OmegaConf's numbers (1e-5 is a float). What begins with a sign that YAML keeps for itself,
    as the glob `*.jsonl` does, is text."""
    if text.startswith(tuple("*&!%@`")):
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)["value"] if text else None
    except Exception as error:
        raise UserError(f"{key}={text}: {_line(error)}") from None


def _take(command: Command, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if name in ("plan", "debug"):
            if not isinstance(value, bool):
                raise UserError(f"{name}={value} must be true or false")
            setattr(command, name, value)
        elif name in ("recipe", "executor"):
            setattr(command, name, str(value))
        elif name in fields():
            command.keys[name] = typed(name, value)
        elif (short := key_of_path(name)) is not None:
            if short in settings:
                raise UserError(f"{name} and {short} are one key: give one of them")
            command.keys[short] = typed(short, value)
        elif name.split(".")[0] in PATH_ROOTS and "." in name:
            command.overrides[name] = value
        else:
            raise UserError(f"unknown key {name}{nearest(name)}")
    if command.executor != "local":
        raise UserError(f"executor={command.executor} is unknown: local")


def nearest(name: str) -> str:
    """`, did you mean lr?`, or nothing where no key is near."""
    candidates = [*fields(), *LAUNCH_KEYS, *(f.metadata["path"] for f in fields().values() if f.metadata["path"])]
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else "; --help shows the keys"


def typed(name: str, value: Any) -> Any:
    """`value` as the key's type. Raises UserError that says which type is wanted."""
    kind = TYPES[str(fields()[name].type)]
    if value is None or kind is object:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) in (int, float):
        return str(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{name}={value} must be {words[kind]}")
    return value


def help_lines(recipe: str, defaults: dict[str, Any]) -> list[str]:
    """The keys of a recipe with defaults, units and a line each, for `--help`."""
    lines = [f"python launchers/run.py recipe={recipe} key=value ...", ""]
    for name, f in fields().items():
        if group := f.metadata["group"]:
            lines += ["" if lines[-1] else None, group]
        default = defaults.get(name, f.default)
        shown = f.metadata["auto"] if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"
        notes = [f.metadata["unit"]] if f.metadata["unit"] else []
        if f.metadata["choices"]:
            notes.append(" | ".join(f.metadata["choices"]))
        lines.append(f"  {name + '=':<23}{f.metadata['help']}{' (' + '; '.join(notes) + ')' if notes else ''}")
        lines.append(f"  {'':<23}default: {shown}")
    lines += ["", "launch"] + [f"  {name + '=':<23}{text}" for name, text in LAUNCH_KEYS.items() if name != "recipe"]
    lines += [
        "",
        "Any other field of the recipe is a path: trainer.strategy.ckpt_parallel_save=false, model.config.hidden_dropout=0.1",
    ]
    return [line for line in lines if line is not None]


def save(file: Path, recipe: str, keys: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Write a run's resolved configuration, in the schema's order; `config=` takes it back."""
    from nemo_ext.run_folder import write_atomic

    ordered = {"recipe": recipe, **{f.name: keys[f.name] for f in dataclasses.fields(_schema())}, **overrides}
    write_atomic(file, OmegaConf.to_yaml(OmegaConf.create({"settings": ordered}).settings))


def _schema():
    from recipes.keys import TrainKeys

    return TrainKeys


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
