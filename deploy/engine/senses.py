"""What a model sees or hears with, as its folder says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversion.multimodal import OWN_TYPE, senses_of
from deploy.engine.images import Images
from deploy.engine.media import Media
from deploy.engine.sounds import Sounds
from nemo_ext import run_folder
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import VISION


def of_model(folder: Path, most: int, most_pixels: int) -> Media | None:
    """How the model in `folder` takes media, at most so many in a request; None for a text model.

    Raises UserError for a model that transformers has no class for.
    """
    config: dict[str, Any] = run_folder.read_json(folder / "config.json") or {}
    senses = senses_of(config)
    if not senses:
        return None
    if config.get("model_type") == OWN_TYPE:
        raise UserError(f"{folder}: transformers has no class for its encoder and projector, which are not served")
    (sense,) = senses
    return Images(sense, folder, most, most_pixels) if sense.modality == VISION else Sounds(sense, folder, most)
