"""Which documents or conversations are held out of training: decided by a hash of each, never by its place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_ext.errors import UserError

SMALLEST = 64  # hashes kept a source, from which small corpora choose the document to hold out


@dataclass(frozen=True)
class Split:
    """Which documents are held out: those whose hash is below `below`, except the hashes `kept` in training."""

    seed: int
    below: int
    kept: tuple[int, ...] = ()

    @property
    def settings(self) -> list[Any]:
        """What of it decides the content of a cached corpus."""
        return [self.seed if self.below else 0, self.below, self.kept]

    def holds_out(self, hashes: np.ndarray) -> np.ndarray:
        """Boolean [documents] from uint64 [documents]."""
        held = hashes < np.uint64(min(self.below, 2**64 - 1)) if self.below else np.zeros(len(hashes), bool)
        return held & ~np.isin(hashes, np.array(self.kept, np.uint64)) if self.kept else held

    def hash(self, text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=b"%d" % self.seed).digest(), "little")


def adjust(split: Split, metas: Sequence[dict]) -> Split:
    """The split that holds out at least one document and leaves one in every source, if `split` does not."""
    if split.below == 0:
        return split
    last = sorted({meta["largest"] for meta in metas})  # stay in training, so that every source has something to train on
    candidates = [h for h in sorted({h for meta in metas for h in meta["smallest"]}) if h not in last]
    if not candidates:
        raise UserError(
            "data=: nothing can be held out, as documents are never split between training and held-out data and each source "
            "has one document (or copies of one): give more documents (JSONL has one a line), or heldout=0"
        )
    below = max(split.below, candidates[0] + 1)
    return Split(split.seed, below, tuple(h for h in last if h < below))
