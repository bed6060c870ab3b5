"""Losses of our recipe beside those of the stock NeMo 2 recipe: the same weights, tokens, precision and optimizer, step by step.

    python benchmarks/same_losses.py size=1b precision=bf16 gpus=1 tokenizer=FOLDER out=benchmarks/results/same_losses.json
    python benchmarks/same_losses.py size=1b precision=fp8 tokenizer=FOLDER also= also="output_layer=fp8" out=RESULTS.json

Ours runs through the launcher (`steps=` 50); stock then takes that run's shape, data and optimizer and draws the weights from the
same seed, so that the first losses agree to rounding. Everything else is each one's own: kernels, fusions, overlap, precision.
Stock then runs again: on a GPU its sums have no fixed order, so that this is what two equal runs differ by. The rate rises in all
of the steps, because weights that were just drawn make much of little at a rate that is full at once.
`size=smoke seq=128 global_batch=2` runs on a CPU; `precision=fp32` shows there what is not rounding. Written: the rows of
losses, the largest and the mean difference as a share of stock's loss, and both for stock's two. Other keys go to our recipe;
each `also=` is one more run of ours with its keys besides, compared with the same two of stock (none: the noise of ours).
`stock=ROW` takes the two runs of stock of a row of the same KEYS instead of new ones. With NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 in
the environment runs repeat themselves bit for bit, and their rows are named deterministic.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from nemo_ext import run_folder  # noqa: E402

RECIPES = {"1b": "llama32_1b", "8b": "llama31_8b", "smoke": "llama32_1b"}  # NeMo's, whose sizes ours replace
KEYS = {"size": "1b", "steps": "50", "gpus": "1", "tp": "1", "pp": "1", "seq": "8192", "micro_batch": "1", "global_batch": "8",
        "precision": "bf16", "lr": "1e-4", "warmup": "49"}  # fmt: skip


def ours(keys: dict[str, str], folder: Path) -> list[float]:
    """Losses of every step of `pretrain_llama3`."""
    given = [f"{key}={value}" for key, value in keys.items()]
    command = [sys.executable, str(ROOT / "launchers/run.py"), "recipe=pretrain_llama3", *given, "keep=0", "val_batches=0",
               "tensorboard=false", f"out={folder}"]  # fmt: skip
    _run(command)
    return [record["loss"] for record in run_folder.read_records(folder)[0] if "loss" in record]


def stock(folder: Path, out: Path) -> list[float]:
    """Losses of NeMo's recipe at what the run in `folder` trained on."""
    job = run_folder.read_json(folder / "job.json")
    names = "seq global_batch micro_batch tp pp precision steps".split()
    shape = {name: job["keys"][name] for name in names}
    if (job["keys"]["vp"] or 1) > 1:
        shape["vp"] = job["keys"]["vp"]
    shape |= {"recipe": RECIPES[job["keys"]["size"]], "tokenizer": job["tokenizer"], "run": str(folder),
              "vocab": job["architecture"]["vocab_size"]}  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    _run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job['keys']['gpus']}",
          str(ROOT / "benchmarks/stock_nemo.py"), json.dumps(shape), str(out)], PYTHONPATH=path)  # fmt: skip
    return json.loads(out.read_text())["losses"]


def _run(command: list[str], **environment: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")


def main(arguments: list[str]) -> None:
    pairs = [argument.split("=", 1) for argument in arguments]
    given = {name: value for name, value in pairs if name != "also"}
    also = [dict(each.split("=", 1) for each in value.split()) for name, value in pairs if name == "also"]
    out, known = Path(given.pop("out")), given.pop("stock", None)
    reference = stock_of(out, known, {**KEYS, **given}) if known else []
    repeats = ["deterministic"] if os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0" else []
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), {}
        for number, more in enumerate([{}, *also]):
            changed = {**given, **more}
            keys = {**KEYS, **changed}
            mine = ours(keys, folder / f"run{number}")
            reference = reference or [stock(folder / "run0", folder / f"stock{again}.json") for again in range(2)]
            row = compared(mine, *reference, keys)
            others = [f"{key}={value}" for key, value in changed.items() if key not in ("size", "precision", "tokenizer")]
            name = machine.on(" ".join([keys["size"], keys["precision"], *others, *repeats]))
            while name in rows:
                name = f"{name} again"
            rows[name] = row
            shown = {key: row[key] for key in ("first", "largest", "mean", "of_two_stock")}
            print(name, json.dumps(shown), f"{mine[0]:.4f} -> {mine[-1]:.4f}", flush=True)
            held = json.loads(out.read_text()) if out.exists() else {}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({**held, name: row}, indent=1) + "\n")


def stock_of(results: Path, name: str, keys: dict[str, str]) -> list[list[float]]:
    """Both runs of stock of a row. Raises SystemExit where there are none, or of another shape, data or optimizer."""
    row = json.loads(results.read_text()).get(name, {}) if results.exists() else {}
    if "stock_again" not in row:
        raise SystemExit(f"stock={name}: {results} has no such row with two runs of stock")
    if unlike := [f"{key}={row['keys'].get(key)}" for key in KEYS if row["keys"].get(key) != keys[key]]:
        raise SystemExit(f"stock={name}: that row has {', '.join(unlike)}")
    return [row["stock"], row["stock_again"]]


def compared(mine: list[float], theirs: list[float], again: list[float], keys: dict[str, str]) -> dict[str, object]:
    """A row of the results."""
    assert len(mine) == len(theirs) == len(again) == int(keys["steps"])
    return {
        "keys": {name: value for name, value in keys.items() if name != "tokenizer"}, "ours": mine, "stock": theirs,
        "stock_again": again, **differences(mine, theirs), "of_two_stock": differences(again, theirs),
        "date": datetime.date.today().isoformat(), "gpu": machine.device(), "versions": machine.versions(),
    }  # fmt: skip


def differences(losses: list[float], reference: list[float]) -> dict[str, float]:
    """As shares of the reference: the first, the largest and the mean."""
    shares = [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]
    return {"first": shares[0], "largest": max(shares), "mean": sum(shares) / len(shares)}


if __name__ == "__main__":
    main(sys.argv[1:])
