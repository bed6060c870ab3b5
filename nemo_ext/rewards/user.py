"""The reward FILE.py:FUNCTION: a function of the user's with the signature of all rewards, in a process of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_ext.command_line import nearest
from nemo_ext.errors import RunError, UserError
from nemo_ext.rewards.parts import Failures, Row
from nemo_ext.rewards.pool import Pool
from nemo_ext.rewards.worker import Job

PRELOAD = ("nemo_ext.rewards.user",)


def module(path: str) -> types.ModuleType:
    """A file as a module. Its folder can be imported from."""
    file = Path(path).absolute()
    sys.path.insert(0, str(file.parent))
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    specification = importlib.util.spec_from_file_location(name, file)
    loaded = importlib.util.module_from_spec(specification)
    sys.modules[name] = loaded
    specification.loader.exec_module(loaded)
    return loaded


def load(path: str, name: str) -> Callable:
    """The function of a file. Raises UserError where it is not there."""
    loaded = module(path)
    function = getattr(loaded, name, None)
    if not callable(function):
        there = [each for each, value in vars(loaded).items() if callable(value)]
        raise UserError(f"it has no function {name}{nearest(name, there).removesuffix('; --help shows the keys')}")
    return function


class User:
    """Calls the function with all answers at once. If it raises, gives another number of values, or takes more than `timeout`
    seconds, it is called with each answer by itself, and those that fail alone get 0 and are counted."""

    def __init__(self, path: str, name: str, timeout: float, workers: int) -> None:
        if not Path(path).is_file():
            raise UserError(f"reward={path}:{name}: there is no file {path}")
        self._name = f"{path}:{name}"
        self._timeout = timeout
        self._pool = Pool(Job("nemo_ext.rewards.user:load", (str(Path(path).absolute()), name), PRELOAD), workers)

    def check(self, rows: Sequence[Row]) -> None:
        """The file can be imported and has the function."""
        try:
            self._pool.start()
        except RunError as error:
            reason = str(error).removeprefix("a process that scores answers could not start: ").removeprefix("UserError: ")
            raise UserError(f"reward={self._name}: {reason}") from None

    def score(self, answers: Sequence[str], rows: Sequence[Row], failures: Failures) -> list[float]:
        """The function's values."""
        answers, rows = list(answers), list(rows)
        if not answers:
            return []
        if len(answers) > 1:
            whole = self._pool.map([(answers, rows)], self._timeout)[0]
            if whole.values is not None and len(whole.values) == len(answers):
                return [failures.value(value) for value in whole.values]
        each = self._pool.map([([answer], [row]) for answer, row in zip(answers, rows, strict=True)], self._timeout)
        return [
            failures.outcome(outcome)
            if outcome.values is None or len(outcome.values) == 1
            else failures.add(f"gave {len(outcome.values)} values for one answer")
            for outcome in each
        ]

    def close(self) -> None:
        """End the workers."""
        self._pool.close()
