"""The user's tools, in a process of their own (`nemo_ext.rewards.worker`)."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import typing
from collections.abc import Callable
from typing import Any

from nemo_ext.errors import UserError
from nemo_ext.rewards.user import load, module

LONGEST = 1 << 20  # characters of a result that leave the process
ARGUMENT = re.compile(r"^\s*(\w+)(?:\s*\([^)]*\))?:\s*(.*(?:\n(?!\s*\w+(?:\s*\([^)]*\))?:).+)*)", re.M)  # of "Args:"


def caller(path: str, wanted: tuple[str, ...]) -> Callable[[list[str], list[dict[str, Any]]], list[str]]:
    """What calls functions of a file by name, with keyword arguments as {"json": text}, and gives their results as text; "" gives
    their schemas.

    Without `wanted`, all functions that the file defines and whose names begin with no "_". Raises UserError where there is none.
    """
    if wanted:
        functions = {name: load(path, name) for name in wanted}
    else:
        names = vars(module(path))
        functions = {
            n: f for n, f in names.items() if inspect.isfunction(f) and f.__module__ == names["__name__"] and n[0] != "_"
        }
    if not functions:
        raise UserError("it defines no function")

    def call(names: list[str], arguments: list[dict[str, Any]]) -> list[str]:
        return [one(name, given) for name, given in zip(names, arguments, strict=True)]

    def one(name: str, given: dict[str, Any]) -> str:
        if not name:
            return json.dumps([schema(function) for function in functions.values()])
        value = functions[name](**json.loads(given["json"]))
        value = asyncio.run(value) if inspect.iscoroutine(value) else value
        return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))[:LONGEST]

    return call


def schema(function: Callable) -> dict[str, Any]:
    """What a model is shown of a function: its name, and from its docstring (Google style) and type hints what it does and takes,
    as JSON schema. Raises UserError where one of them is missing."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    name = function.__name__
    text = inspect.getdoc(function)
    if not text:
        raise UserError(f"{name} has no docstring, which says to the model what it does")
    line, _, rest = text.partition("Args:")
    rest = re.split(r"^\w+:\s*$", rest, maxsplit=1, flags=re.M)[0]
    told = {each[1]: " ".join(each[2].split()) for each in ARGUMENT.finditer(rest)}
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for argument, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"{name} has an argument {argument} that cannot be given by its name")
        if argument not in hints:
            raise UserError(f"{name} has no type hint for its argument {argument}")
        try:
            found = TypeAdapter(hints[argument]).json_schema()
        except PydanticUserError:
            raise UserError(f"{name}: the type of {argument} is none that JSON has") from None
        properties[argument] = found | ({"description": told[argument]} if argument in told else {})
        if parameter.default is parameter.empty:
            required.append(argument)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": " ".join(line.split()), "parameters": parameters}}
