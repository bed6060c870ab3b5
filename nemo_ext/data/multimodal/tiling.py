"""AnyRes: which grid of tiles an image fills, and the order of their features (LLaVA-NeXT, Liu et al. 2024).

An image gives one input of the whole, resized, then the tiles of the best fitting grid, row by row. The decoder sees the whole's
features, then those of the tiles put together to one picture, line by line, without the lines and columns that lie in the
padding; behind every line stands a newline. Sizes are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

NEWLINE = -1  # in a gather index: the newline's embedding


def best_grid(size: tuple[int, int], grids: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The grid in which the image keeps most of its pixels, of several the one with least left empty, then the first."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        used = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return used, used - grid[0] * grid[1]

    return max(grids, key=merit)


def count(size: tuple[int, int], grids: Iterable[tuple[int, int]], side: int) -> int:
    """Inputs of an encoder of `side` pixels that an image gives."""
    height, width = best_grid(size, grids)
    return 1 + (height // side) * (width // side)


def tiles(image: Image, grids: Iterable[tuple[int, int]], side: int, resample: int) -> list[Image]:
    """The whole image resized to a square of `side`, then the tiles."""
    from PIL import Image

    height, width = best_grid((image.height, image.width), grids)
    by_width, by_height = width / image.width, height / image.height
    if by_width < by_height:
        resized = (width, min(math.ceil(image.height * by_width), height))
    else:
        resized = (min(math.ceil(image.width * by_height), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(resized, resample=resample), ((width - resized[0]) // 2, (height - resized[1]) // 2))
    corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    whole = image.resize((side, side), resample=resample)
    return [whole, *(canvas.crop((x, y, x + side, y + side)) for x, y in corners)]


def gather(size: tuple[int, int], grids: Iterable[tuple[int, int]], side: int, positions: int) -> np.ndarray:
    """For each of the image's embeddings its row among the features of its inputs, or NEWLINE; int64 [embeddings].

    `positions` are lines, and columns, of features that one input gives.
    """
    height, width = best_grid(size, grids)
    rows, columns = height // side, width // side
    tile = 1 + np.arange(rows * columns).reshape(rows, 1, columns, 1)  # the whole comes first
    inside = np.arange(positions * positions).reshape(1, positions, 1, positions)
    lines = (tile * positions**2 + inside).reshape(rows * positions, columns * positions)
    lines = _without_padding(lines, size)
    lines = np.concatenate([lines, np.full((len(lines), 1), NEWLINE)], axis=1)
    return np.concatenate([np.arange(positions * positions), lines.ravel()]).astype(np.int64)


def _without_padding(lines: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Only what lies in an image of `size` that was fitted into the middle."""
    height, width = lines.shape
    if size[1] / size[0] > width / height:
        padding = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return lines[padding : height - padding]
    padding = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return lines[:, padding : width - padding]
