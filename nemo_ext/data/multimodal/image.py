"""Images as a vision encoder sees them: decoded within limits, then resized, cropped and normalised.

`decode` gives the RGB picture a person would see: turned as its EXIF data says, transparency over white, sixteen bits as their
upper eight. `ImageSettings.pixels` then equals the slow image processors of transformers bit by bit.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_ext.data.multimodal import processor
from nemo_ext.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 1 << 26  # 67 million: 200 MB decoded
MOST_BYTES = 1 << 28
LONGEST_ASPECT = 200  # resizing the shorter side to the encoder's makes the longer one this much larger
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # none that runs another program
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3


def decode(data: bytes) -> Image:
    """The first frame of an image file as RGB. Raises UserError, in one line, for what is no image or exceeds the limits."""
    from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

    if len(data) > MOST_BYTES:
        raise UserError(f"an image file of {len(data):,} bytes: at most {MOST_BYTES:,} are read")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # one setting of the process: half an image is no image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our limits are stricter than those that Pillow warns of
            with Image.open(io.BytesIO(data), formats=KINDS) as image:
                _check_size(*image.size)
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("not an image of a known kind: " + ", ".join(KINDS)) from None
    except Image.DecompressionBombError:
        raise UserError(f"an image of more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"a broken image: {reason[0]}") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(f"an image of {width}x{height} pixels: at most {MOST_PIXELS:,} are decoded")
    if not width or not height or max(width, height) > LONGEST_ASPECT * min(width, height):
        raise UserError(f"an image of {width}x{height} pixels: one side is more than {LONGEST_ASPECT} times the other")


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(f"pixels of 32 bits (mode {image.mode}) have no known range: save the image with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageSettings:
    """From an RGB image to pixel values, as an image processor of Hugging Face's is configured.

    `shortest` is the length that the shorter side is resized to, or `size` (height, width) the sides; `crop` (height, width) is
    cut out of the middle afterwards. `square` first fills up to a square in the colour of the mean. `resample` is Pillow's
    number; pixels are multiplied by `scale`, then `mean` is taken off and the rest divided by `std`, both by channel.
    """

    size: tuple[int, int] | None = None
    shortest: int | None = None
    crop: tuple[int, int] | None = None
    square: bool = False
    resample: int = BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("size", "crop", "mean", "std"):  # lists, where it was read from JSON
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.output is None:
            raise UserError("the image processor gives images of several sizes: an encoder takes one: set its size or crop_size")

    @property
    def output(self) -> tuple[int, int] | None:
        """Height and width of every result."""
        return self.crop or self.size

    @classmethod
    def of_encoder(cls, config: dict[str, Any]) -> ImageSettings:
        """What the published encoders of this kind take: CLIP's crop and colours, or SigLIP's plain square."""
        side = config["image_size"]
        if config["model_type"] == "clip_vision_model":
            return cls(shortest=side, crop=(side, side), mean=CLIP_MEAN, std=CLIP_STD)
        return cls(size=(side, side), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageSettings:
        """Read preprocessor_config.json, or processor_config.json. Raises UserError where it is of another kind."""
        return cls.from_config(*processor.read(folder, "image_processor"))

    @classmethod
    def from_config(cls, values: dict[str, Any], place: str = "image processor") -> ImageSettings:
        """From the values of preprocessor_config.json; what is not in it is the default of its processor's class."""
        kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "").removesuffix("Fast")
        kind = kind.replace("FeatureExtractor", "ImageProcessor")
        if kind not in _DEFAULTS:
            raise UserError(f"{place}: image_processor_type {kind or 'missing'} is not known: {', '.join(_DEFAULTS)}")
        values = {**_DEFAULTS[kind], **{name: value for name, value in values.items() if value is not None}}
        size, crop = values["size"], values["crop_size"]
        size = {"shortest_edge": size} if isinstance(size, int) else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        normal = values["do_normalize"]
        return cls(
            size=(size["height"], size["width"]) if values["do_resize"] and "height" in size else None,
            shortest=size["shortest_edge"] if values["do_resize"] and "shortest_edge" in size else None,
            crop=(crop["height"], crop["width"]) if values["do_center_crop"] else None,
            square=kind == "LlavaImageProcessor" and values["do_pad"],
            resample=values["resample"],
            scale=values["rescale_factor"] if values["do_rescale"] else 1.0,
            mean=_channels(values["image_mean"]) if normal else (0.0, 0.0, 0.0),
            std=_channels(values["image_std"]) if normal else (1.0, 1.0, 1.0),
        )

    def pixels(self, image: Image) -> np.ndarray:
        """Pixel values float32 [3, height, width] of an RGB image."""
        return self.normalised(self._fitted(image))

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [3, h, w] from uint8 [h, w, 3] of the final size."""
        return np.stack([self._table[channel][pixels[..., channel]] for channel in range(3)])

    def _fitted(self, image: Image) -> np.ndarray:
        if self.square and image.width != image.height:
            image = _squared(image, tuple(int(each * 255) for each in self.mean))
        if self.shortest or self.size:
            image = image.resize(self._resized(image.size), resample=self.resample)
        pixels = np.asarray(image)
        return _centre(pixels, *self.crop) if self.crop else pixels

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) to resize (width, height) to."""
        if self.size:
            return self.size[1], self.size[0]
        assert self.shortest is not None
        longer = int(self.shortest * max(size) / min(size))
        return (self.shortest, longer) if size[0] <= size[1] else (longer, self.shortest)

    @cached_property
    def _table(self) -> np.ndarray:
        """The result for each of 256 values of a channel, float32 [3, 256]: the same roundings as over whole images."""
        scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = np.array(self.mean, np.float32)[:, None], np.array(self.std, np.float32)[:, None]
        return (scaled - mean) / std

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}


def _channels(value: float | list[float]) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3


def _squared(image: Image, colour: tuple[int, ...]) -> Image:
    from PIL import Image

    side = max(image.size)
    result = Image.new("RGB", (side, side), colour)
    result.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return result


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of uint8 [h, w, 3], with zeros around where it is smaller."""
    for axis, length in ((0, height), (1, width)):
        there = pixels.shape[axis]
        if there < length:
            before = math.ceil((length - there) / 2)
            pixels = np.pad(pixels, [(before, length - there - before) if each == axis else (0, 0) for each in range(3)])
        else:
            start = (there - length) // 2
            pixels = pixels.take(range(start, start + length), axis)
    return pixels


_CLIP = {
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": BICUBIC, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD), "do_pad": False,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "LlavaNextImageProcessor": _CLIP,
    "SiglipImageProcessor": {
        **_CLIP, "size": {"height": 224, "width": 224}, "do_center_crop": False, "image_mean": 0.5, "image_std": 0.5
    },
}  # fmt: skip
