"""Our recipe and the stock NeMo 2 recipe on the same GPUs, shapes, tokens and precision, one after the other.

    python benchmarks/train_gpu.py case=1b-bf16 case=1b-fp8 tokenizer=FOLDER out=benchmarks/results/train_gpu.json

Step time is the median after the first five steps. TFLOP/s a GPU are by `Architecture.flops_per_token` (causal attention at half,
no recomputation), for both. Ours trains on the Python documentation and writes its metrics; stock trains on mock tokens.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.models import size  # noqa: E402

STEPS, WARM = 16, 5
STOCK = {"1b": "llama32_1b", "8b": "llama31_8b"}
_1B = dict(size="1b", gpus=1, tp=1, pp=1, seq=8192, micro_batch=1, global_batch=8)
_8B = dict(size="8b", gpus=2, tp=2, pp=1, seq=8192, micro_batch=1, global_batch=16)
CASES = {
    "1b-bf16": dict(_1B, precision="bf16"),
    "1b-fp8": dict(_1B, precision="fp8"),
    "8b-tp2-bf16": dict(_8B, precision="bf16"),
    "8b-tp2-fp8": dict(_8B, precision="fp8"),
    "8b-pp2-bf16": dict(_8B, tp=1, pp=2, precision="bf16"),
    "8b-pp2-vp2-fp8": dict(_8B, tp=1, pp=2, vp=2, precision="fp8"),
}


def ours(case: dict, tokenizer: str, folder: Path) -> dict:
    """Run the recipe through the launcher; its own metrics are the figures."""
    keys = [f"{k}={v}" for k, v in case.items()]
    out = folder / "ours"
    command = [sys.executable, str(ROOT / "launchers/run.py"), "recipe=pretrain_llama3", *keys, f"steps={STEPS}", "keep=0",
               f"val_every={STEPS}", "val_batches=1", "tensorboard=false", f"tokenizer={tokenizer}", f"out={out}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        log = out / "logs/rank0.log"
        return {"error": (done.stdout + done.stderr)[-1500:], "log": log.read_text()[-3000:] if log.exists() else ""}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    plan = json.loads((out / "plan.json").read_text())
    planned = sum(v for k, v in plan["memory"].items() if k not in ("other", "total")) / 2**30
    return {
        "step_times": [r["step_time"] for r in steps[1:]],
        "memory_gib": max(r["memory"] for r in steps),
        "planned_gib": planned,
        "losses": [r["loss"] for r in steps],
        "val_losses": [r["val_loss"] for r in records if "val_loss" in r],
        "first_step_seconds": json.loads((out / "status.json").read_text()).get("time_to_first_step"),
    }


def stock(case: dict, tokenizer: str, folder: Path) -> dict:
    """Run NeMo's own recipe in torchrun."""
    shape = json.dumps({**case, "recipe": STOCK[case["size"]], "steps": STEPS, "tokenizer": tokenizer})
    out = folder / "stock.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case['gpus']}",
               str(ROOT / "benchmarks/stock_nemo.py"), shape, str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": _path()})
    return json.loads(out.read_text()) if out.exists() else {"error": (done.stdout + done.stderr)[-3000:]}


def figures(result: dict, case: dict) -> dict:
    """Step time, tokens/s a GPU and TFLOP/s a GPU of one run."""
    if "error" in result:
        return result
    seconds = statistics.median(result["step_times"][WARM:])
    tokens = case["global_batch"] * case["seq"] / seconds / case["gpus"]
    flops = size("llama3", case["size"]).architecture.flops_per_token(case["seq"])
    return {**result, "step_seconds": seconds, "tokens_per_s_per_gpu": tokens, "tflops_per_gpu": tokens * flops / 1e12}


def main(arguments: list[str]) -> None:
    pairs = [a.split("=", 1) for a in arguments]
    options = dict(pairs)
    out = Path(options["out"])
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in [v for k, v in pairs if k == "case"]:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            row = {"case": case, "ours": figures(ours(case, options["tokenizer"], Path(folder)), case)}
            if options.get("stock", "true") == "true":
                row["stock"] = figures(stock(case, options["tokenizer"], Path(folder)), case)
        row.update(date=datetime.date.today().isoformat(), gpu=_gpu(), versions=_versions())
        results[name] = row
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps({k: _short(v) for k, v in row.items() if k in ("ours", "stock")}), flush=True)


def _short(result: dict) -> dict:
    keys = ("step_seconds", "tokens_per_s_per_gpu", "tflops_per_gpu", "memory_gib", "planned_gib", "first_step_seconds", "error", "log")
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items() if k in keys}


def _gpu() -> str:
    line = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True).stdout
    return line.splitlines()[0].strip() if line else "none"


def _versions() -> dict:
    packages = ("torch", "megatron-core", "nemo-toolkit", "transformer-engine")
    return {p: importlib.metadata.version(p) for p in packages}


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    main(sys.argv[1:])
