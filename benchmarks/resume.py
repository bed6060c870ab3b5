"""A run that is stopped and gone on with beside the same run left alone: whether this machine repeats its losses bit for bit.

    python benchmarks/resume.py recipe=pretrain_custom layers=4 hidden=1024 heads=16 ffn=2816 vocab=49152 seq=2048 gpus=1 \\
        precision=fp8 cuda_graphs=true tokenizer=FOLDER out=benchmarks/results/resume.json

The second run gets SIGTERM once it has reported step `stop=` (8) of `steps=` (20), saves, and is started again; its other keys
are the first one's. On GPUs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 is set, without which equal runs differ. Written: both runs'
losses, the step that was gone on from, and the largest difference of a loss and of a gradient norm.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from nemo_ext import run_folder  # noqa: E402

KEYS = {"steps": "20", "val_batches": "0", "tensorboard": "false", "keep": "1"}
STOPPED = 128 + signal.SIGTERM


def start(keys: dict[str, str], folder: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "launchers/run.py"),
        *(f"{key}={value}" for key, value in keys.items()),
        f"out={folder}",
    ]
    environment = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", **os.environ}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def end(process: subprocess.Popen, code: int = 0) -> None:
    said, _ = process.communicate()
    if process.returncode != code:
        raise SystemExit(f"the run ended with {process.returncode}, not {code}:\n{said[-4000:]}")


def records(folder: Path) -> list[dict]:
    """What a run has reported of its steps, in order."""
    return [record for record in run_folder.read_records(folder)[0] if "loss" in record]


def stopped_at(step: int, keys: dict[str, str], folder: Path) -> int:
    """Start a run and stop it after `step`; the step that it saved."""
    process = start(keys, folder)
    while process.poll() is None and not any(record["step"] >= step for record in records(folder)):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    end(process, STOPPED)
    return run_folder.read_status(folder)["step"]


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    out, stop = Path(given.pop("out")), int(given.pop("stop", "8"))
    keys = {**KEYS, **given}
    with tempfile.TemporaryDirectory() as folder:
        whole, again = Path(folder) / "whole", Path(folder) / "again"
        end(start(keys, whole))
        saved = stopped_at(stop, keys, again)
        end(start(keys, again))
        one, other = records(whole), records(again)
    if [record["step"] for record in one] != [record["step"] for record in other] or saved >= one[-1]["step"]:
        raise SystemExit(f"stopped at step {saved}; steps {len(one)} and {len(other)}: take more steps= or a smaller stop=")
    largest = {name: max(abs(a[name] - b[name]) for a, b in zip(one, other, strict=True)) for name in ("loss", "grad_norm")}
    row = {"keys": {name: value for name, value in keys.items() if name != "tokenizer"}, "from": saved, "largest": largest,
           "whole": [record["loss"] for record in one], "again": [record["loss"] for record in other],
           "date": datetime.date.today().isoformat(), "gpu": machine.device(), "versions": machine.versions()}  # fmt: skip
    name = " ".join(f"{key}={value}" for key, value in given.items() if key != "tokenizer")
    held = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**held, machine.on(name): row}, indent=1) + "\n")
    print(name, json.dumps({"from": saved, "largest": largest}), f"{one[0]['loss']:.4f} -> {one[-1]['loss']:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
