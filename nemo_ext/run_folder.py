"""A run is a folder: the names in it, and how its small files are read and written.

Workers write (one rank of them), the launcher and the report read, possibly on another machine and while the run goes on.
So every file is either replaced whole (`write_atomic`) or appended to a line at a time and read tolerantly (`read_records`).
Nothing here imports torch. docs/runs.md describes the folder for people.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_ext.disk import write_atomic

CONFIG = "config.yaml"
PLAN = "plan.json"
METRICS = "metrics.jsonl"
STATUS = "status.json"
SUMMARY_JSON = "summary.json"
SUMMARY_MD = "summary.md"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
PLOTS = "plots"
EXPORT = "hf"
ADAPTER = "lora"  # the adapter of a run that trained one, in PEFT's format
MODEL = "model"  # which model the checkpoints are of: see conversion/nemo_folder.py
MANIFEST = "files.json"  # in a checkpoint: its files and their sizes
PARTIAL = ".partial"  # ends the name of a checkpoint that is being written or deleted
DAMAGED = ".damaged"  # and of one that was found to be

STEP_FOLDER = re.compile(r"step-(\d+)$")
PHASES = ("starting", "evaluating", "training", "saving", "finished", "stopped", "failed")


def finite(value: Any) -> Any:
    """`value` with every float that JSON cannot say (NaN, infinity) as None, in dictionaries and lists too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_json(path: str | os.PathLike, value: dict) -> None:
    """Replace the file at `path` by `value` as indented JSON; NaN and infinity become null, unknown types their text."""
    write_atomic(path, json.dumps(finite(value), indent=2, default=str) + "\n")


def read_json(path: str | os.PathLike) -> dict | None:
    """The JSON object at `path`, or None where there is none (yet)."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_status(
    run_dir: str | os.PathLike, phase: str, step: int = 0, max_steps: int = 0, message: str = "", **more: Any
) -> None:
    """Say in status.json where the run is: `phase` is one of `PHASES`, `message` one line for people."""
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r} is none of {', '.join(PHASES)}")
    status = {"phase": phase, "step": step, "max_steps": max_steps, "time": time.time(), "message": message, **more}
    write_json(Path(run_dir) / STATUS, status)


def read_status(run_dir: str | os.PathLike) -> dict | None:
    """What status.json says, or None where there is none."""
    return read_json(Path(run_dir) / STATUS)


def write_failure(
    run_dir: str | os.PathLike, message: str, exit_code: int = 1, step: int = 0, max_steps: int = 0, **more: Any
) -> None:
    """Say in status.json that this start of the run failed, unless another rank has said so before: the first one knows why."""
    if (read_status(run_dir) or {}).get("phase") != "failed":
        write_status(run_dir, "failed", step, max_steps, message, exit_code=exit_code, **more)


def rank_memory(run_dir: str | os.PathLike, rank: int) -> Path:
    """The file in which a rank leaves its peak memory: {"peak": bytes, ...}."""
    return Path(run_dir) / LOGS / f"rank{rank}.memory.json"


def rank_profile(run_dir: str | os.PathLike, rank: int) -> Path:
    """The file in which a rank leaves where a step's time went: {"step", "seconds": {class: seconds}, "longest": [...]}."""
    return Path(run_dir) / LOGS / f"rank{rank}.profile.json"


def peak_memory(run_dir: str | os.PathLike) -> int | None:
    """Most bytes that any rank of the run's last start held at once; None where none has said."""
    peaks = [held["peak"] for file in (Path(run_dir) / LOGS).glob("rank*.memory.json") if (held := read_json(file))]
    return max(peaks, default=None)


def parse_records(lines: Iterable[bytes]) -> list[dict]:
    """The JSON objects with a step among `lines`; anything else (a line that was cut off) is passed over."""
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def read_records(run_dir: str | os.PathLike) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl as (training steps, validations), each in step order and each step once (the last line wins)."""
    try:
        lines = (Path(run_dir) / METRICS).read_bytes().splitlines()
    except FileNotFoundError:
        return [], []
    steps, validations = {}, {}
    for record in parse_records(lines):
        (validations if is_validation(record) else steps)[record["step"]] = record
    return [steps[s] for s in sorted(steps)], [validations[s] for s in sorted(validations)]


def is_validation(record: dict) -> bool:
    """Whether a record of metrics.jsonl is an evaluation's and not a training step's."""
    return "val_loss" in record or "val_reward" in record


def truncate_records(run_dir: str | os.PathLike, last_step: int) -> list[dict]:
    """Drop from metrics.jsonl what lies after `last_step` (a killed run goes on from its checkpoint); return what stays."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        return []
    content = path.read_bytes()
    kept = [record for record in parse_records(content.splitlines()) if record["step"] <= last_step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if text.encode() != content:
        write_atomic(path, text)
    return kept


class Tail:
    """Follows a file of JSON lines that another process appends to: `read()` returns the records completed since the last."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._offset = 0

    def read(self) -> list[dict]:
        """New whole lines as records; a last line without its newline is left for the next call."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0  # rewritten shorter
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return parse_records(whole.splitlines())


def checkpoints(folder: str | os.PathLike) -> list[tuple[int, Path]]:
    """Complete checkpoints in a run's `checkpoints` folder, oldest first, as (step, path)."""
    found = [(int(match[1]), path) for path in Path(folder).glob("step-*") if (match := STEP_FOLDER.match(path.name))]
    return sorted(found)


def newest_checkpoint(folder: str | os.PathLike) -> tuple[int, Path] | None:
    """The newest complete checkpoint as (step, path), or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def write_manifest(checkpoint: Path) -> None:
    """List a checkpoint's files and their sizes in bytes inside it."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    write_json(checkpoint / MANIFEST, sizes)


def manifest_bytes(checkpoint: Path) -> int:
    """What the files of a checkpoint hold together, by its list of them; 0 where it has none."""
    return sum((read_json(checkpoint / MANIFEST) or {}).values())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by the sizes of its files; None where nothing is, or where it has no list of them."""
    if not (checkpoint / MANIFEST).exists():
        return None
    sizes = read_json(checkpoint / MANIFEST)
    if sizes is None:
        return f"{MANIFEST} is not readable"
    for name, size in sizes.items():
        try:
            found = (checkpoint / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != size:
            return f"{name} has {found:,} bytes and not {size:,}"
    return None


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. Renamed first: a kill half-way leaves nothing under a final name."""
    doomed = checkpoint.with_name(checkpoint.name + PARTIAL)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def clear_partial(folder: str | os.PathLike) -> None:
    """Remove what killed or failed processes left half-written or half-deleted in a run's `checkpoints` folder."""
    for leftover in Path(folder).glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
