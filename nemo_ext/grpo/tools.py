"""Tools that an answer may call while it is sampled: Python in the sandbox, a calculator, and functions of the user's.

`tools=` names them with commas: `python`, `calculator`, FILE.py (every public function that the file defines) or
FILE.py:FUNCTION. What the model is shown of a function is its name, type hints and docstring, as transformers' chat templates
take them. A call that raises, hangs, or names what is not there gives the model a line that says so, and is counted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.command_line import nearest
from nemo_ext.errors import RunError, UserError
from nemo_ext.rewards import sandbox
from nemo_ext.rewards.pool import Pool
from nemo_ext.rewards.worker import Job
from nemo_ext.tool_calls import ToolCall

AT_ONCE = 8  # calls of one turn that are made; more of them fail
SHOWN = 2000  # characters of a result that the model sees


@dataclass(frozen=True)
class Result:
    """What a call gave, or why it gave nothing."""

    text: str
    failed: bool = False


def _schema(name: str, line: str, argument: str, what: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string", "description": what}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": line, "parameters": parameters}}


# name: (what the model is shown, the program that runs its argument). A program prints its result; `given` is the argument.
_PYTHON = """
import ast
tree = ast.parse(given)
last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
names = {"__name__": "__main__"}
exec(compile(tree, "program", "exec"), names)
if last is not None and (value := eval(compile(ast.Expression(last.value), "program", "eval"), names)) is not None:
    print(repr(value))
"""
_CALCULATOR = """
import math
names = {name: getattr(math, name) for name in dir(math) if name[0] != "_"} | {"abs": abs, "round": round, "min": min, "max": max}
print(eval(given.replace("^", "**"), {"__builtins__": {}}, names))
"""
_BUILT_IN = {
    "python": (_schema("python", "Runs a Python program, without network and files, and returns what it prints.", "code",
                       "The program."), _PYTHON),
    "calculator": (_schema("calculator", "Computes an arithmetic expression.", "expression",
                           "The expression, such as (3 + 4) * sqrt(2)."), _CALCULATOR),
}  # fmt: skip
_FAILED = "\0failed\0"  # printed before the error of a program that raised


class Tools:
    """The tools of `spec`. All calls of one answer in one turn share `timeout` seconds; `memory` is what the sandbox's programs
    may use, in MiB; `workers` calls run at a time. A context manager, which ends its processes."""

    def __init__(self, spec: str, timeout: float, memory: int, workers: int | None = None) -> None:
        self._timeout, self._memory = timeout, memory << 20
        self._workers = workers or max(1, min(8, os.cpu_count() or 1))
        self._threads = ThreadPoolExecutor(self._workers, "tool")
        self._pools: dict[str, Pool] = {}  # of each file
        self._wanted: dict[str, list[str]] = {}  # its functions; none: all of them
        self._means: tuple[str, ...] = ()
        self._schemas: dict[str, dict[str, Any]] = {}
        self._files: dict[str, str] = {}  # of each function
        for name in (each.strip() for each in spec.split(",")):
            file, separator, function = name.partition(":")
            if file.endswith(".py"):
                if not Path(file).is_file():
                    raise UserError(f"tools={spec}: there is no file {file}")
                path = str(Path(file).absolute())
                if separator and self._wanted.get(path) != []:
                    self._wanted.setdefault(path, []).append(function)
                else:
                    self._wanted[path] = []
            elif name in _BUILT_IN:
                self._means = sandbox.means()
                self._schemas[name] = _BUILT_IN[name][0]
            else:
                near = nearest(name, [*_BUILT_IN]).removesuffix("; --help shows the keys")
                raise UserError(f"tools={spec}: there is no tool {name}{near}; known are {', '.join(_BUILT_IN)}, FILE.py")

    def start(self) -> None:
        """Import the files. Raises UserError where that fails, or a function cannot be shown to a model; nothing runs then."""
        try:
            self._import()
        except BaseException:
            self.close()
            raise

    def _import(self) -> None:
        for path, wanted in self._wanted.items():
            job = Job("nemo_ext.grpo.tool_worker:caller", (path, tuple(wanted)), ("nemo_ext.grpo.tool_worker",), text=True)
            pool = self._pools[path] = Pool(job, self._workers)
            try:
                pool.start()
            except RunError as error:
                reason = str(error).removeprefix("a process that scores answers could not start: ").removeprefix("UserError: ")
                raise UserError(f"tools={path}: {reason}") from None
            found = pool.map([([""], [{}])], 60.0)[0]
            if found.values is None:
                raise UserError(f"tools={path}: {found.error}")
            for schema in json.loads(found.values[0]):
                name = schema["function"]["name"]
                if name in self._schemas:
                    raise UserError(f"tools={path}: there is another tool {name}")
                self._schemas[name], self._files[name] = schema, path

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What chat templates show of each tool."""
        return list(self._schemas.values())

    def call(self, turns: Sequence[Sequence[ToolCall]]) -> list[list[Result]]:
        """The results of each turn's calls, in order."""
        return list(self._threads.map(self._turn, turns))

    def close(self) -> None:
        """End what runs."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> Tools:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _turn(self, calls: Sequence[ToolCall]) -> list[Result]:
        end = time.monotonic() + self._timeout
        results = [self._one(call, round(end - time.monotonic(), 1)) for call in calls[:AT_ONCE]]
        return results + [Result(f"error: not called: at most {AT_ONCE} calls at once", True)] * (len(calls) - AT_ONCE)

    def _one(self, call: ToolCall, seconds: float) -> Result:
        if call.name not in self._schemas:
            return Result(f"error: there is no tool {call.name[:100]}: known are {', '.join(self._schemas)}", True)
        if seconds <= 0:
            return Result("error: no time is left", True)
        if call.name in self._files:
            found = self._pools[self._files[call.name]].map([([call.name], [{"json": call.arguments}])], seconds)[0]
            return Result(f"error: {found.error}", True) if found.values is None else Result(_cut(found.values[0]))
        return self._built_in(call.name, json.loads(call.arguments), seconds)

    def _built_in(self, name: str, arguments: dict[str, Any], seconds: float) -> Result:
        schema, program = _BUILT_IN[name]
        argument = schema["function"]["parameters"]["required"][0]
        if set(arguments) != {argument} or not isinstance(arguments[argument], str):
            return Result(f"error: {name} takes one argument, {argument}, a text", True)
        body = "".join(f"    {line}\n" for line in program.strip().splitlines())
        code = f"given = {arguments[argument]!r}\ntry:\n{body}except BaseException as error:\n" + (
            f"    print({_FAILED!r} + type(error).__name__ + ': ' + str(error)[:{SHOWN}])\n"
        )
        ended = sandbox.run(code, [], using=self._means, timeout=seconds, memory=self._memory)
        if ended.timed_out:
            return Result(f"error: no result after {seconds:g} seconds", True)
        said, failed, error = ended.output.rstrip("\n").partition(_FAILED)
        if failed:
            return Result(_cut(f"{said}error: {error}"), True)
        if not ended.passed:
            return Result(_cut(f"{said}error: the program was stopped: too much memory, output or time"), True)
        return Result(_cut(said) or "(it printed nothing)")


def _cut(text: str) -> str:
    """At most SHOWN characters."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text) - SHOWN:,} more characters)"
