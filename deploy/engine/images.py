"""Images in requests: from data: URLs to what a vision tower takes, within limits, and to embeddings of the decoder's width.

LLaVA and LLaVA-NeXT.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.engine.media import UNSUPPORTED, Media, Medium, from_base64
from deploy.engine.request import Refused
from nemo_ext.data.multimodal.image import KINDS, decode
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Sense

DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w=.+-]+)*;base64,", re.ASCII)
MOST_PIXELS = 1 << 24  # of an image


class Images(Media):
    """What a model's folder says of images, and how many and how large ones a request may have."""

    what, part = "images", "image_url"

    def __init__(self, sense: Sense, folder: Path, most: int, most_pixels: int) -> None:
        """Raises UserError for an image processor that does not suit the encoder."""
        super().__init__(sense, folder, most)
        self.most_pixels = most_pixels

    def made(self, url: str) -> Medium:
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
            return Medium(self._input.of_image(image), self._input.gather((image.height, image.width)))
        except UserError as error:
            raise Refused(f"{self.part}: {error}") from None

    def _check_pixels(self, data: bytes) -> None:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=KINDS) as image:  # its head only
                width, height = image.size
        except Exception:  # what is wrong with it is said where it is decoded
            return
        if width * height > self.most_pixels:
            raise Refused(f"image_url: an image of {width}x{height} pixels is more than the server's {self.most_pixels:,}")

    def embeddings(self, model: Any, images: Sequence[Medium]) -> Any:
        """Embeddings [placeholders, h] of a request's images in order, by transformers' LLaVA or LLaVA-NeXT `model`."""
        import torch

        sense, tower, projector = self.sense, model.model.vision_tower, model.model.multi_modal_projector
        found = []
        for image in images:
            pixels = torch.from_numpy(image.inputs).to(model.device, model.dtype)
            hidden = tower(pixels, output_hidden_states=True).hidden_states[sense.encoder.feature_layer]
            if sense.encoder.has_class_token and not sense.encoder.class_token:
                hidden = hidden[:, 1:]
            table = projector(hidden).flatten(0, 1)
            if sense.tiling is not None:
                table = torch.cat([table, model.model.image_newline[None].to(table.dtype)])  # NEWLINE is the last row
            found.append(table[torch.from_numpy(image.gather).to(model.device)])
        return torch.cat(found)
