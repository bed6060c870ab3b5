"""What lies beside a Megatron distributed checkpoint and says which model it is.

`architecture.json` is the shape (`Architecture.to_dict()`), `senses.json` what a model sees or hears with (a list of `Sense`s; no
file for a text model), `tokenizer/` the tokenizer with chat template, processor and generation_config.json, `conversion.json`
where the weights came from: source, hash, the original config.json. A converted folder holds them beside its `weights/`; a run's
folder holds them once, under `model/`, for all its checkpoints. A checkpoint that NeMo 2 itself wrote has `context/` instead
(`conversion/nemo_context.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversion import nemo_context
from nemo_ext import run_folder
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Sense

WEIGHTS = "weights"
ARCHITECTURE = "architecture.json"
SENSES = "senses.json"
RECORD = "conversion.json"
ADAPTER = "adapter.json"  # what a checkpoint that holds only an adapter has instead of, or beside, the others
TOKENIZER = "tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class NemoCheckpoint:
    """A NeMo checkpoint and the model it belongs to."""

    folder: Path  # holds weights/
    architecture: Architecture
    tokenizer: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)  # conversion.json; empty for a model trained from random weights
    senses: tuple[Sense, ...] = ()  # none: a text model

    @property
    def weights(self) -> Path:
        """The Megatron distributed checkpoint."""
        return self.folder / WEIGHTS


def find(path: str | Path, adapter: bool = False) -> NemoCheckpoint:
    """The checkpoint at `path`: a converted folder, a run (its newest checkpoint), one checkpoint of a run, or one of NeMo's own.

    Raises UserError for anything else, for an adapter unless it is to be one, and where a description cannot be read.
    """
    found, description = _find(Path(path))
    if (description / ADAPTER).is_file() and not adapter:
        raise UserError(
            f"{path} holds an adapter, not a model: convert it with from=nemo: to=lora:, and merge that with from=lora: to=hf:"
        )
    return _described(found, description)


def description(path: str | Path) -> Path:
    """The folder of what describes the checkpoint that `find` finds."""
    return _find(Path(path))[1]


def _find(path: Path) -> tuple[Path, Path]:
    """The folders of a checkpoint and of what describes it."""
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder")
    if (path / run_folder.CHECKPOINTS).is_dir():
        newest = run_folder.newest_checkpoint(path / run_folder.CHECKPOINTS)
        if newest is None:
            raise UserError(f"{path} is a run without a complete checkpoint")
        return newest[1], path / run_folder.MODEL
    if path.name.endswith((run_folder.PARTIAL, run_folder.DAMAGED)):
        raise UserError(f"{path} is not a complete checkpoint: choose another of {path.parent}")
    if run_folder.STEP_FOLDER.match(path.name) and path.absolute().parent.name == run_folder.CHECKPOINTS:
        return path, path.absolute().parents[1] / run_folder.MODEL
    return path, path


def write_description(folder: Path, architecture: Architecture, record: dict[str, Any], senses: Sequence[Sense] = ()) -> None:
    """Put architecture.json, conversion.json and, if there are any, senses.json into `folder`; the tokenizer is the caller's to
    copy."""
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(folder / ARCHITECTURE, architecture.to_dict())
    if senses:
        run_folder.write_json(folder / SENSES, [sense.to_dict() for sense in senses])
    run_folder.write_json(folder / RECORD, record)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what belongs to a tokenizer, chat template, processor and generation_config.json included, into a new `folder`."""
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def read_architecture(folder: Path) -> Architecture:
    """The `architecture.json` in `folder`; UserError if it is missing or not one."""
    file = Path(folder) / ARCHITECTURE
    if not file.is_file():
        raise UserError(f"{folder} says nowhere which model it is: it has neither {ARCHITECTURE} nor {nemo_context.MODEL}")
    try:
        return Architecture(**json.loads(file.read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def read_senses(folder: Path) -> tuple[Sense, ...]:
    """The `senses.json` in `folder`, empty where there is none; UserError if it cannot be read."""
    file = Path(folder) / SENSES
    if not file.is_file():
        return ()
    try:
        return tuple(Sense.from_dict(entry) for entry in json.loads(file.read_text()))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _described(folder: Path, description: Path) -> NemoCheckpoint:
    if not (folder / WEIGHTS / "metadata.json").is_file():
        raise UserError(f"{folder} is no NeMo checkpoint: it has no {WEIGHTS}/metadata.json")
    own = (description / ARCHITECTURE).is_file() or not (description / nemo_context.MODEL).is_file()
    read, tokens = (read_architecture, TOKENIZER) if own else (nemo_context.read_architecture, nemo_context.TOKENIZER)
    tokenizer, file = description / tokens, description / RECORD
    record = run_folder.read_json(file)
    if record is None and file.exists():
        raise UserError(f"{file} cannot be read: delete it to do without what it says of the original, or copy it again")
    return NemoCheckpoint(
        folder,
        read(description),
        tokenizer if tokenizer.is_dir() and any(tokenizer.iterdir()) else None,
        record or {},
        read_senses(description),
    )
