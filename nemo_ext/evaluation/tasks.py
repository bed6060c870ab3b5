"""`tasks=`: a list of KIND:WHAT, such as ppl:notes.md, mcq:mmlu/, generate:gsm8k.jsonl@numeric, judge:prompts.jsonl."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.data import sources
from nemo_ext.data.sources import DOCUMENTS, RECORDS, Source
from nemo_ext.errors import UserError
from nemo_ext.evaluation.results import distinct

KINDS = {
    "ppl": "perplexity on a text",
    "mcq": "multiple choice by likelihood",
    "generate": "answers against references",
    "judge": "answers rated by a judge",
    "lm_eval": "a task of lm-eval-harness",
}
FILES = {"ppl": DOCUMENTS, "mcq": RECORDS, "generate": RECORDS, "judge": RECORDS}
METRICS = ("bleu", "rouge", "exact", "numeric")


@dataclass(frozen=True)
class Task:
    """One thing to measure. `source` is None for lm_eval; `metrics` are those of a generate task."""

    kind: str
    what: str
    name: str  # for people, another one for each task
    source: Source | None = None
    metrics: tuple[str, ...] = ()


def as_list(name: str, value: Any) -> list[str]:
    """The texts of a key that is one or a list of them. Raises UserError for anything else."""
    values = [value] if isinstance(value, str) else value
    if isinstance(values, Mapping) or not isinstance(values, Iterable) or not all(isinstance(v, str) for v in values):
        raise UserError(f"{name}={value}: give a text or a list of texts such as {name}=[a,b]; no space follows a colon")
    values = list(values)
    if not values:
        raise UserError(f"{name}= is an empty list")
    return values


def parse(tasks: Any, metrics: Any = "all") -> list[Task]:
    """`tasks=` with every file found. `metrics` are those of generate tasks that do not name their own after "@".

    Raises UserError for an unknown kind, a missing file, an unknown metric and a task given twice.
    """
    default = _metrics(as_list("metrics", metrics), "metrics=")
    found = [_parse(text, default) for text in as_list("tasks", tasks)]
    for kind in KINDS:
        same = [i for i, task in enumerate(found) if task.kind == kind]
        for i, short in zip(same, distinct([Path(found[i].what) for i in same]), strict=True):
            task = found[i]
            found[i] = Task(task.kind, task.what, f"{kind}:{short}", task.source, task.metrics)
    names = [task.name for task in found]
    if again := next((task for task in found if names.count(task.name) > 1), None):
        raise UserError(f"tasks=: {again.kind}:{again.what} is given twice")
    return found


def files(kind: str, what: str, label: str) -> Source:
    """The source `what` of a task; `label` names it in errors. Raises UserError where it is no file, folder or data set."""
    try:
        (source,) = sources.parse(Path(what), FILES[kind])  # a path, for in a text the end may be a weight
    except UserError as error:
        raise UserError(str(error).replace(f"data={what}", label)) from None
    return source


def _parse(text: str, default: tuple[str, ...]) -> Task:
    kind, separator, what = text.partition(":")
    if not separator or not what:
        raise UserError(f"tasks=: {text!r} is not KIND:WHAT, such as ppl:notes.md; the kinds are {', '.join(KINDS)}")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"the kinds are {', '.join(KINDS)}"
        raise UserError(f"tasks=: unknown kind {kind} in {text}: {hint}")
    if kind == "lm_eval":
        return Task(kind, what, what)
    chosen = default if kind == "generate" else ()
    if kind == "generate" and "@" in what and not Path(what).expanduser().exists():
        what, _, names = what.rpartition("@")
        chosen = _metrics(names.split("+"), f"tasks=: {text}")
    return Task(kind, what, what, files(kind, what, f"tasks=: {kind}:{what}"), chosen)


def _metrics(names: list[str], label: str) -> tuple[str, ...]:
    for name in names:
        if name not in (*METRICS, "all"):
            raise UserError(f"{label}: unknown metric {name}: there are all, {', '.join(METRICS)}")
    return METRICS if "all" in names else tuple(dict.fromkeys(names))
