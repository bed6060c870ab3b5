"""A sense with how its encoder's inputs are made: what preparation and the loader ask of every kind of media.

Both kinds have the same three questions: `inspect` says whether bytes are an image or a sound and how many placeholders stand
for it, `inputs` makes what the encoder takes, and `gather` says which of the encoder's features each placeholder is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemo_ext.data.multimodal import audio, tiling
from nemo_ext.data.multimodal.audio import AudioSettings
from nemo_ext.data.multimodal.image import ImageSettings, decode
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import AUDIO, VISION, Sense


class Input(Protocol):
    """An ImageInput or an AudioInput. `shape` is what `inspect` found: (height, width) or (samples,)."""

    sense: Sense

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""

    def inspect(self, data: bytes) -> tuple[tuple[int, ...], int]:
        """The shape, and the number of placeholders. Raises UserError for what cannot be decoded."""

    def inputs(self, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        """The encoder's inputs, float32 [n, ...]. Raises UserError for what is no longer what it was."""

    def gather(self, shape: tuple[int, ...]) -> np.ndarray:
        """Rows of the features [n * sense.tokens], tiling.NEWLINE for the newline; int64 [placeholders]."""

    def count(self, shape: tuple[int, ...]) -> int:
        """n, of a shape."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input."""


@dataclass(frozen=True)
class ImageInput:
    """A sense of vision and the settings of its image processor."""

    sense: Sense
    settings: ImageSettings

    def __post_init__(self) -> None:
        side = self.side
        if self.sense.modality != VISION:
            raise UserError(f"image settings for a sense of {self.sense.modality}")
        if self.settings.output != (side, side):
            found = "x".join(map(str, self.settings.output or ()))
            raise UserError(f"the image processor gives {found} pixels, the encoder takes {side}x{side}")
        if self.sense.tiling and self.sense.encoder.class_token:
            raise UserError("tiling puts the features of tiles together to a picture, where a class token has no place")
        for height, width in self.sense.tiling.grids if self.sense.tiling else ():
            if height % side or width % side or not height or not width:
                raise UserError(f"tiling: a grid of {height}x{width} pixels is no multiple of the encoder's {side}x{side}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return {"sense": self.sense.to_dict(), "settings": dataclasses.asdict(self.settings)}

    @property
    def side(self) -> int:
        return self.sense.encoder.config["image_size"]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (3, self.side, self.side)

    def inspect(self, data: bytes) -> tuple[tuple[int, ...], int]:
        image = decode(data)
        shape = (image.height, image.width)
        return shape, len(self.gather(shape))

    def inputs(self, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        image = decode(data)
        if (image.height, image.width) != tuple(shape):
            raise UserError(f"an image of {image.width}x{image.height} pixels, which was {shape[1]}x{shape[0]} when prepared")
        return self.of_image(image)

    def of_image(self, image: Any) -> np.ndarray:
        """The encoder's inputs of an RGB image, float32 [n, 3, side, side]."""
        if self.sense.tiling is None:
            return self.settings.pixels(image)[None]
        parts = tiling.tiles(image, self.sense.tiling.grids, self.side, self.settings.resample)
        return np.stack([self.settings.normalised(np.asarray(part)) for part in parts])

    def gather(self, shape: tuple[int, ...]) -> np.ndarray:
        if self.sense.tiling is None:
            return np.arange(self.sense.tokens)
        positions = self.sense.encoder.grid[0] // self.sense.projector.downsample
        return tiling.gather((shape[0], shape[1]), self.sense.tiling.grids, self.side, positions)

    def count(self, shape: tuple[int, ...]) -> int:
        if self.sense.tiling is None:
            return 1
        return tiling.count((shape[0], shape[1]), self.sense.tiling.grids, self.side)


@dataclass(frozen=True)
class AudioInput:
    """A sense of hearing and the settings of its feature extractor. Every window has all of its embeddings, silence included."""

    sense: Sense
    settings: AudioSettings

    def __post_init__(self) -> None:
        bins = self.sense.encoder.config["num_mel_bins"] if self.sense.modality == AUDIO else None
        if self.settings.mel_bins != bins:
            raise UserError(f"the feature extractor gives {self.settings.mel_bins} mel bins, the encoder takes {bins}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return {"sense": self.sense.to_dict(), "settings": dataclasses.asdict(self.settings)}

    @property
    def frames(self) -> int:
        """Of the spectrogram, in one window: the encoder halves them."""
        return 2 * self.sense.encoder.grid[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.settings.mel_bins, self.frames)

    def inspect(self, data: bytes) -> tuple[tuple[int, ...], int]:
        shape = audio.decode(data).shape
        return shape, len(self.gather(shape))

    def inputs(self, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        samples = audio.decode(data)
        if samples.shape != tuple(shape):
            raise UserError(f"a sound of {len(samples)} samples, which had {shape[0]} when prepared")
        return self.settings.windows(samples, self.frames)

    def gather(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.arange(self.count(shape) * self.sense.tokens)

    def count(self, shape: tuple[int, ...]) -> int:
        return -(-shape[0] // (self.frames * self.settings.hop))


KINDS = {VISION: (ImageInput, ImageSettings), AUDIO: (AudioInput, AudioSettings)}


def read(sense: Sense, folder: str | Path) -> Input:
    """A sense with the settings of a Hugging Face folder's processor. Raises UserError where they do not suit the encoder."""
    kind, settings = KINDS[sense.modality]
    return kind(sense, settings.from_folder(folder))


def from_dict(data: dict[str, Any]) -> Input:
    """From `to_dict`'s form; `settings` None takes what published encoders of the kind take."""
    sense = Sense.from_dict(data["sense"])
    kind, settings = KINDS[sense.modality]
    values = data.get("settings")
    return kind(sense, settings(**values) if values else settings.of_encoder(sense.encoder.config))
