"""Images in requests: from data: URLs to what a vision tower takes, within limits, and to embeddings of the decoder's width.

LLaVA and LLaVA-NeXT. An image stands in the prompt as one placeholder token for each of its embeddings; which feature each of
them takes is `gather`, so that the network knows nothing of tiles.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.multimodal import senses_of
from deploy.engine.request import Refused
from nemo_ext import run_folder
from nemo_ext.data.multimodal import inputs
from nemo_ext.data.multimodal.image import KINDS, decode
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import VISION, Sense

DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.ASCII)
UNSUPPORTED = "unsupported_value"
MOST = 8  # images in a request
MOST_PIXELS = 1 << 24  # of an image


@dataclass(frozen=True)
class Picture:
    """An image as the tower takes it, `inputs` float32 [n, 3, H, W], and for each placeholder its row of the inputs' features."""

    inputs: np.ndarray
    gather: np.ndarray


class Images:
    """What a model's folder says of images, and how many and how large ones a request may have."""

    def __init__(self, sense: Sense, folder: Path, most: int, most_pixels: int) -> None:
        """Raises UserError for an image processor that does not suit the encoder."""
        self.sense, self.most, self.most_pixels = sense, most, most_pixels
        self._input = inputs.read(sense, folder)

    def picture(self, url: str) -> Picture:
        """The image of a data: URL. Raises Refused for any other URL, for what is no image, and for one beyond the limits."""
        start = DATA_URL.match(url)
        if start is None:
            shown = url[:40]
            raise Refused(f"image_url {shown!r}: this server fetches nothing: send the image itself, data:image/png;base64,...",
                          UNSUPPORTED)  # fmt: skip
        try:
            data = base64.b64decode(url[start.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise Refused("image_url: the data is not base64") from None
        self._check_pixels(data)
        try:
            image = decode(data)
            return Picture(self._input.of_image(image), self._input.gather((image.height, image.width)))
        except UserError as error:
            raise Refused(f"image_url: {error}") from None

    def expand(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[int, ...]:
        """The prompt with each placeholder as often as its picture has embeddings. Raises Refused where counts differ."""
        token = self.sense.token_id
        if (found := list(prompt).count(token)) != len(pictures):
            raise Refused(f"the prompt has {found} placeholders for {len(pictures)} images: leave placeholders out of texts")
        left = iter(pictures)
        expanded: list[int] = []
        for each in prompt:
            expanded += [each] * len(next(left).gather) if each == token else [each]
        return tuple(expanded)

    def check_count(self, count: int) -> None:
        """Raises Refused for more images than a request may have."""
        if count > self.most:
            raise Refused(f"{count} images in one request are more than the server's {self.most}")

    def _check_pixels(self, data: bytes) -> None:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=KINDS) as image:  # its head only
                width, height = image.size
        except Exception:  # what is wrong with it is said where it is decoded
            return
        if width * height > self.most_pixels:
            raise Refused(f"image_url: an image of {width}x{height} pixels is more than the server's {self.most_pixels:,}")


def of_model(folder: Path, most: int, most_pixels: int) -> Images | None:
    """What the model in `folder` sees with; None for a text model. Raises UserError for one that hears."""
    config: dict[str, Any] = run_folder.read_json(folder / "config.json") or {}
    senses = senses_of(config)
    if not senses:
        return None
    if [sense.modality for sense in senses] != [VISION]:
        raise UserError(f"{folder} hears: only images are served")
    return Images(senses[0], folder, most, most_pixels)


def embeddings(model: Any, sense: Sense, pictures: Sequence[Picture]) -> Any:
    """Embeddings [placeholders, h] of a request's pictures in order, by transformers' LLaVA or LLaVA-NeXT `model`."""
    import torch

    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    found = []
    for picture in pictures:
        pixels = torch.from_numpy(picture.inputs).to(model.device, model.dtype)
        hidden = tower(pixels, output_hidden_states=True).hidden_states[sense.encoder.feature_layer]
        if sense.encoder.has_class_token and not sense.encoder.class_token:
            hidden = hidden[:, 1:]
        table = projector(hidden).flatten(0, 1)
        if sense.tiling is not None:
            table = torch.cat([table, model.model.image_newline[None].to(table.dtype)])  # NEWLINE is the last row
        found.append(table[torch.from_numpy(picture.gather).to(model.device)])
    return torch.cat(found)
