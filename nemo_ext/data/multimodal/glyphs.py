"""The built-in source `glyphs`, or `glyphs:CLASSES` for the first of them: small pictures of characters, drawn with matplotlib's
fonts, and their Unicode names.

Held-out pictures have other fonts, sizes and colours than those to train on: a font is on one side only, so is every size and
every hue. Classes are balanced on both sides, so that the best guess without looking is right once in `len(classes)`.

    cache/<key>/train.tar, heldout.tar, glyphs.json    shards as `nemo_ext.data.multimodal.shards` reads them, and what is in them
"""

from __future__ import annotations

import colorsys
import functools
import io
import json
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_ext.data.cache import built, writing
from nemo_ext.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

FORMAT = 3  # raise it when the pictures change
# No two that differ in size alone; first those whose names differ in their first word, which are learnt first.
CHARACTERS = "&?@$#%+=*8ABCDEFGHIJKLMNOPQRSTUVWXYZ2345679ΓΔΘΛΞΠΣΦΨΩ"
QUESTION = "<image>Name this character."
SIDES = ("train", "heldout")


@dataclass(frozen=True)
class Style:
    """What the pictures of one side are made of: fonts (matplotlib's files), sizes of glyphs as shares of the picture, hues."""

    fonts: tuple[str, ...]
    sizes: tuple[float, ...]
    hues: tuple[float, ...]


STYLES = {
    "train": Style(
        (
            "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
            "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic",
        ),
        (0.56, 0.64, 0.72, 0.80),
        tuple(k / 8 for k in range(8)),
    ),
    "heldout": Style(
        ("DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "STIXGeneralBol", "cmr10", "cmss10"),
        (0.60, 0.68, 0.76),
        tuple((k + 0.5) / 8 for k in range(8)),
    ),
}  # fmt: skip


def make(
    cache: Path, *, classes: int = len(CHARACTERS), side: int = 32, train: int = 140, heldout: int = 40, seed: int = 1
) -> dict[str, Any]:
    """Draw the pictures, or find them in the cache: "train" and "heldout", their shards' paths; "classes", the names in order;
    "chance"; "fonts" by side. `classes` is how many characters, `side` the pictures' in pixels; `train` and `heldout` count the
    pictures of each class.
    """
    if not 2 <= classes <= len(CHARACTERS):
        raise UserError(f"glyphs: from 2 to {len(CHARACTERS)} classes, not {classes}")
    characters, counts = CHARACTERS[:classes], {"train": train * classes, "heldout": heldout * classes}

    def build(folder: Path) -> dict[str, Any]:
        for number, name in enumerate(SIDES):
            _write(folder / f"{name}.tar", _pictures(characters, STYLES[name], counts[name], side, [seed, number]))
        return {
            "classes": [unicodedata.name(character) for character in characters],
            "chance": 1 / classes,
            "fonts": {name: style.fonts for name, style in STYLES.items()},
            "question": QUESTION,
        }

    settings = ["glyphs", FORMAT, characters, side, counts, seed, [str(style) for style in STYLES.values()], _versions()]
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        meta = built(cache, settings, "glyphs.json", build)
    return {**meta, **{name: cache / meta["key"] / f"{name}.tar" for name in SIDES}}


def draw(character: str, font: str, side: int, size: float, hue: float, place: tuple[float, float]) -> Image:
    """A character in a dark colour on a light one of the opposite hue. Its larger side is `size` of the picture; `place` from 0
    to 1 says where in the room that is left."""
    from PIL import Image, ImageDraw

    mask = _mask(character, font)
    scale = size * side / max(mask.size)
    mask = mask.resize((max(1, round(mask.width * scale)), max(1, round(mask.height * scale))), Image.Resampling.LANCZOS)
    image = Image.new("RGB", (side, side), _colour(hue + 0.5, 0.25, 1.0))
    x, y = (round(share * (side - length)) for share, length in zip(place, mask.size, strict=True))
    ImageDraw.Draw(image).bitmap((x, y), mask, fill=_colour(hue, 0.9, 0.45))
    return image


def has_glyph(character: str, font: str) -> bool:
    """Whether a font has the character, by its own table."""
    return ord(character) in _table(font)


@functools.lru_cache(maxsize=64)
def _table(font: str) -> dict[int, int]:
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(_path(font))).get_charmap()


def _pictures(characters: str, style: Style, count: int, side: int, seed: list[int]) -> Iterator[tuple[str, Image]]:
    """`count` pictures with the classes in turn, each in random style."""
    random = np.random.default_rng(seed)
    fonts = {each: [font for font in style.fonts if has_glyph(each, font)] for each in characters}
    for number in range(count):
        character = characters[number % len(characters)]
        font = fonts[character][random.integers(len(fonts[character]))]
        size, hue = style.sizes[random.integers(len(style.sizes))], style.hues[random.integers(len(style.hues))]
        yield character, draw(character, font, side, size, hue, tuple(0.4 + 0.2 * random.random(2)))


def _write(path: Path, pictures: Iterator[tuple[str, Image]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (character, image) in enumerate(pictures):
            file = io.BytesIO()
            image.save(file, "PNG")
            turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": unicodedata.name(character)}]
            _add(tar, f"{number:06d}.png", file.getvalue())
            _add(tar, f"{number:06d}.json", json.dumps({"messages": turns}).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@functools.lru_cache(maxsize=1024)
def _mask(character: str, font: str) -> Image:
    """The glyph in white on black, as large as its ink."""
    from PIL import Image, ImageDraw

    face = _face(font)
    left, top, right, bottom = face.getbbox(character)
    mask = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(mask).text((4 - left, 4 - top), character, fill=255, font=face)
    return mask.crop(mask.getbbox())


@functools.lru_cache(maxsize=64)
def _face(font: str) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(str(_path(font)), 96)


def _colour(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(round(255 * each) for each in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _path(font: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


def _versions() -> list[str]:
    import matplotlib
    import PIL

    return [matplotlib.__version__, PIL.__version__]
