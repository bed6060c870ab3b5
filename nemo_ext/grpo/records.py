"""What a run of the embedded engine writes while it goes on: metrics.jsonl, status.json, TensorBoard, held-out answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from nemo_ext import run_folder
from nemo_ext.callbacks.sinks import open_sinks

EVALUATIONS = "evaluations"  # in a run's folder: the held-out answers of each evaluation


class Records:
    """Appends records of steps and evaluations; lines after `step`, from which this start goes on, are dropped."""

    def __init__(self, run_dir: Path, step: int, max_steps: int, tensorboard: bool, wandb: str | None) -> None:
        self.run_dir, self.max_steps, self.started = run_dir, max_steps, time.time()
        kept = run_folder.truncate_records(run_dir, step)
        self.evaluated = {record["step"] for record in kept if run_folder.is_validation(record)}
        self.tokens = next((record["tokens"] for record in reversed(kept) if record.get("tokens")), 0)
        self._sinks = open_sinks(str(run_dir), step, tensorboard, wandb)
        self._phase = ""

    def phase(self, phase: str, step: int, **more: Any) -> None:
        """Say in status.json what is done now, if it is something else than before, and what `more` there is to say of it."""
        if phase != self._phase:
            self._phase = phase
            run_folder.write_status(self.run_dir, phase, step, self.max_steps, started=self.started, **more)

    def step(self, record: dict[str, Any]) -> None:
        """A training step's figures; `tokens` become those since the run's first step."""
        self.tokens += record["tokens"]
        self._write({**record, "tokens": self.tokens, "time": time.time()})

    def evaluation(self, step: int, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """An evaluation's figures, and its answers in a file of their own."""
        run_folder.write_json(answers_file(self.run_dir, step), {"step": step, "answers": rows})
        self.evaluated.add(step)
        self._write({"step": step, **record, "time": time.time()})

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _write(self, record: dict[str, Any]) -> None:
        with open(self.run_dir / run_folder.METRICS, "a") as file:
            file.write(json.dumps(run_folder.finite(record)) + "\n")
        for sink in self._sinks:
            sink.write(record)


def answers_file(run_dir: Path, step: int) -> Path:
    """Where the held-out answers of an evaluation are: {"answers": [{question, reference, answer, reward}]}."""
    return run_dir / EVALUATIONS / f"step-{step:06d}.json"
