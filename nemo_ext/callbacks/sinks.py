"""Where the figures of a run go beside its metrics.jsonl: TensorBoard, and Weights & Biases when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from nemo_ext import run_folder
from nemo_ext.disk import write_atomic
from nemo_ext.errors import UserError


class Sink(Protocol):
    """Takes the records of metrics.jsonl as they are written."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_sinks(run_dir: str, step: int, tensorboard: bool, wandb: str | None) -> list[Sink]:
    """The sinks of a run that starts at `step`; `wandb` is a project, or None."""
    found: list[Sink] = [TensorBoard(run_dir, step)] if tensorboard else []
    return [*found, WandB(run_dir, wandb, step)] if wandb else found


class TensorBoard:
    """Events in the run's folder, a tag per figure; those of a run that is resumed end where it resumes."""

    def __init__(self, run_dir: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(run_dir) / run_folder.TENSORBOARD), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        for tag, value in _figures(record).items():
            self._writer.add_scalar(tag, value, record["step"], walltime=record["time"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run of the folder's name. Its identifier is kept in the folder, so that a resumed run continues it."""

    def __init__(self, run_dir: str, project: str, step: int) -> None:
        wandb = import_wandb()
        name = Path(run_dir).resolve().name
        known = Path(run_dir) / "wandb" / "id"
        identifier = known.read_text().strip() if step and known.exists() else wandb.util.generate_id()
        write_atomic(known, identifier + "\n")
        self._run = wandb.init(project=project, name=name, id=identifier, dir=run_dir, resume="allow")

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(_figures(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _figures(record: dict[str, Any]) -> dict[str, float]:
    """What of a record is a curve."""
    return {k: value for k, value in record.items() if k not in ("step", "time") and isinstance(value, (int, float))}


def import_wandb() -> Any:
    """Weights & Biases. Raises UserError where the package is missing."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb= is set but Weights & Biases is not installed: pip install wandb, or leave wandb= out") from error
    return wandb
