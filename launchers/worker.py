"""One process of a run: builds the recipe that the launcher wrote down, and trains.

Started by torchrun (or a cluster's launcher) once a device, as `python -m launchers.worker RUN_FOLDER`. Its output goes to
`logs/rankN.log` of the run; what people see comes from metrics.jsonl and status.json.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from pathlib import Path

JOB = "job.json"  # what the launcher hands over: recipe, keys, overrides, shape and this machine's paths
PR_SET_PDEATHSIG = 1


def main(run_dir: Path) -> int:
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    _log_to(run_dir / "logs" / f"rank{rank}.log")
    from nemo_ext import run_folder
    from nemo_ext.errors import RunError, UserError

    try:
        train(run_folder.read_json(run_dir / JOB), run_dir)
    except (UserError, RunError) as error:
        traceback.print_exc()
        run_folder.write_status(run_dir, "failed", message=str(error))
        return error.exit_code
    except OSError as error:
        traceback.print_exc()
        run_folder.write_status(run_dir, "failed", message=f"{error.strerror or error}: {error.filename or run_dir}")
        return 1
    return 0


def train(job: dict, run_dir: Path) -> None:
    """Build and run the job's recipe in this process of the group."""
    from nemo_ext import platform

    platform.activate()
    import fiddle as fdl
    import torch

    import recipes
    from nemo_ext.architecture import Architecture

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe = recipes.load(job["recipe"], shape=Architecture(**job["architecture"]), overrides=job["overrides"], **job["keys"])
    recipes.bind(recipe, run_dir=str(run_dir), tokenizer=job["tokenizer"], blend=job["blend"], weights=job["weights"],
                 checkpoint=job["checkpoint"])  # fmt: skip
    fdl.build(recipe)()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies: no orphan holds a GPU."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _log_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()} starts", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
