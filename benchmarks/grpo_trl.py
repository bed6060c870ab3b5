"""GRPO by our embedded engine and by TRL's own trainer, on the same device, model, problems and settings, one after the other.

    python benchmarks/grpo_trl.py size=smoke backend=vllm backend=transformers prompts=32 group=16 steps=20 out=RESULTS.json

Every other key goes to `recipe=grpo_llama3`. Plain TRL gets the arguments that our engine gives its trainer, the problems as
chat messages, and the same reward, called directly. Seconds a step are the median of those after the first `warm=` (2), with what
generation takes of them; a step's tokens are those of its prompts and answers. Held-out reward is ours only.

Each step is a line here as soon as it is made. `limit=` seconds end everything: the steps made until then count, and the file
says so.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402

PACKAGES = ("torch", "transformers", "trl", "vllm", "accelerate")
KINDS = ("ours", "plain")
PLAIN = "plain.jsonl"  # in the run's folder: the steps of plain TRL, in the form of our metrics.jsonl


def ours(backend: str, keys: list[str], run_dir: Path, deadline: float) -> dict:
    """A run through the launcher; its own metrics are the figures."""
    command = [
        sys.executable,
        str(ROOT / "launchers/run.py"),
        "recipe=grpo_llama3",
        f"backend={backend}",
        f"out={run_dir}",
        *keys,
    ]
    return _run(command, run_dir / "metrics.jsonl", deadline)


def plain(backend: str, keys: list[str], run_dir: Path, deadline: float) -> dict:
    """TRL's trainer with the settings of our run in `run_dir`, in a process of its own."""
    return _run([sys.executable, __file__, f"of={run_dir}"], run_dir / PLAIN, deadline)


def train_plain(run_dir: Path) -> None:
    """In this process: train as the run in `run_dir` did, by TRL's GRPOTrainer as it is; a line of PLAIN there for each step."""
    from nemo_ext import platform

    platform.activate()
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from nemo_ext.grpo import settings
    from nemo_ext.grpo.embedded import TRAIN, build_reward, read_rows
    from nemo_ext.platform import hardware

    job = json.loads((run_dir / "job.json").read_text())
    keys, rows = job["keys"], read_rows(run_dir / TRAIN)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "tokenizer", padding_side="left")
    arguments = settings.trl_arguments(keys, str(run_dir / "plain")) | {"save_strategy": "no"}
    spent: dict[str, float] = {}

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()
            spent.update(generation=0.0, scoring=0.0)

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.took = time.perf_counter() - self.began

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "reward" in logs:
                record = {
                    "step": state.global_step, "loss": logs["loss"], "reward": logs["reward"], "tokens": int(logs["num_tokens"]),
                    "step_time": self.took, "generation_time": spent["generation"], "scoring_time": spent["scoring"],
                    "memory": hardware.peak_memory() / 2**30,
                }  # fmt: skip
                with open(run_dir / PLAIN, "a") as file:
                    file.write(json.dumps(record) + "\n")

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *arguments, **named):
            began = time.perf_counter()
            try:
                return super()._generate_single_turn(*arguments, **named)
            finally:
                spent["generation"] += time.perf_counter() - began

    with build_reward(keys) as reward:

        def score(completions, place, **unused):
            began = time.perf_counter()
            texts = [answer[0]["content"] for answer in completions]
            values = list(map(float, reward(texts, [rows[i] for i in place])))
            spent["scoring"] += time.perf_counter() - began
            return values

        data = Dataset.from_dict({"prompt": [row["prompt"] for row in rows], "place": list(range(len(rows)))})
        trainer = Timed(job["weights"], reward_funcs=[score], args=GRPOConfig(**arguments), train_dataset=data,
                        processing_class=tokenizer, callbacks=[Steps()])  # fmt: skip
        trainer.train()


def figures(found: dict, warm: int) -> dict:
    """Medians of the steps after `warm`, from the lines of `_run`; the error alone where there is no such step."""
    records = found["records"]
    steps = [record for record in records if "loss" in record]
    if len(steps) <= warm:
        return {"error": found["ended"] or f"{len(steps)} steps, of which the first {warm} do not count"}
    result = {name: [record[name[:-1]] for record in steps] for name in ("step_times", "generation_times", "scoring_times",
                                                                         "rewards")}  # fmt: skip
    tokens = [record["tokens"] for record in steps]
    result["tokens"] = [now - before for now, before in zip(tokens, [0, *tokens], strict=False)]
    result["peak_gib"] = max(record["memory"] for record in steps)
    result["heldout"] = {record["step"]: [record[n] for n in ("val_reward", "val_reward_low", "val_reward_high")]
                         for record in records if "val_reward" in record}  # fmt: skip
    medians = {name: statistics.median(result[name][warm:]) for name in ("step_times", "generation_times", "scoring_times",
                                                                         "tokens")}  # fmt: skip
    result |= {f"{name}_seconds": medians[f"{name}_times"] for name in ("step", "generation", "scoring")}
    result |= {"tokens_per_s": medians["tokens"] / medians["step_times"], "steps": len(steps)}
    result["seconds_until_first_step"] = found["first"]
    return result | ({"ended": found["ended"]} if found["ended"] else {})


def main(arguments: list[str]) -> None:
    pairs = [argument.split("=", 1) for argument in arguments]
    options = dict(pairs)
    if "of" in options:
        return train_plain(Path(options["of"]))
    out, warm, backends = Path(options["out"]), int(options.get("warm", 2)), [v for k, v in pairs if k == "backend"]
    kinds = options.get("kinds", ",".join(KINDS)).split(",")
    deadline = time.monotonic() + float(options.get("limit", "inf"))
    keys = ["=".join(pair) for pair in pairs if pair[0] not in ("out", "warm", "backend", "kinds", "limit")]
    for backend in backends:
        row = {
            "keys": keys,
            "date": datetime.date.today().isoformat(),
            "device": machine.device(),
            "versions": machine.versions(PACKAGES),
        }
        with tempfile.TemporaryDirectory() as folder:
            for kind in kinds:
                found = (ours if kind == "ours" else plain)(backend, keys, Path(folder) / "run", deadline)
                row[kind] = figures(found, warm)
                print(backend, kind, json.dumps(_short(row[kind])), flush=True)
                held = json.loads(out.read_text()) if out.exists() else {}
                out.write_text(json.dumps({**held, backend: row}, indent=1) + "\n")


def _run(command: list[str], file: Path, deadline: float) -> dict:
    """Run `command` until it ends, or to `deadline` on the monotonic clock, and print the lines of JSON that it adds to `file`.

    `records` are those lines, `first` the seconds until the first step's, `ended` why it did not end well ("" where it did).
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    started, records, first = time.monotonic(), [], None
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        over = False
        while not over:
            over = process.poll() is not None or time.monotonic() >= deadline
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            for line in lines[len(records) :]:
                if not line.endswith("\n"):
                    break
                records.append(json.loads(line))
                if "loss" in records[-1]:
                    first = first or time.monotonic() - started
                    print(f"{time.monotonic() - started:.0f} s", json.dumps(_step(records[-1])), flush=True)
            time.sleep(0.2)
        late = process.poll() is None
        if late:
            _end(process)
        output.seek(0)
        said = output.read()[-3000:]
    ended = "the time is over" if late else said if process.returncode else ""
    return {"records": records, "first": first, "ended": ended}


def _end(process: subprocess.Popen) -> None:
    """End a process and its group."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _step(record: dict) -> dict:
    names = ("step", "step_time", "generation_time", "reward")
    return {name: round(record[name], 3) for name in names}


def _short(result: dict) -> dict:
    names = "steps step_seconds generation_seconds tokens_per_s peak_gib seconds_until_first_step heldout ended error".split()
    return {name: result[name] for name in names if name in result}


if __name__ == "__main__":
    main(sys.argv[1:])
