"""GRPO by our embedded engine and by TRL's own trainer, on the same device, model, problems and settings, one after the other.

    python benchmarks/grpo_trl.py size=smoke backend=vllm backend=transformers prompts=32 group=16 steps=20 out=RESULTS.json

Every other key goes to `recipe=grpo_llama3`. Plain TRL gets the arguments that our engine gives its trainer, the problems as
chat messages, and the same reward, called directly. Seconds a step are the median of those after the first `warm=` (2), with what
generation takes of them; a step's tokens are those of its prompts and answers. Held-out reward is ours only.
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
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PACKAGES = ("torch", "transformers", "trl", "vllm", "accelerate")
KINDS = ("ours", "plain")


def ours(backend: str, keys: list[str], run_dir: Path) -> dict:
    """A run through the launcher; its own metrics are the figures."""
    _call([sys.executable, str(ROOT / "launchers/run.py"), "recipe=grpo_llama3", f"backend={backend}", f"out={run_dir}", *keys])
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    return {
        "step_times": [record["step_time"] for record in steps],
        "generation_times": [record["generation_time"] for record in steps],
        "scoring_times": [record["scoring_time"] for record in steps],
        "tokens": [now["tokens"] - before for now, before in zip(steps, [0, *(r["tokens"] for r in steps)], strict=False)],
        "rewards": [record["reward"] for record in steps],
        "peak_gib": max(record["memory"] for record in steps),
        "heldout": {record["step"]: [record[n] for n in ("val_reward", "val_reward_low", "val_reward_high")]
                    for record in records if "val_reward" in record},
    }  # fmt: skip


def plain(backend: str, keys: list[str], run_dir: Path) -> dict:
    """TRL's trainer with the settings of our run in `run_dir`, in a process of its own."""
    result = run_dir / "plain.json"
    _call([sys.executable, __file__, f"of={run_dir}"])
    return json.loads(result.read_text())


def train_plain(run_dir: Path) -> None:
    """In this process: train as the run in `run_dir` did, by TRL's GRPOTrainer as it is; writes plain.json there."""
    from nemo_ext import platform

    platform.activate()
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from nemo_ext.grpo import settings
    from nemo_ext.grpo.embedded import TRAIN, build_reward, read_rows

    job = json.loads((run_dir / "job.json").read_text())
    keys, rows = job["keys"], read_rows(run_dir / TRAIN)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "tokenizer", padding_side="left")
    arguments = settings.trl_arguments(keys, str(run_dir / "plain")) | {"save_strategy": "no"}
    found: dict[str, list] = {name: [] for name in ("step_times", "generation_times", "tokens", "rewards")}

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()
            spent["generation"] = 0.0

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found["step_times"].append(time.perf_counter() - self.began)
            found["generation_times"].append(spent["generation"])

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "reward" in logs:
                found["rewards"].append(logs["reward"])
                found["tokens"].append(logs["num_tokens"] - sum(found["tokens"]))

    spent: dict[str, float] = {}

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *arguments, **named):
            began = time.perf_counter()
            try:
                return super()._generate_single_turn(*arguments, **named)
            finally:
                spent["generation"] += time.perf_counter() - began

    with build_reward(keys) as reward:

        def score(completions, place, **unused):
            texts = [answer[0]["content"] for answer in completions]
            return list(map(float, reward(texts, [rows[i] for i in place])))

        data = Dataset.from_dict({"prompt": [row["prompt"] for row in rows], "place": list(range(len(rows)))})
        trainer = Timed(job["weights"], reward_funcs=[score], args=GRPOConfig(**arguments), train_dataset=data,
                        processing_class=tokenizer, callbacks=[Steps()])  # fmt: skip
        trainer.train()
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    (run_dir / "plain.json").write_text(json.dumps(found))


def figures(result: dict, warm: int) -> dict:
    """Medians of the steps after `warm`."""
    if "error" in result:
        return result
    step, tokens = (statistics.median(result[name][warm:]) for name in ("step_times", "tokens"))
    generation = statistics.median(result["generation_times"][warm:])
    return {**result, "step_seconds": step, "generation_seconds": generation, "tokens_per_s": tokens / step if tokens else None}


def main(arguments: list[str]) -> None:
    pairs = [argument.split("=", 1) for argument in arguments]
    options = dict(pairs)
    if "of" in options:
        return train_plain(Path(options["of"]))
    out, warm, backends = Path(options["out"]), int(options.get("warm", 2)), [v for k, v in pairs if k == "backend"]
    kinds = options.get("kinds", ",".join(KINDS)).split(",")
    keys = ["=".join(pair) for pair in pairs if pair[0] not in ("out", "warm", "backend", "kinds")]
    for backend in backends:
        row = {"keys": keys, "date": datetime.date.today().isoformat(), "device": _device(), "versions": _versions()}
        with tempfile.TemporaryDirectory() as folder:
            for kind in kinds:
                try:
                    row[kind] = figures((ours if kind == "ours" else plain)(backend, keys, Path(folder) / "run"), warm)
                except RuntimeError as error:
                    row[kind] = {"error": str(error)}
                print(backend, kind, json.dumps(_short(row[kind])), flush=True)
                held = json.loads(out.read_text()) if out.exists() else {}
                out.write_text(json.dumps({**held, backend: row}, indent=1) + "\n")


def _call(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])


def _short(result: dict) -> dict:
    names = ("step_seconds", "generation_seconds", "tokens_per_s", "peak_gib", "heldout", "error")
    return {name: result[name] for name in names if name in result}


def _device() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return f"{os.cpu_count()} CPU cores"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
