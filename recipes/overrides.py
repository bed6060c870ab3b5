"""Setting any field of a recipe by its path, checked against what the recipe's objects take.

`trainer.strategy.ckpt_parallel_save=false` names a parameter of NeMo's class; an unknown one is refused with the nearest
valid path, a value of another type with the type that is wanted. Callbacks are addressed by class:
`trainer.callbacks.Evaluation.every`.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from typing import Any

import fiddle as fdl

from nemo_ext.errors import UserError


def apply(recipe: fdl.Buildable, overrides: dict[str, Any]) -> None:
    """Set every path in `overrides`, in place. Raises UserError at the first that does not fit."""
    for path, value in overrides.items():
        parts = path.split(".")
        node = recipe
        for i, part in enumerate(parts[:-1]):
            node = _child(node, part, ".".join(parts[: i + 1]))
        _set(node, parts[-1], value, path)


def _parameters(node: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(fdl.get_callable(node)).parameters)


def _child(node: Any, part: str, path: str) -> Any:
    if part == "callbacks" and isinstance(callbacks := getattr(node, part, None), list):
        return {fdl.get_callable(c).__name__: c for c in callbacks}
    if isinstance(node, dict):
        child = node.get(part)
        names = list(node)
    else:
        child = getattr(node, part, None) if part in _parameters(node) else None
        names = [n for n in _parameters(node) if isinstance(getattr(node, n, None), fdl.Buildable)]
    if not isinstance(child, (fdl.Buildable, dict)):
        raise UserError(f"{path} is not a part of the recipe{_nearest(part, names, path)}")
    return child


def _set(node: Any, name: str, value: Any, path: str) -> None:
    if isinstance(node, dict):
        raise UserError(f"{path} is an object of the recipe: set one of its fields")
    parameters = _parameters(node)
    if name not in parameters:
        raise UserError(f"{path} is not a field of {fdl.get_callable(node).__name__}{_nearest(name, list(parameters), path)}")
    if isinstance(getattr(node, name, None), fdl.Buildable):
        raise UserError(f"{path} is an object of the recipe: set one of its fields")
    setattr(node, name, _converted(value, node, name, path))


def _nearest(name: str, names: list[str], path: str) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f", did you mean {path[: len(path) - len(name)] if path.endswith(name) else ''}{near[0]}?" if near else ""


def _converted(value: Any, node: Any, name: str, path: str) -> Any:
    wanted = _simple_types(node, name)
    if not wanted or value is None or type(value) in wanted:
        return value
    if float in wanted and type(value) is int:
        return float(value)
    kinds = " or ".join(sorted(t.__name__ for t in wanted))
    raise UserError(f"{path}={value!r} is of the wrong type: {kinds} is wanted")


def _simple_types(node: Any, name: str) -> set[type]:
    """The plain types an annotated parameter takes; empty where it takes anything else too."""
    annotation = _parameters(node)[name].annotation
    if isinstance(annotation, str):  # a module that postpones annotations
        named = {"int": int, "float": float, "str": str, "bool": bool}
        options = [named.get(option.strip(), None if option.strip() == "None" else object) for option in annotation.split("|")]
        options = [type(None) if option is None else option for option in options]
    else:
        options = typing.get_args(annotation) if typing.get_origin(annotation) is not None else (annotation,)
    plain = {t for t in options if t in (int, float, str, bool)}
    return plain if all(t in (int, float, str, bool, type(None)) for t in options) else set()
