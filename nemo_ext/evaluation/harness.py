"""Tasks of lm-eval-harness (the package lm_eval, installed apart), on local data only: nothing is fetched.

A task is a name that the harness knows, whose data lies in the local cache of data sets, or a task of one's own: a YAML file, as
the harness describes it, whose `dataset_path` and `dataset_kwargs` name files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_ext.errors import UserError, explain
from nemo_ext.evaluation.intervals import Z
from nemo_ext.evaluation.model import BATCH, Model
from nemo_ext.evaluation.results import Metric, Result

INSTALL = "pip install lm-eval==0.4.13"
YAML = (".yaml", ".yml")


def require(what: str) -> None:
    """Check that the package is there, and a task file where `what` names one. Raises UserError."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"lm_eval:{what} needs lm-eval-harness, which is not installed: {INSTALL}")
    if what.endswith(YAML) and not Path(what).expanduser().is_file():
        raise UserError(f"tasks=: lm_eval:{what}: no such file")


def files(what: str) -> list[Path]:
    """A task's YAML file and the files on this machine that it names; none of a task that the harness brings."""
    path = Path(what).expanduser()
    if not what.endswith(YAML):
        return []
    named = [Path(word) for word in re.findall(r"[^\s\"',\[\]{}]+", path.read_text())]
    return [path, *(file for file in named if file.is_file())]


def work_offline() -> None:
    """Keep Hugging Face's libraries in this process from the network; before they are imported, for they read this once."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ[name] = "1"


def evaluate(model: Model, what: str, *, shots: int | None = None, limit: int | None = None) -> Result:
    """The metrics that the harness gives for a task, with intervals of ±1.96 of its standard errors.

    `shots` None leaves the task's own number. Raises UserError for an unknown task and for data that is not here.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    path = Path(what).expanduser()
    manager = TaskManager(include_path=str(path.parent) if what.endswith(YAML) else None)
    name = _name_in(path) if what.endswith(YAML) else what
    if name not in manager.all_tasks:
        raise UserError(f"tasks=: lm_eval:{what}: the harness knows no task {name}")
    with _quiet():
        network = HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=model.batch or BATCH)
        try:
            found = lm_eval.simple_evaluate(
                network, tasks=[name], task_manager=manager, num_fewshot=shots, limit=limit, log_samples=False
            )
        except (OSError, ValueError) as error:  # what the data sets' library says of data that is not here
            raise UserError(f"lm_eval:{what}: {explain(error, path)}; its data must be on this machine") from error
    metrics = [m for task, values in found["results"].items() for m in _metrics(task, values, found, name)]
    shown = ", ".join(f"{task} version {version}" for task, version in found["versions"].items())
    return Result(metrics, [f"lm-eval {lm_eval.__version__}: {shown}", f"{_shots(found)} examples before a question"])


def _metrics(task: str, values: dict[str, Any], found: dict[str, Any], asked: str) -> list[Metric]:
    """A metric for each "name,filter" of a task's results."""
    metrics = []
    count = found["n-samples"].get(task, {}).get("effective", 0)
    for key, value in values.items():
        name, separator, kind = key.partition(",")
        if not separator or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{name}_stderr,{kind}")
        around = Z * error if isinstance(error, (int, float)) else None
        label = name if kind == "none" else f"{name} ({kind})"
        higher = found["higher_is_better"].get(task, {}).get(name, True)
        metrics.append(
            Metric(
                label if task == asked else f"{task} {label}",
                float(value),
                None if around is None else value - around,
                None if around is None else value + around,
                better="lower" if higher is False else "higher",
                count=count,
                interval="" if around is None else "±1.96 standard errors",
            )
        )
    return metrics


def _shots(found: dict[str, Any]) -> str:
    numbers = sorted({str(number) for number in found.get("n-shot", {}).values()})
    return ", ".join(numbers) or "0"


def _name_in(path: Path) -> str:
    """The task's name in a YAML file, which may have tags of the harness's own."""
    for line in path.read_text().splitlines():
        if line.startswith("task:"):
            return line.removeprefix("task:").split("#")[0].strip().strip("'\"")
    raise UserError(f"{path} is no task: it has no line task: NAME")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness, its bars and the programs that it starts write."""
    disabled, kept = logging.root.manager.disable, [os.dup(1), os.dup(2)]
    logging.disable(logging.ERROR)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, saved in enumerate(kept, 1):
            os.dup2(saved, descriptor)
            os.close(saved)
        logging.disable(disabled)
