"""Megatron's indexed dataset, written without lists of Python integers.

`.bin`: the tokens of all documents one after another. `.idx`, little endian: magic, version 1 (int64), code of the dtype
(uint8), number of sequences and of document boundaries (int64 each), lengths in tokens (int32), byte offsets (int64), document
boundaries (int64: 0 … number of sequences, as each document is one sequence here).
Format: megatron/core/datasets/indexed_dataset.py of Megatron-Core 0.15.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron chooses for a vocabulary: uint16 below 65,500 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(file: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the .idx of documents of `lengths` tokens [documents] that stand in the .bin in this order."""
    lengths = lengths.astype(np.int32)
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= dtype.itemsize
    file.write(MAGIC + struct.pack("<QBQQ", 1, DTYPE_CODES[dtype], len(lengths), len(lengths) + 1))
    file.write(lengths.tobytes())
    file.write(offsets.tobytes())
    file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
