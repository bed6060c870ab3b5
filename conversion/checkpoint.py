"""One name for a checkpoint of any format: `hf:FOLDER`, `nemo:FOLDER` or `gguf:FILE`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conversion import hub_cache, nemo_folder
from conversion.multimodal import language_model, senses_of
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Sense

KINDS = ("hf", "nemo", "gguf")
TOKENIZER_MARKS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine's disk. Raises UserError where it is used and is not what its kind says."""

    kind: str
    path: Path

    @classmethod
    def parse(cls, value: str | Path | Checkpoint) -> Checkpoint:
        """`kind:PATH`, `hf:NAME` of a model in Hugging Face's local cache, or a path alone whose content says what it is."""
        if isinstance(value, Checkpoint):
            return value
        kind, separator, rest = str(value).partition(":")
        if separator and kind in KINDS:
            path = Path(rest).expanduser()
            return cls(kind, (kind == "hf" and not path.exists() and hub_cache.find(rest)) or path)
        path = Path(value)
        if separator and not path.exists():
            raise UserError(f"{value}: {kind}: is none of {', '.join(f'{k}:' for k in KINDS)}")
        if path.is_file():
            return cls("gguf", path)
        if not path.is_dir():
            raise UserError(f"{path}: there is no such file or folder")
        return cls("hf" if (path / "config.json").is_file() else "nemo", path)

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"

    @cached_property
    def nemo(self) -> nemo_folder.NemoCheckpoint:
        """The NeMo checkpoint that the path means."""
        return nemo_folder.find(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of a Hugging Face folder."""
        from conversion.hf_to_nemo import read_config

        return read_config(self.path)

    @cached_property
    def architecture(self) -> Architecture:
        """What the checkpoint describes; UserError for a Hugging Face model of no known family, and for GGUF."""
        from conversion import families

        if self.kind == "gguf":
            raise UserError(f"{self}: a GGUF file is compared by its tensors")
        return self.nemo.architecture if self.kind == "nemo" else families.architecture(self.config)

    @cached_property
    def senses(self) -> tuple[Sense, ...]:
        """What the model sees or hears with; empty for a text model."""
        if self.kind == "gguf":
            return ()
        return self.nemo.senses if self.kind == "nemo" else senses_of(self.config)

    @property
    def vocab_size(self) -> int:
        """Token ids below this have an embedding."""
        if self.kind == "nemo":
            return self.architecture.vocab_size
        return {**self.config, **self.config.get("text_config", {}), **language_model(self.config)}["vocab_size"]

    @property
    def max_positions(self) -> int:
        """Tokens that a prompt may have."""
        if self.kind == "nemo":
            return self.architecture.max_position_embeddings
        text = {**self.config, **self.config.get("text_config", {}), **language_model(self.config)}
        return text.get("max_position_embeddings", 2048)

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer's files, None where there are none."""
        folder = {"hf": self.path, "gguf": None}.get(self.kind) if self.kind != "nemo" else self.nemo.tokenizer
        return folder if folder and any((folder / name).is_file() for name in TOKENIZER_MARKS) else None
