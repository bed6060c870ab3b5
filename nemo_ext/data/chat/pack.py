"""Packing: conversations of different lengths into sequences of one length.

First-fit decreasing (Johnson 1973): the longest first, each into the first sequence that has room for it; at most 11/9 of the
optimum and a little more. O(n log n) by a tree over the sequences that knows the largest room below each node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Which items share a sequence. `items` of sequence i are items[starts[i]:starts[i + 1]]."""

    items: np.ndarray  # int64 [items]
    starts: np.ndarray  # int64 [sequences + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.items[self.starts[number] : self.starts[number + 1]]

    def shuffled_ties(self, lengths: np.ndarray, seed: list[int]) -> Packing:
        """The same shape with items of equal length exchanged at random: other neighbours, the same number of sequences."""
        shuffle = np.random.default_rng(seed).permutation(len(lengths))
        ordered = shuffle[np.argsort(-lengths[shuffle], kind="stable")]  # longest first, ties at random
        plain = np.argsort(-lengths, kind="stable")
        exchange = np.empty(len(lengths), np.int64)
        exchange[plain] = ordered
        return Packing(exchange[self.items], self.starts)


def pack(lengths: np.ndarray, capacity: int) -> Packing:
    """First-fit decreasing of items of `lengths` (int64 [items], 1 … capacity) into sequences of `capacity`; ties by position."""
    if len(lengths) == 0:
        return Packing(np.empty(0, np.int64), np.zeros(1, np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} in sequences of {capacity}")
    order = np.argsort(-lengths, kind="stable")
    bins = np.array(_first_fit(lengths[order].tolist(), capacity), np.int64)
    by_bin = np.argsort(bins, kind="stable")
    return Packing(order[by_bin], np.concatenate([[0], np.cumsum(np.bincount(bins))]))


def one_each(count: int) -> Packing:
    """Every item in a sequence of its own."""
    return Packing(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def _first_fit(lengths: list[int], capacity: int) -> list[int]:
    """The bin of each item, in the order given."""
    most = 2 * sum(lengths) // capacity + 1  # of two bins together, the second was opened as the first had no room
    leaves = 1 << max(most, 1).bit_length()
    room = [capacity] * (2 * leaves)  # a heap: the largest room below node i, whose children are 2i and 2i + 1
    bins = []
    for length in lengths:
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        bins.append(node - leaves)
        left = room[node] - length
        while True:
            room[node] = left
            if node == 1:
                break
            other = room[node ^ 1]
            if other > left:
                left = other
            node >>= 1
            if room[node] == left:
                break
    return bins
