"""What an asynchronous checkpoint costs a run: the steps around it, and where the seconds went.

    python benchmarks/checkpoint.py case=1b-tp2 case=8b-8-layers-fp8 tokenizer=FOLDER out=benchmarks/results/checkpoint.json

Runs the recipe from random weights. The interval from a step's end to the next one's is what people wait for: `saving` are the
intervals in which a checkpoint was started, `beside` those in which one was being written, `quiet` the others, without the first
`warm=` (5). `saving_over_quiet` is the median saving interval by the median quiet one, for the first save, which makes the plan
and perhaps the memory, and for the later ones; `cost` is what saving and what is beside it add to a run, in quiet steps a
checkpoint. `parts` are what the processes said of it: seconds that training stood still, until the copies were started, of the
copies, of the fork, until all was on the disk. Each checkpoint is deleted when it is complete: the disk need hold only one,
so the launcher's own check, which wants room for two, is left out.

`every=`, `steps=`, `global_batch=` and any other key of launchers/run.py replace the case's.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from nemo_ext import run_folder  # noqa: E402
from nemo_ext.platform import hardware  # noqa: E402

_1B = dict(recipe="pretrain_llama3", size="1b", seq=8192, micro_batch=1, global_batch=16, pp=1, precision="bf16", gpus=2)
_8B = dict(_1B, size="8b", tp=2, lr=3e-5)
_SHAPE = dict(recipe="pretrain_custom", hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256, tied="false")
# of the 8B, with fewer layers, whose checkpoint most disks hold
_8B_12 = {key: value for key, value in _8B.items() if key != "size"} | _SHAPE | dict(layers=12)
# as many bytes a GPU and second as the whole 8B on two
_8B_8 = _8B_12 | dict(layers=8, gpus=1, tp=1)
CASES = {
    "smoke": dict(recipe="pretrain_llama3", size="smoke", device="cpu", gpus=2, tp=1, every=4, steps=14),
    "1b-tp2": dict(_1B, tp=2, every=20, steps=65),
    "1b-dp2": dict(_1B, tp=1, every=20, steps=65),
    "8b-12-layers-tp2": dict(_8B_12, every=15, steps=52),
    "8b-12-layers-tp2-fp8": dict(_8B_12, every=15, steps=52, precision="fp8"),
    "8b-8-layers-bf16": dict(_8B_8, every=25, steps=100),
    "8b-8-layers-fp8": dict(_8B_8, every=25, steps=100, precision="fp8"),
    "8b-tp2": dict(_8B, every=14, steps=32),  # 112 GB a checkpoint
}
SAID = {
    "stood_still": r"training stood still for ([\d.]+) s",
    "for_the_one_before": r"([\d.]+) of them for the one before",
    "start_of_copies": r"and ([\d.]+) to start copying",
    "state_and_plan": r"Save duration: ([\d.]+)s",
    "gigabytes": r"checkpoint: ([\d.]+) GB",
    "copied_in": r"GB copied in ([\d.]+) s",
    "fork": r"writer forked in ([\d.]+) s",
    "written_in": r"written in ([\d.]+) s",
    "complete_after": r"is complete after ([\d.]+) s",
}
INTERVALS = ("saving", "beside", "quiet")
RUN = "--run"  # as the first argument: this process is the launcher
COMPLETE = re.compile(r"checkpoint of step (\d+) is complete after ([\d.]+) s")


def launch(arguments: list[str]) -> int:
    """`launchers/run.py` without its look at the disk. Returns its exit code."""
    from launchers import folder, run

    with mock.patch.object(folder, "check_disk"):
        return run.main(arguments)


def measure(case: dict, warm: int, tokenizer: str | None) -> dict:
    """Run one case; the figures of its saves."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        keys = [f"{k}={v}" for k, v in case.items()] + ([f"tokenizer={tokenizer}"] if tokenizer else [])
        keys += ["async_save=true", "keep=1", "val_batches=0", "tensorboard=false", f"out={out}"]
        command = [sys.executable, __file__, RUN, *keys]
        started, sizes = time.time(), []
        with open(Path(folder) / "output", "w") as output:
            running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            while running.poll() is None:
                sizes += _delete_complete(out)
                time.sleep(0.2)
        sizes += _delete_complete(out)
        log = out / "logs/rank0.log"
        if running.returncode:
            error = (Path(folder) / "output").read_text()[-1500:]
            return {"error": error, "log": log.read_text()[-4000:] if log.exists() else ""}
        records = run_folder.read_records(out)[0]
        logs = [(out / f"logs/rank{rank}.log").read_text() for rank in range(case["gpus"])]
    return {"start_seconds": records[0]["time"] - started, "bytes": sizes, **figures(records, logs, case["every"], warm)}


def _delete_complete(out: Path) -> list[int]:
    """Delete what is complete; its bytes."""
    found = run_folder.checkpoints(out / run_folder.CHECKPOINTS)
    sizes = [run_folder.manifest_bytes(path) for _, path in found]
    for _, path in found:
        run_folder.remove_checkpoint(path)
    return sizes


def figures(records: list[dict], logs: list[str], every: int, warm: int) -> dict:
    """The intervals between steps by kind, and what the processes said."""
    ends = {record["step"]: record["time"] for record in records}
    complete = {int(step): float(seconds) for step, seconds in COMPLETE.findall(logs[0])}
    intervals: dict[str, list[float]] = {kind: [] for kind in INTERVALS}
    for step in sorted(ends)[warm:-1]:
        before = step - step % every  # the last save at or before it
        writing = before and ends[step] < ends[before] + complete.get(before, 0)
        kind = "saving" if before and step == before else "beside" if writing else "quiet"
        intervals[kind].append(ends[step + 1] - ends[step])
    quiet = statistics.median(intervals["quiet"])
    saving, beside = intervals["saving"], intervals["beside"]
    return {
        "intervals": intervals,
        "quiet_seconds": quiet,
        "saving_over_quiet": {"first": saving[0] / quiet, "later": statistics.median(saving[1:] or saving) / quiet},
        "beside_over_quiet": statistics.median(beside) / quiet if beside else None,
        "cost": (sum(saving) + sum(beside) - quiet * len(saving + beside)) / quiet / len(saving),
        "parts": [{name: [float(s) for s in re.findall(what, log)] for name, what in SAID.items()} for log in logs],
    }


def main(arguments: list[str]) -> None:
    pairs = [a.split("=", 1) for a in arguments]
    options = {name: value for name, value in pairs if name != "case"}
    out, warm, tokenizer = Path(options.pop("out")), int(options.pop("warm", 5)), options.pop("tokenizer", None)
    gpus = [gpu.name for gpu in hardware.detect().gpus]
    for name in [value for key, value in pairs if key == "case"]:
        case = CASES[name] | options
        case["every"], case["gpus"] = int(case["every"]), int(case["gpus"])
        row = {"case": case, "date": datetime.date.today().isoformat(), "gpus": gpus, "versions": machine.versions()}
        row |= measure(case, warm, tokenizer)
        print(name, json.dumps({key: value for key, value in row.items() if key != "versions"}), flush=True)
        results = json.loads(out.read_text()) if out.exists() else {}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**results, name: row}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [RUN]:
        sys.exit(launch(sys.argv[2:]))
    main(sys.argv[1:])
