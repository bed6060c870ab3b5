"""The reward `code`: the answer's Python program passes the tests of its row, in the sandbox.

`tests` of a row is one of

- assertions: a text of Python, or a list of them, executed behind the program in its namespace; where the row has an
  `entry_point`, the tests define `check` and check(entry_point) is called (HumanEval);
- inputs and outputs: a list of {"input", "output"}, or {"inputs": [...], "outputs": [...]}; the program runs once for each, and
  white space at the ends of lines and of the output does not count.

Either may come as JSON text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemo_ext.errors import RunError, UserError
from nemo_ext.rewards import extract, sandbox
from nemo_ext.rewards.parts import Failures, Row, need

MOST = 50  # runs of one program


class Code:
    """Runs `workers` programs at a time, each with `memory` bytes. All tests of an answer share `timeout` seconds."""

    def __init__(self, timeout: float, workers: int, mode: str, memory: int = sandbox.MEMORY) -> None:
        self._timeout, self._memory = timeout, memory
        self._means = sandbox.means(mode)
        self._threads = ThreadPoolExecutor(workers, "code")

    def check(self, rows: Sequence[Row]) -> None:
        """Every row has tests that can be read."""
        need("code", rows, "tests")
        for place, row in enumerate(rows):
            try:
                read(row)
            except (ValueError, KeyError, TypeError, SyntaxError) as error:
                raise UserError(f"reward=code: `tests` of problem {place + 1} cannot be read: {error}") from None

    def score(self, answers: Sequence[str], rows: Sequence[Row], failures: Failures) -> list[float]:
        """1 for each answer that passes all tests of its row within the time."""
        jobs = [self._threads.submit(self._one, answer, row) for answer, row in zip(answers, rows, strict=True)]
        values = []
        for job in jobs:
            try:
                values.append(float(job.result()))
            except Exception as error:
                values.append(failures.add(f"{type(error).__name__}: {error}"))
        return values

    def close(self) -> None:
        """Nothing is left running."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _one(self, answer: str, row: Row) -> bool:
        program = extract.code(answer)
        assertions, pairs = read(row)
        if program is None or not program.strip():
            return False
        if assertions:
            return self._run(program, assertions, "", self._timeout).passed
        deadline = time.monotonic() + self._timeout
        for given, wanted in pairs:
            ended = self._run(program, [], given, deadline - time.monotonic())
            if not ended.passed or lines(ended.output) != lines(wanted):
                return False
        return True

    def _run(self, program: str, tests: list[str], stdin: str, seconds: float) -> sandbox.Run:
        if seconds <= 0:
            return sandbox.Run(False, "", timed_out=True)
        ended = sandbox.run(program, tests, using=self._means, timeout=seconds, stdin=stdin, memory=self._memory)
        if ended.refused:
            raise RunError(f"the sandbox is gone: {ended.refused}")
        return ended


def read(row: Row) -> tuple[list[str], list[tuple[str, str]]]:
    """The tests of a row: assertions, or pairs of input and output. Raises ValueError, KeyError, TypeError or SyntaxError where
    they are neither."""
    tests = row["tests"]
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        tests = json.loads(tests)
    if isinstance(tests, dict):
        tests = [{"input": i, "output": o} for i, o in zip(tests["inputs"], tests["outputs"], strict=True)]
    tests = [tests] if isinstance(tests, str) else list(tests)
    if not tests:
        raise ValueError("there is none")
    if all(isinstance(each, str) for each in tests):
        if row.get("entry_point"):
            tests.append(f"check({row['entry_point']})")
        for each in tests:
            compile(each, "tests", "exec")
        return tests, []
    if len(tests) > MOST:
        raise ValueError(f"{len(tests)} runs, at most {MOST}")
    return [], [(_text(each["input"]), _text(each["output"])) for each in tests]


def lines(text: str) -> list[str]:
    """Lines of an output, without white space at their ends and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _text(value: Any) -> str:
    """Lists of lines are joined."""
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)
