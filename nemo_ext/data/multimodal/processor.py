"""The configuration of a Hugging Face processor: preprocessor_config.json, or what processor_config.json holds of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_ext.errors import UserError

FILES = ("preprocessor_config.json", "processor_config.json")


def read(folder: str | Path, part: str) -> tuple[dict[str, Any], str]:
    """The values, and the file's name for messages. `part` is "image_processor" or "feature_extractor". Raises UserError."""
    path = next((Path(folder) / name for name in FILES if (Path(folder) / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: no {FILES[0]}, which says how the encoder's inputs are made")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    return values.get(part, values), str(path)
