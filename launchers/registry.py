"""Names of submitted runs: which folder each is, so that launchers/jobs.py finds it from anywhere.

A name is a small file in ${XDG_STATE_HOME:-~/.local/state}/llm-builder/jobs; what there is to know lies in the run's folder.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from nemo_ext import run_folder
from nemo_ext.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A submitted run: its name, its executor, and the folder of the run or sweep."""

    name: str
    executor: str
    folder: Path


def folder() -> Path:
    """Where the names are kept."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "llm-builder" / "jobs"


def enter(name: str, executor: str, home: Path) -> None:
    """Give the run in `home` a name."""
    run_folder.write_json(folder() / f"{name}.json", {"executor": executor, "folder": str(home)})


def find(name: str) -> Entry:
    """The run of a name. Raises UserError where there is none."""
    known = entries()
    found = next((entry for entry in known if entry.name == name), None)
    if found is None:
        near = difflib.get_close_matches(name, [entry.name for entry in known], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "python launchers/jobs.py lists them"
        raise UserError(f"no submitted run is called {name}, {hint}")
    return found


def entries() -> list[Entry]:
    """All named runs whose folders are still there, by name."""
    found = []
    for file in sorted(folder().glob("*.json")):
        record = run_folder.read_json(file) or {}
        if record.get("folder") and Path(record["folder"]).is_dir():
            found.append(Entry(file.stem, record.get("executor", ""), Path(record["folder"])))
    return found


def refuse_other(name: str, home: Path) -> None:
    """Refuse a name that a run in another folder has. Raises UserError."""
    for entry in entries():
        if entry.name == name and entry.folder != home:
            raise UserError(f"name={name} is the run in {entry.folder}: give another name=")
