"""What a task measured, and where finished tasks are kept so that they are not run again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemo_ext import run_folder
from nemo_ext.disk import write_atomic
from nemo_ext.evaluation import intervals

FORMAT = 1  # part of the keys: raise it when the same input gives other results
RESULTS, OUTPUTS = "results", "outputs"


@dataclass(frozen=True)
class Metric:
    """One figure. `low` and `high` are its 95% interval, None where there is none; `interval` says how it was made.

    `pairs` are [numerator, denominator] of each unit where the figure is a ratio of their sums: what a paired comparison needs.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    count: int = 0
    interval: str = ""
    pairs: list[list[float]] | None = None


@dataclass(frozen=True)
class Table:
    """A table of a task's section in the report."""

    title: str
    header: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Result:
    """What a task found out about a model. `about` are sentences that say how; `examples` are shown model beside model."""

    metrics: list[Metric]
    about: list[str]
    tables: list[Table] = field(default_factory=list)
    examples: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Result:
        """The inverse of `to_dict`."""
        metrics, tables = [Metric(**m) for m in value["metrics"]], [Table(**t) for t in value["tables"]]
        return Result(metrics, value["about"], tables, value["examples"])


def share(name: str, hits: Sequence[bool]) -> Metric:
    """The share of `hits` with its Wilson interval."""
    low, high = intervals.wilson(sum(hits), len(hits))
    pairs = [[float(hit), 1.0] for hit in hits]
    return Metric(name, sum(hits) / len(hits), low, high, count=len(hits), interval="Wilson", pairs=pairs)


def mean(name: str, values: Sequence[float], what: str, **more: Any) -> Metric:
    """The mean of `values`, with a bootstrap interval over them; `what` they are."""
    return ratio(name, [[float(value), 1.0] for value in values], what, **more)


def ratio(name: str, pairs: list[list[float]], what: str, **more: Any) -> Metric:
    """Σ numerator / Σ denominator with a bootstrap interval over the pairs; `what` they are."""
    value = sum(n for n, _ in pairs) / sum(d for _, d in pairs)
    low, high = intervals.ratio(pairs) or (None, None)
    return Metric(name, value, low, high, count=len(pairs), interval=f"bootstrap over {what}", pairs=pairs, **more)


class Store:
    """Finished work in `folder`/results, each under a key of all that decides it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str, key: str) -> Any | None:
        """What was kept as `name`, or None if there is nothing or it was made from something else."""
        kept = run_folder.read_json(self._file(name))
        return kept["value"] if kept and kept.get("key") == key else None

    def keep(self, name: str, key: str, value: Any) -> None:
        """Keep `value` (JSON) as `name`, in place of what had been kept."""
        run_folder.write_json(self._file(name), {"key": key, "value": value})

    def find_or(self, name: str, key: str, make: Callable[[], Any]) -> Any:
        """What was kept, or what `make` gives, which is kept then."""
        found = self.find(name, key)
        if found is None:
            self.keep(name, key, found := make())
        return found

    def write_outputs(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write JSON lines for people into outputs/."""
        lines = "".join(json.dumps(run_folder.finite(row), ensure_ascii=False) + "\n" for row in rows)
        write_atomic(self.folder / OUTPUTS / f"{slug(name)}.jsonl", lines)

    def _file(self, name: str) -> Path:
        return self.folder / RESULTS / f"{slug(name)}.json"


def slug(name: str) -> str:
    """A file name for `name`, another one for each: what is unusual in it becomes "-", and a digest then tells them apart."""
    plain = re.sub(r"[^\w.@+-]+", "-", name).strip("-.")[:120]
    return plain if plain == name else f"{plain}-{digest(name)[:6]}"


def digest(*parts: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()


def content_digest(paths: Iterable[Path]) -> str:
    """A hash of the files' names and bytes."""
    state = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            state.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return state.hexdigest()


def folder_digest(folder: Path) -> str:
    """A hash of a model's files by name, size and time of change: reading gigabytes would take longer than most tasks."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files])


def distinct(paths: Sequence[Path]) -> list[str]:
    """A short name for each path: its last part, with as many of the parts before as tell them apart."""
    parts = [path.absolute().parts for path in paths]
    lengths = [1] * len(parts)
    while True:
        names = [str(Path(*p[-n:])) for p, n in zip(parts, lengths, strict=True)]
        clashing = [i for i, name in enumerate(names) if names.count(name) > 1 and lengths[i] < len(parts[i])]
        if not clashing:
            return names
        for i in clashing:
            lengths[i] += 1
