"""Our recipe and the stock NeMo 2 recipe on the same GPUs, shapes, tokens and precision, one after the other.

    python benchmarks/train_gpu.py case=1b-bf16 case=1b-fp8 tokenizer=FOLDER out=benchmarks/results/train_gpu.json
    python benchmarks/train_gpu.py case=1b-fp8 cuda_graphs=true stock=false tokenizer=FOLDER out=RESULTS.json

`steps=` (16) are run, step time is the median of those after the first and `warm=` (5) more; `stock=false` leaves the stock
recipe out. TFLOP/s a GPU are by `Architecture.flops_per_token` (causal attention at half, no recomputation), for both. Ours
trains on the Python documentation, evaluates before and after, and writes its metrics; stock trains on mock tokens. Seconds to
the first step count from the command. Memory is the largest of all ranks in GiB: allocated and reserved by torch's allocator,
and, for ours, what else of the device is in use. Other keys are given to ours: `profile=STEP` also says where it spent that step.

Adapters (`lora`, `qlora`) train in a random base on conversations as long as the sequence (packed: an eighth), and not in stock;
two operations a token and frozen weight are not counted, since it has no gradient.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from nemo_ext import adapters, run_folder  # noqa: E402
from recipes.keys import fields  # noqa: E402
from recipes.models import size  # noqa: E402

GIB = 2**30
OPTIONS = {"case", "steps", "warm", "stock", "tokenizer", "out"}
STOCK = {"1b": "llama32_1b", "8b": "llama31_8b"}
_1B = dict(size="1b", gpus=1, tp=1, pp=1, seq=8192, micro_batch=1, global_batch=8)
_8B = dict(size="8b", gpus=2, tp=2, pp=1, seq=8192, micro_batch=1, global_batch=16, lr=3e-5)
_LORA = dict(recipe="lora_llama3", size="8b", gpus=1, tp=1, pp=1, seq=4096, micro_batch=2, global_batch=32, pack="false")
_QLORA = dict(_LORA, recipe="qlora_llama3", precision="bf16")
CASES = {
    "1b-bf16": dict(_1B, precision="bf16"),
    "1b-fp8": dict(_1B, precision="fp8"),
    "8b-tp2-bf16": dict(_8B, precision="bf16"),
    "8b-tp2-fp8": dict(_8B, precision="fp8"),
    "8b-pp2-bf16": dict(_8B, tp=1, pp=2, vp=1, precision="bf16", balance_stages="false"),
    "8b-pp2-vp2-bf16": dict(_8B, tp=1, pp=2, vp=2, precision="bf16", balance_stages="false"),
    "8b-pp2-vp2-fp8": dict(_8B, tp=1, pp=2, vp=2, precision="fp8", balance_stages="false"),
    "8b-pp2-vp2-balanced-bf16": dict(_8B, tp=1, pp=2, vp=2, precision="bf16"),
    "8b-pp2-vp2-balanced-fp8": dict(_8B, tp=1, pp=2, vp=2, precision="fp8"),
    "8b-pp2-vp4-balanced-fp8": dict(_8B, tp=1, pp=2, vp=4, precision="fp8"),
    "8b-tp2-16k-fp8": dict(_8B, seq=16384, global_batch=8, precision="fp8"),
    "8b-cp2-16k-fp8": dict(_8B, tp=1, cp=2, seq=16384, global_batch=8, recompute="selective", precision="fp8"),
    "8b-lora-bf16": dict(_LORA, precision="bf16"),
    "8b-lora-fp8": dict(_LORA, precision="fp8"),
    "8b-lora-packed-bf16": dict(_LORA, seq=8192, micro_batch=1, global_batch=16, pack="true", precision="bf16"),
    "8b-qlora": _QLORA,
    "8b-qlora-48gib": dict(_QLORA, micro_batch=1, gpu_memory=48),
    "8b-qlora-24gib": dict(_QLORA, micro_batch=1, gpu_memory=24),
}


def ours(case: dict, steps: int, tokenizer: str, folder: Path) -> dict:
    """Run the recipe through the launcher; its own metrics are the figures."""
    keys = [f"{k}={v}" for k, v in {"recipe": "pretrain_llama3", **case}.items()]
    out, program = folder / "ours", "launchers/run.py"
    if "recipe" in case:
        program = "benchmarks/random_base.py"
        chats = _conversations(folder / "chat.jsonl", case["seq"] // (8 if case["pack"] == "true" else 1), tokenizer)
        keys += [f"data={chats}", "preview=0", "template=chatml"]
    command = [sys.executable, str(ROOT / program), *keys, f"steps={steps}", "keep=0", f"val_every={steps}", "val_batches=1",
               "tensorboard=false", f"tokenizer={tokenizer}", f"out={out}"]  # fmt: skip
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        log = out / "logs/rank0.log"
        return {"error": (done.stdout + done.stderr)[-1500:], "log": log.read_text()[-3000:] if log.exists() else ""}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in records if "loss" in r]
    memory = json.loads((out / "plan.json").read_text())["memory"]
    ranks = [run_folder.read_json(run_folder.rank_memory(out, rank)) for rank in range(case["gpus"])]
    return {
        "step_times": [r["step_time"] for r in trained[1:]],
        "cuda_graphs": run_folder.read_json(out / "job.json")["keys"]["cuda_graphs"],
        "memory_gib": max(r["peak"] for r in ranks) / GIB,
        "reserved_gib": max(r["reserved"] for r in ranks) / GIB,
        "outside_torch_gib": max(r["outside_torch"] for r in ranks) / GIB,
        "memory_of_ranks": ranks,
        "planned_gib": (memory["total"] - memory["other"]) / GIB,
        "planned": memory,
        "losses": [r["loss"] for r in trained],
        "val_losses": [r["val_loss"] for r in records if "val_loss" in r],
        "first_step_seconds": trained[0]["time"] - started,
        "profile": run_folder.read_json(run_folder.rank_profile(out, 0)),
    }


def stock(case: dict, steps: int, tokenizer: str, folder: Path) -> dict:
    """Run NeMo's own recipe in torchrun."""
    vocab = size("llama3", case["size"]).architecture.padded_vocab_size
    shape = json.dumps({**case, "recipe": STOCK[case["size"]], "steps": steps, "tokenizer": tokenizer, "vocab": vocab})
    out = folder / "stock.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case['gpus']}",
               str(ROOT / "benchmarks/stock_nemo.py"), shape, str(out)]  # fmt: skip
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": _path()})
    if not out.exists():
        return {"error": (done.stdout + done.stderr)[-6000:]}
    result = json.loads(out.read_text())
    return {**result, "first_step_seconds": result.pop("first_step_at") - started}


def _conversations(file: Path, seq: int, tokenizer: str) -> Path:
    """Questions and answers about the standard library in conversations that fill almost `seq` tokens each."""
    from tokenizers import Tokenizer

    from nemo_ext.data.stdlib_docs import questions

    encoder, turn = Tokenizer.from_file(f"{tokenizer}/tokenizer.json"), 5  # tokens that the template puts around a message
    messages: list[dict] = []
    held = 0
    with open(file, "w") as output:
        for record in questions():
            count = sum(len(encoder.encode(message["content"])) + turn for message in record["messages"])
            if held + count > seq - 64:
                output.write(json.dumps({"messages": messages}) + "\n")
                messages, held = [], 0
            messages += record["messages"]
            held += count
    return file


def figures(result: dict, case: dict, warm: int) -> dict:
    """Step time, tokens/s a GPU and TFLOP/s a GPU of one run."""
    if "error" in result:
        return result
    seconds = statistics.median(result["step_times"][warm:])
    tokens = case["global_batch"] * case["seq"] / seconds / case["gpus"]
    shape, adapter = size("llama3", case["size"]).architecture, None
    if "recipe" in case:
        names = adapters.targets(shape.family, "all-linear")
        adapter = adapters.num_parameters(shape, names, fields()["rank"].default)
    flops = shape.flops_per_token(case["seq"], adapter)
    return {**result, "step_seconds": seconds, "tokens_per_s_per_gpu": tokens, "tflops_per_gpu": tokens * flops / 1e12}


def main(arguments: list[str]) -> None:
    pairs = [a.split("=", 1) for a in arguments]
    options = {"steps": "16", "warm": "5", "stock": "true", **dict(pairs)}
    steps, warm, out = int(options["steps"]), int(options["warm"]), Path(options["out"])
    more = {name: int(value) if value.isdecimal() else value for name, value in dict(pairs).items() if name not in OPTIONS}
    for name in [v for k, v in pairs if k == "case"]:
        case = CASES[name] | more
        name = " ".join([name, *(f"{key}={value}" for key, value in more.items() if key != "profile")])
        row = {"case": case, "steps": steps, "warm": warm, "date": datetime.date.today().isoformat(), "gpu": machine.device()}
        row["versions"] = machine.versions()
        with tempfile.TemporaryDirectory() as folder:
            for side in (ours, stock) if options["stock"] == "true" and "recipe" not in case else (ours,):
                row[side.__name__] = figures(side(case, steps, options["tokenizer"], Path(folder)), case, warm)
                print(name, side.__name__, json.dumps(_short(row[side.__name__])), flush=True)
                _save(out, machine.on(name), row)


def _save(out: Path, name: str, row: dict) -> None:
    results = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**results, name: row}, indent=1) + "\n")


def _short(result: dict) -> dict:
    keys = ("step_seconds tokens_per_s_per_gpu tflops_per_gpu memory_gib reserved_gib outside_torch_gib planned_gib "
            "first_step_seconds error log").split()  # fmt: skip
    return {k: round(result[k], 3) if isinstance(result[k], float) else result[k] for k in keys if k in result}


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    main(sys.argv[1:])
