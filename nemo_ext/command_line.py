"""`key=value` and `config=file.yaml`: what every command here understands, and how it ends.

A dataclass whose fields are `key(...)`s is a command's schema and its help text. `main` is all that a small command needs;
`launchers/grammar.py` builds the recipes' larger grammar from the same parts. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from nemo_ext.errors import RunError, UserError, explain

HELP = ("--help", "-h", "help")
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "Any": object}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
NO_DEFAULT = dataclasses.MISSING
WITHIN = {"above": operator.gt, "least": operator.ge, "below": operator.lt, "most": operator.le}
OLD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-9]+)+)$")  # 0123 and 1:30:00: numbers to YAML 1.1, to base 8 and 60


class Stopped(BaseException):
    """SIGTERM, raised where the command is."""


def key(
    default: Any,
    help: str,
    *,
    unit: str = "",
    path: str = "",
    choices: tuple = (),
    auto: str = "",
    group: str = "",
    only: tuple = (),
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """A field of a schema. `path`: the recipe's field that the key sets. `auto`: what None stands for, in words. `only`: the
    methods that have the key, where not all do. A number is `above` one limit or `least` it, and `below` another or at `most` it.
    """
    limits = {name: limit for name, limit in dict(above=above, least=least, below=below, most=most).items() if limit is not None}
    described = dict(help=help, unit=unit, path=path, choices=choices, auto=auto, group=group, only=only, limits=limits)
    return dataclasses.field(default=default, metadata=described)


def keys_of(schema: type) -> dict[str, dataclasses.Field]:
    """A schema's fields by key name. A field that Python reserves ends in "_": `from_` is the key `from`."""
    return {f.name.rstrip("_"): f for f in dataclasses.fields(schema)}


def settings(arguments: Iterable[str], example: str) -> tuple[dict[str, Any], bool]:
    """The line's settings over those of its `config=` file, and whether it asks for help.

    Raises UserError, with `example`, for a token that is not `key=value`, a key given twice, or an unreadable file.
    """
    line: dict[str, Any] = {}
    help = False
    for token in arguments:
        if token in HELP:
            help = True
            continue
        name, separator, text = token.partition("=")
        if not separator or not name:
            raise UserError(f"{token!r} is not key=value (for example: {example}); --help shows the keys")
        if name in line:
            raise UserError(f"{name}= is given twice")
        line[name] = _value(name, text)
    given = {}
    if (file := line.pop("config", None)) is not None:
        given.update(read_config(Path(str(file))))
    return given | line, help


def read_config(file: Path) -> dict[str, Any]:
    """The settings of a YAML file, nested mappings flattened to paths: `{"trainer.max_steps": 5, "lr": 1e-5}`."""
    try:
        content = OmegaConf.to_container(OmegaConf.create(yaml.load(file.read_text("utf-8"), _loader())), resolve=True)
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


def typed(name: str, value: Any, field: dataclasses.Field) -> Any:
    """`value` as the field's type. Raises UserError that says which type or choice is wanted."""
    kind = TYPES[str(field.type).removesuffix(" | None")]
    if value is None or kind is object:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) in (int, float):
        return str(value)
    if type(value) is not kind:
        raise UserError(f"{name}={value} must be {WORDS[kind]}")
    return value


def texts(name: str, value: Any) -> list[str]:
    """A key that holds several texts, given as a list or as one. Raises UserError."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, (dict, list)) or item is None or not str(item).isprintable() for item in items):
        raise UserError(f"{name}={value} must be a list of texts, each one line")
    return [str(item).strip() for item in items]


def check_choice(name: str, value: Any, field: dataclasses.Field) -> None:
    """Raises UserError if the field lists what it may be and `value` is something else."""
    if (choices := field.metadata["choices"]) and value is not None and value not in choices:
        raise UserError(f"{name}={value} is none of {', '.join(choices)}")


def check_value(name: str, value: Any, field: dataclasses.Field) -> None:
    """Raises UserError if the value is none of the field's choices, or beyond its limits."""
    check_choice(name, value, field)
    limits = field.metadata["limits"]
    if value is None or all(WITHIN[kind](value, limit) for kind, limit in limits.items()):
        return
    if limits == {"least": 0}:
        raise UserError(f"{name}={value} must not be negative")
    words = dict(above="above", least="at least", below="below", most="at most")
    raise UserError(f"{name}={value} must be {' and '.join(f'{words[kind]} {limit:g}' for kind, limit in limits.items())}")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`, did you mean lr?`, or where the keys are listed if none is near."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else "; --help shows the keys"


def key_lines(schema: type, defaults: dict[str, Any] | None = None, method: str = "") -> list[str]:
    """The keys of a schema (those that `method` has) with defaults, units and a line each, for `--help`."""
    lines: list[str] = []
    for name, f in keys_of(schema).items():
        if f.metadata["only"] and method not in f.metadata["only"]:
            continue
        if group := f.metadata["group"]:
            lines += ["" if lines else None, group]
        default = (defaults or {}).get(name, f.default)
        notes = [f.metadata["unit"]] if f.metadata["unit"] else []
        if f.metadata["choices"]:
            notes.append(" | ".join(f.metadata["choices"]))
        lines.append(f"  {name + '=':<23}{f.metadata['help']}{' (' + '; '.join(notes) + ')' if notes else ''}")
        lines.append(f"  {'':<23}{_default(default, f)}")
    return [line for line in lines if line is not None]


def parse(schema: type, arguments: list[str], example: str) -> Any:
    """An instance of `schema` from a command line, or None if it asks for help.

    A field without a default is needed. `debug` is every command's own key (see `main`). Raises UserError.
    """
    given, help = settings([a for a in arguments if a not in ("debug=true", "debug=false")], example)
    if help:
        return None
    return fill(schema, given, example=example)


def fill(schema: type, given: dict[str, Any], where: str = "", example: str = "") -> Any:
    """An instance of `schema` from settings. `where` is what their names begin with. Raises UserError, which shows an `example`
    where a key is missing."""
    known, values = keys_of(schema), {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"unknown key {where}{name}{nearest(name, known)}")
        values[known[name].name] = typed(f"{where}{name}", value, known[name])
        check_value(f"{where}{name}", value, known[name])
    for name, field in known.items():
        if field.default is NO_DEFAULT and values.get(field.name) is None:
            raise UserError(f"{where}{name}= is missing{f' (for example: {example})' if example else ''}; --help shows the keys")
    return schema(**values)


def main(schema: type, function: Callable[[Any], None], arguments: list[str], *, about: str, example: str) -> int:
    """Run a command: parse, call `function(schema instance)`, and end as `ending` says. Returns the exit code.

    `about` and `example` head the help. Without arguments the help is shown.
    """
    with ending("debug=true" in arguments, "the same command goes on") as end:
        options = parse(schema, arguments or ["--help"], example)
        if options is None:
            print("\n".join([about, "", f"  {example}", "", *key_lines(schema)]))
        else:
            function(options)
    return end.code


@dataclass
class Ending:
    """How a command ended: `code` is its exit code. `debug` shows stack traces."""

    debug: bool
    code: int = 0


@contextmanager
def ending(debug: bool, after_a_signal: str) -> Iterator[Ending]:
    """Turn whatever leaves the block into one line and an exit code: 1 a failure, 2 bad input, 128 + the signal.

    `after_a_signal` says what a stopped command leaves. SIGTERM is raised as `Stopped` while the block runs.
    """
    end = Ending(debug)
    previous = signal.signal(signal.SIGTERM, _stop)

    def fail(message: str, code: int) -> None:
        if end.debug:
            traceback.print_exc()
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        end.code = code

    try:
        yield end
    except (UserError, RunError) as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(explain(error, Path.cwd()), 2)
    except (Stopped, KeyboardInterrupt) as error:
        number = error.args[0] if isinstance(error, Stopped) else signal.SIGINT
        print(f"stopped by {signal.Signals(number).name}; {after_a_signal}", file=sys.stderr)
        end.code = 128 + number
    except Exception as error:
        fail(f"{explain(error, Path.cwd())} (debug=true shows where)", 1)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def _default(default: Any, field: dataclasses.Field) -> str:
    if default is NO_DEFAULT:
        return "needed"
    if default is None:
        return f"default: {field.metadata['auto']}"
    return f"default: {str(default).lower() if isinstance(default, bool) else default}"


def _value(name: str, text: str) -> Any:
    """A value as YAML reads it, with OmegaConf's numbers (1e-5 is a float). What begins with a sign that YAML keeps for itself,
    as the glob `*.jsonl` does, is text."""
    if text.startswith(tuple("*&!%@`")) or OLD_NUMBER.match(text):
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)["value"] if text else None
    except Exception as error:
        raise UserError(f"{name}={text}: {_line(error)}") from None


def _flat(content: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _loader() -> type:
    """OmegaConf's YAML, in which a time of day, 1:30:00, is text and no number to base 60."""

    class Loader(get_yaml_loader()):
        pass

    Loader.yaml_implicit_resolvers = {
        first: ([("tag:yaml.org,2002:str", OLD_NUMBER)] if first in "+-0123456789" else []) + resolvers
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    return Loader


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
