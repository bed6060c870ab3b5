"""A RayJob's driver, on the head of its cluster: prepares the run, trains it through NeMo-RL, reports.

Started by KubeRay as `uv run … python -m launchers.k8s.driver`; NeMo-RL finds the cluster that it runs in by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launchers import grammar
from launchers.k8s.phases import COMPLETE, FINISH, PREPARE, phase
from nemo_ext.command_line import NO_DEFAULT, ending, key, parse
from nemo_ext.errors import UserError

EXAMPLE = "python -m launchers.k8s.driver run=/data/run settings=/etc/llm-builder/settings.yaml"


@dataclass
class DriverKeys:
    """What a driver is told."""

    run: str = key(NO_DEFAULT, "the run's folder")
    settings: str = key(NO_DEFAULT, "the run's settings")


def drive(options: DriverKeys) -> int:
    """Prepare, train, report. Returns the exit code."""
    from launchers import nemo_rl_engine as engine

    settings, run_dir = Path(options.settings), Path(options.run)
    version = grammar.parse([f"config={settings}"]).keys.get("nemo_rl_version")
    if version is None:
        raise UserError(f"{settings} does not say nemo_rl_version")
    if code := phase(PREPARE, settings):
        return 0 if code == COMPLETE else code
    done = subprocess.run(engine.command(run_dir, version), env={**os.environ, **engine.environment(run_dir)})
    return phase(FINISH, settings) or done.returncode


def main(arguments: list[str]) -> int:
    with ending("debug=true" in arguments, "the job starts it again") as end:
        end.code = drive(parse(DriverKeys, arguments, EXAMPLE))
    return end.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
