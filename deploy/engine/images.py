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

from deploy.engine.request import Refused
from nemo_ext.data.multimodal import inputs
from nemo_ext.data.multimodal.image import KINDS, decode
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Sense

DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.ASCII)
UNSUPPORTED = "unsupported_value"
MOST = 8  # images in a request
MOST_PIXELS = 1 << 24  # of an image


@dataclass(frozen=True)
class Picture:
    """An image or a sound as the encoder takes it, `inputs` float32 [n, 3, H, W] or [n, mel bins, frames], and for each
    placeholder its row of the inputs' features."""

    inputs: np.ndarray
    gather: np.ndarray


class Media:
    """What a model's folder says of images or sounds, and how many a request may have. `kind` is what chat templates call them,
    `part` what the API does."""

    kind: str
    part: str

    def __init__(self, sense: Sense, folder: Path, most: int) -> None:
        """Raises UserError for a processor that does not suit the encoder."""
        self.sense, self.most = sense, most
        self._input = inputs.read(sense, folder)

    def made(self, source: str) -> Picture:
        """What the encoder takes, from what a request says. Raises Refused."""
        raise NotImplementedError

    def embeddings(self, model: Any, pictures: Sequence[Picture]) -> Any:
        """Embeddings [placeholders, h] of a request's media in order, by transformers' `model`."""
        raise NotImplementedError

    def expand(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[int, ...]:
        """The prompt with each placeholder as often as its picture has embeddings. Raises Refused where counts differ."""
        token = self.sense.token_id
        if (found := list(prompt).count(token)) != len(pictures):
            what = "images" if self.kind == "image" else "sounds"
            raise Refused(f"the prompt has {found} placeholders for {len(pictures)} {what}: leave placeholders out of texts")
        left = iter(pictures)
        expanded: list[int] = []
        for each in prompt:
            expanded += [each] * len(next(left).gather) if each == token else [each]
        return tuple(expanded)

    def check(self, kinds: Sequence[str]) -> None:
        """Raises Refused for other kinds of media than the model's, and for more than a request may have."""
        if other := next((kind for kind in kinds if kind != self.part), None):
            raise Refused(f"this model takes content of type {self.part}: {other} is not served", UNSUPPORTED)
        if len(kinds) > self.most:
            what = "images" if self.kind == "image" else "sounds"
            raise Refused(f"{len(kinds)} {what} in one request are more than the server's {self.most}")


def from_base64(text: str, part: str) -> bytes:
    """Bytes of base64. Raises Refused."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"{part}: the data is not base64") from None


class Images(Media):
    """What a model's folder says of images, and how many and how large ones a request may have."""

    kind, part = "image", "image_url"

    def __init__(self, sense: Sense, folder: Path, most: int, most_pixels: int) -> None:
        """Raises UserError for an image processor that does not suit the encoder."""
        super().__init__(sense, folder, most)
        self.most_pixels = most_pixels

    def made(self, url: str) -> Picture:
        """The image of a data: URL. Raises Refused for any other URL, for what is no image, and for one beyond the limits."""
        start = DATA_URL.match(url)
        if start is None:
            shown = url[:40]
            raise Refused(f"image_url {shown!r}: this server fetches nothing: send the image itself, data:image/png;base64,...",
                          UNSUPPORTED)  # fmt: skip
        data = from_base64(url[start.end() :], self.part)
        self._check_pixels(data)
        try:
            image = decode(data)
            return Picture(self._input.of_image(image), self._input.gather((image.height, image.width)))
        except UserError as error:
            raise Refused(f"image_url: {error}") from None

    def _check_pixels(self, data: bytes) -> None:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=KINDS) as image:  # its head only
                width, height = image.size
        except Exception:  # what is wrong with it is said where it is decoded
            return
        if width * height > self.most_pixels:
            raise Refused(f"image_url: an image of {width}x{height} pixels is more than the server's {self.most_pixels:,}")

    def embeddings(self, model: Any, pictures: Sequence[Picture]) -> Any:
        """Embeddings [placeholders, h] of a request's pictures in order, by transformers' LLaVA or LLaVA-NeXT `model`."""
        import torch

        sense, tower, projector = self.sense, model.model.vision_tower, model.model.multi_modal_projector
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
