"""The steps of a job that run once, on one pod: `launchers/run.py` with executor=allocation, as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launchers.allocation import COMPLETE, FINISH, PREPARE
from launchers.worker import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["COMPLETE", "FINISH", "PREPARE", "phase"]


def phase(name: str, settings: Path) -> int:
    """Run a step with the settings in a file; its exit code."""
    command = [sys.executable, str(ROOT / "launchers" / "run.py"), f"config={settings}", "executor=allocation", f"phase={name}"]
    return subprocess.run(command, cwd=ROOT, preexec_fn=die_with_parent).returncode
