"""Whether what this container does goes well, for HEALTHCHECK and probes: exit code 0 or 1, and a line that says why.

    LLM_BUILDER_HEALTH=http://127.0.0.1:8000/health python launchers/health.py      # a server: it answers with 200
    LLM_BUILDER_RUNS=/data/runs python launchers/health.py                          # the newest run in there

A run is ill when its newest status says that it failed, or when it says nothing for `LLM_BUILDER_SILENCE` seconds (1800) while it
should train. Needs the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

RUNS = Path(__file__).resolve().parents[1] / "runs"
SILENCE = 1800.0  # saving and evaluating say nothing either
ENDED = ("finished", "stopped")


def main() -> int:
    url = os.environ.get("LLM_BUILDER_HEALTH")
    well, why = server(url) if url else newest_run(Path(os.environ.get("LLM_BUILDER_RUNS") or RUNS))
    print(why)
    return 0 if well else 1


def server(url: str) -> tuple[bool, str]:
    """Whether a server answers with 200 within ten seconds."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200, f"{url}: {answer.status}"
    except OSError as error:
        return False, f"{url}: {error}"


def newest_run(folder: Path) -> tuple[bool, str]:
    """Whether the run that last said something goes well; no run is well."""
    found = [file for pattern in ("status.json", "*/status.json", "*/*/status.json") for file in folder.glob(pattern)]
    if not found:
        return True, f"no run in {folder}"
    file = max(found, key=lambda each: each.stat().st_mtime)
    try:
        status = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        return False, f"{file}: {error}"
    phase, silent = status.get("phase"), time.time() - file.stat().st_mtime
    if phase == "failed":
        return False, f"{file.parent}: {status.get('message') or 'failed'}"
    if phase not in ENDED and silent > float(os.environ.get("LLM_BUILDER_SILENCE") or SILENCE):
        return False, f"{file.parent}: {phase}, silent for {silent:.0f} s"
    return True, f"{file.parent}: {phase}"


if __name__ == "__main__":
    sys.exit(main())
