"""A folder of TensorRT-LLM, a checkpoint or its engines: config.json and a file of each rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_ext.errors import UserError


def read(
    name: str, folder: Path, file: str, model: Callable[[dict[str, Any]], dict[str, Any] | None], other: str
) -> dict[str, Any]:
    """config.json of the folder that the key `name` names.

    `model(config)`: the part of it that describes the model and its mapping; None: it is no such folder, which is `other`.
    `file`: a rank's, with {rank} in it. Raises UserError for anything else, and for missing ranks.
    """
    where = f"{name}={folder}"
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise UserError(f"{where}: config.json: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{where}: config.json is not JSON") from None
    described = model(config) if isinstance(config, dict) else None
    if not isinstance(described, dict) or not isinstance(described.get("mapping") or {}, dict):
        hint = ": it is a Hugging Face folder" if isinstance(config, dict) and "model_type" in config else ""
        raise UserError(f"{where} {other}{hint}")
    files = [file.format(rank=rank) for rank in range(ranks(described))]
    if missing := [each for each in files if not (folder / each).is_file()]:
        raise UserError(f"{where} lacks {missing[0]} of its {len(files)} ranks")
    return config


def ranks(model: dict[str, Any]) -> int:
    """Processes that a model was split for."""
    mapping = model.get("mapping") or {}
    return int(mapping.get("tp_size", 1)) * int(mapping.get("pp_size", 1)) * int(mapping.get("cp_size", 1))
