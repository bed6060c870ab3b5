"""The embedded engine: one process on one device, the CPU or a GPU, through TRL's GRPOTrainer."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_ext import platform, run_folder
from nemo_ext.errors import RunError
from nemo_ext.grpo import evaluation, settings
from nemo_ext.grpo.advantages import step_seed
from nemo_ext.grpo.records import Records
from nemo_ext.platform import hardware
from nemo_ext.signals import SIGNALS, decisive

GIB = 2**30
TRAIN, HELDOUT = "problems/train.jsonl", "problems/heldout.jsonl"  # in a run's folder
REWARD_SETTINGS = ("judge_url", "judge_model", "judge_key_env", "reward_model", "sandbox_memory")
GROUP_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
               "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip
EVALUATED_AT_ONCE = 64  # answers


def build_reward(keys: dict[str, Any]):
    """The reward of a recipe's keys. Raises UserError."""
    from nemo_ext import rewards

    return rewards.build(keys["reward"], timeout=keys["reward_timeout"], **{name: keys[name] for name in REWARD_SETTINGS})


def build_tools(keys: dict[str, Any]):
    """The tools of a recipe's keys, not started; None where there are none. Raises UserError."""
    from nemo_ext.grpo.tools import Tools

    return Tools(keys["tools"], keys["tool_timeout"], keys["sandbox_memory"]) if keys["tools"] else None


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Problems as the launcher wrote them, a JSON object a line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def leave_group() -> None:
    """Take torchrun's names out of the environment: one process is no group, and vLLM makes one of its own, which would wait for
    the store of torchrun's agent."""
    for name in GROUP_NAMES:
        os.environ.pop(name, None)


def train(keys: dict[str, Any], run_dir: str | Path, model: str, checkpoint: str | None = None) -> None:
    """Train in this process, from the Hugging Face folder `model` or on from a `checkpoint` of this run.

    The problems are in the run's folder. Ends early, saved, on one of `SIGNALS`; ends the process where it comes no further for
    `hang_timeout` (`Watchdog`). Raises RunError where it cannot go on.
    """
    run_dir = Path(run_dir)
    leave_group()
    if hardware.has_cuda():
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    platform.activate()
    import numpy
    import torch
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
    from trl import GRPOConfig

    from nemo_ext.callbacks.watchdog import Watchdog
    from nemo_ext.data.chat.render import Renderer, Settings
    from nemo_ext.grpo.bad_steps import BadSteps
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
            watchdog.step = state.global_step + 1
            records.phase("training", state.global_step)
            set_seed(step_seed(keys["seed"], state.global_step))
            trainer.spent = dict.fromkeys(trainer.spent, 0.0)
            trainer.figures = dict(trainer.sampled)
            trainer.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            trainer.ended = time.perf_counter()
            if received:
                control.should_training_stop = control.should_save = True

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                records.step(_record(trainer, logs))
                if keys["on_nan"] == "stop" and not numpy.isfinite(logs["grad_norm"]):
                    raise RunError(f"the gradient norm is {logs['grad_norm']} at step {state.global_step}: lower lr=")
                if control.should_save:
                    records.phase("saving", state.global_step)
                    watchdog.come("saving", slow=True)
                evaluate()

    def evaluate() -> None:
        at = trainer.state.global_step
        if (at % keys["val_every"] and at < keys["steps"]) or at in records.evaluated or not heldout:
            return
        records.phase("evaluating", at)
        watchdog.come("evaluating", slow=True)
        batches = trainer.answers(heldout, keys["seed"], EVALUATED_AT_ONCE)
        records.evaluation(at, *evaluation.measure(heldout, batches, trainer.reward, trainer.eos_token_ids))

    watchdog = Watchdog(str(run_dir), keys["hang_timeout"])
    with build_reward(keys) as reward, ExitStack() as stack:
        stack.callback(watchdog.end)
        watchdog.start(rank=0, world=1)
        reward.check(rows + heldout)
        tools = renderer = None
        if keys["tools"]:
            tools, renderer = stack.enter_context(build_tools(keys)), Renderer(run_dir / "tokenizer", Settings(1))
        trainer = Trainer(keys, rows, reward, tools, renderer, model=model, args=GRPOConfig(**arguments),
                          processing_class=tokenizer)  # fmt: skip
        if checkpoint:
            trainer.go_on(Path(checkpoint))
        trainer.remove_callback(PrinterCallback)
        trainer.come = functools.partial(watchdog.come, slow=True)  # sampling takes as long as its longest answer
        trainer.add_callback(Steps())
        if keys["on_nan"] != "stop":
            trainer.add_callback(BadSteps(trainer, run_dir, keys["on_nan"]))
        for each in SIGNALS:
            signal.signal(each, lambda number, frame: received.append(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which the worker holds back until now
        random.seed(keys["seed"])
        torch.manual_seed(keys["seed"])
        trainer.train(resume_from_checkpoint=checkpoint)
    done = trainer.state.global_step
    if done >= keys["steps"]:
        records.phase("finished", done)
    else:
        records.phase("stopped", done, signal=decisive(received).name)
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
    if "tools" in trainer.spent:
        record["tools_time"] = trainer.spent["tools"]
    return record | ({"kl": logs["kl"]} if "kl" in logs else {})
