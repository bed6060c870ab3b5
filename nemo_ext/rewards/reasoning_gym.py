"""Problems of reasoning-gym's tasks, and their own verifiers as a reward.

Some of its verifiers evaluate answers as Python (eval, sympy's parser), so that an answer could run any code: they are only ever
called in confined worker processes.
"""

from __future__ import annotations

import difflib
import json
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from nemo_ext.errors import UserError
from nemo_ext.rewards import extract, sandbox
from nemo_ext.rewards.parts import Failures, Row, need
from nemo_ext.rewards.pool import Pool
from nemo_ext.rewards.worker import Job

PRELOAD = ("nemo_ext.rewards.reasoning_gym:package",)


def package() -> Any:
    """reasoning_gym, imported. pycosat, a C extension without wheels that only zebra puzzles need, has a stand-in where it is not
    installed. Raises UserError without reasoning-gym."""
    if "reasoning_gym" not in sys.modules and "pycosat" not in sys.modules:
        try:
            import pycosat  # noqa: F401
        except ImportError:
            sys.modules["pycosat"] = _stand_in()
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"reasoning-gym cannot be imported ({error}): pip install --no-deps reasoning-gym==0.1.25") from None
    return reasoning_gym


def tasks() -> list[str]:
    """The names of all tasks."""
    package()
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def problems(task: str, size: int, seed: int, **config: Any) -> list[Row]:
    """`size` problems of a task: question, answer, and metadata with the task's name, which its verifier reads.

    `config` are the task's own settings. The same arguments give the same problems. Raises UserError for an unknown task or
    setting, or one that the task refuses.
    """
    _known(task, f"data=reasoning-gym:{task}")
    try:
        data = package().create_dataset(task, size=size, seed=seed, **config)
        return [{**data[place], "metadata": {"source_dataset": task, **data[place]["metadata"]}} for place in range(size)]
    except UserError:
        raise
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"data=reasoning-gym:{task}: {' '.join(str(error).split()) or 'a setting is out of range'}") from None


class ReasoningGym:
    """The verifier of `task`; None: of the task that each row's metadata names."""

    def __init__(self, task: str | None, timeout: float, workers: int, mode: str) -> None:
        if task is not None:
            _known(task, f"reward=reasoning_gym:{task}")
        self._task = task
        self._timeout = timeout
        job = Job("nemo_ext.rewards.reasoning_gym:scorer", (), PRELOAD, sandbox.means(mode), tuple(sandbox.readable()),
                  settings={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})  # fmt: skip
        self._pool = Pool(job, workers)

    def check(self, rows: Sequence[Row]) -> None:
        """Every row has metadata, and a known task. Starts the workers."""
        need("reasoning_gym", rows, "metadata")
        for name in sorted({self._name(row) or "" for row in rows}):
            if not name:
                raise UserError("reward=reasoning_gym: the problems do not say their task: give reward=reasoning_gym:TASK")
            _known(name, f"reward=reasoning_gym:{name}")
        self._pool.start()

    def score(self, answers: Sequence[str], rows: Sequence[Row], failures: Failures) -> list[float]:
        """The verifier's values, which lie in [0, 1]."""
        work = [([answer], [{"task": self._name(row), "entry": {**row, "metadata": _metadata(row)}}])
                for answer, row in zip(answers, rows, strict=True)]  # fmt: skip
        return [min(1.0, max(0.0, failures.outcome(each))) for each in self._pool.map(work, self._timeout)]

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _name(self, row: Row) -> str | None:
        return self._task or _metadata(row).get("source_dataset")


def scorer() -> Callable[[list[str], list[Row]], list[float]]:
    """The function that a worker calls. The answer is the marked one, or all that is said where none is marked."""
    gym = package()
    verifiers: dict[str, Callable] = {}

    def score(answers: list[str], rows: list[Row]) -> list[float]:
        values = []
        for answer, row in zip(answers, rows, strict=True):
            found = extract.marked(answer)
            found = extract.spoken(answer) if found is None else found
            if row["task"] not in verifiers:
                verifiers[row["task"]] = gym.get_score_answer_fn(row["task"])
            values.append(verifiers[row["task"]](found.strip(), row["entry"]) if found is not None else 0.0)
        return values

    return score


def _metadata(row: Row) -> dict[str, Any]:
    data = row.get("metadata")
    if isinstance(data, str):
        try:
            data = json.loads(data)
        except ValueError:
            data = None
    return data if isinstance(data, dict) else {}


def _known(task: str, where: str) -> None:
    known = tasks()
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1, cutoff=0.4)
        raise UserError(f"{where}: there is no such task" + (f", did you mean {near[0]}?" if near else ""))


def _stand_in() -> types.ModuleType:
    module = types.ModuleType("pycosat")

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise UserError("zebra puzzles need pycosat, which has to be compiled: pip install pycosat, or take another task")

    module.solve = module.itersolve = missing
    return module
