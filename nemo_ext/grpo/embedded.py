"""The embedded engine: one process on one device, the CPU or a GPU, through TRL's GRPOTrainer."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from nemo_ext import platform, run_folder
from nemo_ext.errors import RunError
from nemo_ext.grpo import evaluation, settings
from nemo_ext.grpo.advantages import step_seed
from nemo_ext.grpo.records import Records
from nemo_ext.platform import hardware

GIB = 2**30
TRAIN, HELDOUT = "problems/train.jsonl", "problems/heldout.jsonl"  # in a run's folder
REWARD_SETTINGS = ("judge_url", "judge_model", "reward_model")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GROUP_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
EVALUATED_AT_ONCE = 64  # answers


def build_reward(keys: dict[str, Any]):
    """The reward of a recipe's keys. Raises UserError."""
    from nemo_ext import rewards

    return rewards.build(keys["reward"], timeout=keys["reward_timeout"], **{name: keys[name] for name in REWARD_SETTINGS})


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Problems as the launcher wrote them, a JSON object a line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def train(keys: dict[str, Any], run_dir: str | Path, model: str, checkpoint: str | None = None) -> None:
    """Train in this process, from the Hugging Face folder `model` or on from a `checkpoint` of this run.

    The problems are in the run's folder. Ends early, saved, on SIGTERM, SIGINT or SIGUSR1. Raises RunError where it cannot go on.
    """
    run_dir = Path(run_dir)
    for name in GROUP_NAMES:  # torchrun's: one process is no group
        os.environ.pop(name, None)
    if hardware.has_cuda():
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    platform.activate()
    import numpy
    import torch
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
    from trl import GRPOConfig

    from nemo_ext.grpo.trainer import Trainer

    step = int(Path(checkpoint).name.removeprefix("step-")) if checkpoint else 0
    rows, heldout = read_rows(run_dir / TRAIN), read_rows(run_dir / HELDOUT)[: keys["val_samples"]]
    records = Records(run_dir, step, keys["steps"], keys["tensorboard"], keys["wandb"])
    records.phase("starting", step)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "tokenizer", padding_side="left")
    arguments = settings.trl_arguments(keys, str(run_dir / run_folder.CHECKPOINTS))
    received: list[int] = []

    class Steps(TrainerCallback):
        """Seeds each step by its number, so that a resumed run draws what it would have drawn, and ends on a signal."""

        def on_train_begin(self, args, state, control, **kwargs):
            evaluate()

        def on_step_begin(self, args, state, control, **kwargs):
            records.phase("training", state.global_step)
            set_seed(step_seed(keys["seed"], state.global_step))
            trainer.spent = dict.fromkeys(trainer.spent, 0.0)
            trainer.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            trainer.ended = time.perf_counter()
            if received:
                control.should_training_stop = control.should_save = True

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                records.step(_record(trainer, logs))
                if not numpy.isfinite(logs["grad_norm"]):
                    raise RunError(f"the gradient norm is {logs['grad_norm']} at step {state.global_step}: lower lr=")
                if control.should_save:
                    records.phase("saving", state.global_step)
                evaluate()

    def evaluate() -> None:
        at = trainer.state.global_step
        if (at % keys["val_every"] and at < keys["steps"]) or at in records.evaluated or not heldout:
            return
        records.phase("evaluating", at)
        batches = trainer.answers(heldout, keys["seed"], EVALUATED_AT_ONCE)
        records.evaluation(at, *evaluation.measure(heldout, batches, trainer.reward, tokenizer, trainer.eos_token_ids))

    with build_reward(keys) as reward:
        reward.check(rows + heldout)
        trainer = Trainer(keys, rows, reward, model=model, args=GRPOConfig(**arguments), processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Steps())
        for each in SIGNALS:
            signal.signal(each, lambda number, frame: received.append(number))
        random.seed(keys["seed"])
        torch.manual_seed(keys["seed"])
        trainer.train(resume_from_checkpoint=checkpoint)
    done = trainer.state.global_step
    records.phase("finished" if done >= keys["steps"] else "stopped", done)
    records.close()


def _record(trainer: Any, logs: dict[str, Any]) -> dict[str, Any]:
    """A step's line of metrics.jsonl."""
    took = trainer.ended - trainer.began
    record = {
        "step": trainer.state.global_step,
        "loss": logs["loss"],
        "lr": logs["learning_rate"],
        "grad_norm": logs["grad_norm"],
        **trainer.figures,
        "entropy": logs.get("entropy"),
        "clipped": logs.get("clip_ratio/region_mean"),
        "tokens_per_s": trainer.figures["tokens"] / took,
        "memory": hardware.peak_memory() / GIB,
        "step_time": took,
        "generation_time": trainer.spent["generation"],
        "scoring_time": trainer.spent["scoring"],
        "training_time": took - sum(trainer.spent.values()),
    }
    return record | ({"kl": logs["kl"]} if "kl" in logs else {})
