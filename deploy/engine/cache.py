"""Keys and values of the sequences that run together, one row each, in place from the first token to the last.

A row is `capacity` tokens of every layer, allocated once. A step writes the new tokens of some rows where they belong and reads
these rows up to the longest: sequences of any length join and leave between two steps and none is copied or padded for another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class Place:
    """Where the running step writes and reads: rows [b], each with new tokens [s] at its positions [b, s]."""

    rows: torch.Tensor
    read: slice | torch.Tensor  # the same rows; a slice where they follow each other, which reads without a copy
    positions: torch.Tensor
    length: int  # tokens that are read of each row

    def set(self, rows: Sequence[int], index: torch.Tensor, positions: torch.Tensor, length: int) -> None:
        """`rows` of the cache, `index` with the same on the cache's device, and where their new tokens stand."""
        first, count = rows[0], len(rows)
        self.rows = index
        self.read = slice(first, first + count) if list(rows) == list(range(first, first + count)) else self.rows
        self.positions, self.length = positions, length


class RowLayer(CacheLayerMixin):
    """One layer: keys and values [rows, heads, capacity, head size], of the shape and kind that the first step brings."""

    is_sliding = False

    def __init__(self, place: Place, rows: int, capacity: int) -> None:
        super().__init__()
        self.place, self.rows, self.capacity = place, rows, capacity

    def lazy_initialization(self, key_states: torch.Tensor) -> None:
        """Nothing to do before `update`, which knows the values' shape too."""

    def update(self, key_states, value_states, cache_kwargs=None):
        """Write [b, heads, s, head size] at the step's place; return its rows [b, heads, length, head size]."""
        if self.keys is None:
            self.keys, self.values = self._zeros(key_states), self._zeros(value_states)
        at = self.place
        self.keys[at.rows[:, None], :, at.positions] = key_states.transpose(1, 2)
        self.values[at.rows[:, None], :, at.positions] = value_states.transpose(1, 2)
        return self.keys[at.read, :, : at.length], self.values[at.read, :, : at.length]

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """The first `length` tokens of rows `targets` become those of rows `sources`, as they were before."""
        for tensor in (self.keys, self.values):
            tensor[targets, :, :length] = tensor[sources, :, :length]

    def get_mask_sizes(self, cache_position: torch.Tensor) -> tuple[int, int]:
        return self.place.length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_cache_shape(self) -> int:
        return self.capacity

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        """Not `empty`: what is masked has weight 0, and 0 times a NaN of old memory is NaN. numpy's zeros take memory as used."""
        shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
        if like.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        return torch.from_numpy(np.zeros(math.prod(shape) * like.element_size(), dtype=np.uint8)).view(like.dtype).view(shape)


class RowCache(Cache):
    """All layers."""

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self.place = Place()
        super().__init__(layers=[RowLayer(self.place, rows, capacity) for _ in range(layers)])

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Rows `targets` become rows `sources`, up to `length` tokens: moves, swaps, forks and beams' new order."""
        device = self.layers[0].keys.device
        source, target = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for layer in self.layers:
            layer.copy(source, target, length)

    def clear(self, row: int) -> None:
        """Forget a row whose numbers went wrong: they would spoil the next sequence there, masked or not."""
        for layer in self.layers:
            layer.keys[row] = 0
            layer.values[row] = 0

    @property
    def bytes(self) -> int:
        """Size of all rows; 0 before the first step."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (layer.keys, layer.values) if t is not None)
