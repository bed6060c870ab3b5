"""What went wrong in a run and was survived: a line each in faults.jsonl, and their count for the summary.

Imports neither torch nor NeMo. docs/faults.md describes the kinds for people.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from nemo_ext import run_folder

FAULTS = "faults.jsonl"
KINDS = ("restart", "skip", "rollback", "straggler")


def note(run_dir: str | Path, kind: str, step: int, message: str, **more: Any) -> None:
    """Append a fault of one of `KINDS` that was met at `step`; `message` is one line for people."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    record = {"kind": kind, "step": step, "message": message, "time": time.time(), **more}
    with open(Path(run_dir) / FAULTS, "a") as file:
        file.write(json.dumps(run_folder.finite(record)) + "\n")


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """The faults of a run in the order of their steps. What a resumed run met again is there once; restarts always are."""
    try:
        lines = (Path(run_dir) / FAULTS).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found = {}
    for number, record in enumerate(run_folder.parse_records(lines)):
        found[record.get("kind"), record["step"], number if record.get("kind") == "restart" else 0] = record
    return sorted(found.values(), key=lambda record: record["step"])


def counts(run_dir: str | Path) -> dict[str, Any]:
    """What summary.json says: `restarts`, `skipped_steps`, `rollbacks`, the steps those `rolled_back`, and `stragglers` (by
    rank, how many times slower than the median). Nothing is said of what did not happen."""
    records = read(run_dir)
    by_kind = {kind: [record for record in records if record.get("kind") == kind] for kind in KINDS}
    found = {
        "restarts": len(by_kind["restart"]),
        "skipped_steps": len(by_kind["skip"]),
        "rollbacks": len(by_kind["rollback"]),
        "rolled_back": sum(record["step"] - record["to"] for record in by_kind["rollback"]),
        "stragglers": {str(record["rank"]): record["ratio"] for record in by_kind["straggler"]},
    }
    return {name: value for name, value in found.items() if value}


def text(found: dict[str, Any]) -> str:
    """`counts` in words: "1 restart, 2 steps skipped"."""
    parts = []
    if restarts := found.get("restarts"):
        parts.append(f"{restarts} restart{'s' if restarts > 1 else ''}")
    if skipped := found.get("skipped_steps"):
        parts.append(f"{skipped} step{'s' if skipped > 1 else ''} skipped")
    if rollbacks := found.get("rollbacks"):
        parts.append(f"{rollbacks} rollback{'s' if rollbacks > 1 else ''} over {found['rolled_back']} steps")
    parts += [f"rank {rank} {ratio:.1f} times slower than the median" for rank, ratio in found.get("stragglers", {}).items()]
    return ", ".join(parts)
