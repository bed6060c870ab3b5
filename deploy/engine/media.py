"""Images and sounds in requests, what both have in common: limits, placeholders, and what their encoder takes.

Each stands in the prompt as one placeholder token for each of its embeddings; which feature each of them takes is `gather`, so
that the network knows nothing of tiles and windows.
"""

from __future__ import annotations

import base64
import binascii
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.engine.request import Refused
from nemo_ext.data.multimodal import inputs
from nemo_ext.multimodal.description import Sense

UNSUPPORTED = "unsupported_value"
MOST = 8  # images or sounds in a request


@dataclass(frozen=True)
class Medium:
    """An image or a sound as the encoder takes it, `inputs` float32 [n, 3, H, W] or [n, mel bins, frames], and for each
    placeholder its row of the inputs' features."""

    inputs: np.ndarray
    gather: np.ndarray


class Media(ABC):
    """What a model's folder says of images or sounds, and how many a request may have. `what` they are, for people; `part` is
    the API's word for one."""

    what: str
    part: str

    def __init__(self, sense: Sense, folder: Path, most: int) -> None:
        """Raises UserError for a processor that does not suit the encoder."""
        self.sense, self.most = sense, most
        self._input = inputs.read(sense, folder)

    @abstractmethod
    def made(self, source: str) -> Medium:
        """What the encoder takes, from what a request says. Raises Refused."""

    @abstractmethod
    def embeddings(self, model: Any, media: Sequence[Medium]) -> Any:
        """Embeddings [placeholders, h] of a request's media in order, by transformers' `model`."""

    def expand(self, prompt: Sequence[int], media: Sequence[Medium]) -> tuple[int, ...]:
        """The prompt with each placeholder as often as its medium has embeddings. Raises Refused where counts differ."""
        token = self.sense.token_id
        if (found := list(prompt).count(token)) != len(media):
            raise Refused(f"the prompt has {found} placeholders for {len(media)} {self.what}: leave placeholders out of texts")
        left = iter(media)
        expanded: list[int] = []
        for each in prompt:
            expanded += [each] * len(next(left).gather) if each == token else [each]
        return tuple(expanded)

    def check(self, kinds: Sequence[str]) -> None:
        """Raises Refused for other kinds of media than the model's, and for more than a request may have."""
        if other := next((kind for kind in kinds if kind != self.part), None):
            raise Refused(f"this model takes content of type {self.part}: {other} is not served", UNSUPPORTED)
        if len(kinds) > self.most:
            raise Refused(f"{len(kinds)} {self.what} in one request are more than the server's {self.most}")


def from_base64(text: str, part: str) -> bytes:
    """Bytes of base64. Raises Refused."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"{part}: the data is not base64") from None
