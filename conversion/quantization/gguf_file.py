"""A GGUF file for llama.cpp, quantized as `conversion.gguf` writes it, measured by what it holds, and read back by ggml's rules.

Blocks of 32 weights of a row (github.com/ggml-org/ggml, ggml-common.h). Q8_0: a scale in fp16, then 32 signed bytes. Q4_0: a
scale in fp16, then 16 bytes, whose low halves are weights 0 to 15 and whose high halves 16 to 31, each 8 more than the code.
Q4_K: `conversion.gguf.q4_k`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from conversion import gguf
from conversion.gguf import file as gguf_reader
from conversion.gguf import writer as gguf_writer
from nemo_ext.errors import RunError

BLOCK, SUPER_BLOCK = 32, 256
NAME = "model.gguf"


def write(source: Path, folder: Path, kind: str, progress: Callable[[int, int, str], None] | None = None) -> Path:
    """Write the Hugging Face model in `source` as `folder`/model.gguf; raises what `conversion.gguf.writer.from_hf` does."""
    return gguf_writer.from_hf(source, folder / NAME, kind, progress, name=source.name).file


@torch.no_grad()
def load_into(model: nn.Module, file: Path) -> tuple[nn.Module, list[str]]:
    """`model` with the file's dequantized weights, and the names of the modules whose weights are stored in blocks."""
    names, parameters = [], dict(model.named_parameters())
    for name, tensor in gguf.hf_tensors(file).items():
        if name in parameters:
            parameters[name].copy_(tensor.read())
            if tensor.stored.kind in DEQUANTIZED:
                names.append(name.removesuffix(".weight"))
    return model, names


def check(file: Path) -> str:
    """Dequantize every block by ggml's rules and compare with what was measured; what was found, in words. Raises RunError."""
    count = 0
    for tensor in gguf_reader.read(file).tensors.values():
        if tensor.kind not in DEQUANTIZED:
            continue
        with open(file, "rb") as stream:
            stream.seek(tensor.offset)
            values = DEQUANTIZED[tensor.kind](np.frombuffer(stream.read(tensor.nbytes), np.uint8))
        if not np.array_equal(values, np.concatenate([chunk.reshape(-1) for chunk in tensor.chunks()])):
            raise RunError(f"{file}: {tensor.name} read by ggml's rules is not what was measured")
        count += 1
    return f"the blocks of {count} tensors, read back by ggml's rules, are the measured weights"


def q8_0(data: np.ndarray) -> np.ndarray:
    """fp32 `[n]` of the bytes of Q8_0's blocks."""
    blocks = data.reshape(-1, 2 + BLOCK)
    return (blocks[:, 2:].view(np.int8) * _fp16(blocks[:, :2])).reshape(-1)


def q4_0(data: np.ndarray) -> np.ndarray:
    """fp32 `[n]` of the bytes of Q4_0's blocks."""
    blocks = data.reshape(-1, 2 + BLOCK // 2)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float32) - 8
    return (codes * _fp16(blocks[:, :2])).reshape(-1)


def q4_k(data: np.ndarray) -> np.ndarray:
    """fp32 `[n]` of the bytes of Q4_K's super-blocks."""
    blocks = data.reshape(-1, 16 + SUPER_BLOCK // 2)
    whole, lowest, six, codes = _fp16(blocks[:, :2]), _fp16(blocks[:, 2:4]), blocks[:, 4:16], blocks[:, 16:]
    found = np.empty((len(blocks), SUPER_BLOCK), np.float32)
    for j in range(SUPER_BLOCK // BLOCK):
        if j < 4:
            scale, offset = six[:, j] & 63, six[:, j + 4] & 63
        else:
            scale, offset = (six[:, j + 4] >> 4 * i & 15 | six[:, j - 4 + 4 * i] >> 6 << 4 for i in range(2))
        of_pair = codes[:, j // 2 * BLOCK : (j // 2 + 1) * BLOCK] >> 4 * (j % 2) & 15
        found[:, j * BLOCK : (j + 1) * BLOCK] = whole * scale[:, None] * of_pair - lowest * offset[:, None]
    return found.reshape(-1)


def _fp16(data: np.ndarray) -> np.ndarray:
    return data.copy().view(np.float16).astype(np.float32)


DEQUANTIZED = {gguf_writer.Q8_0: q8_0, gguf_writer.Q4_0: q4_0, gguf_writer.Q4_K: q4_k}
