"""The number formats of a quantized linear layer, and the methods that find its numbers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_ext.errors import UserError

GROUPS = (128, 64, 32)  # sizes of a group of INT4 weights that the runtimes have kernels for, best first
NVFP4_BLOCK = 16
FP8_MAX, INT8_MAX, INT4_MAX, E2M1_MAX = 448.0, 127.0, 7.0, 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what the codes 0 to 7 stand for; 8 to 15 are these negated


@dataclass(frozen=True)
class Format:
    """How a linear layer's weight `[out, in]` and its input are stored and computed.

    `weight`: fp8 (E4M3, a scale a tensor), int8 (a scale a row), int4 (a scale a group of a row), nvfp4 (E2M1, an E4M3 scale a
    block of 16 and one fp32 scale). `activation`: fp8 or int8 with a calibrated scale a tensor, nvfp4 with scales of blocks found
    while it runs, or none. `group`: weights that share a scale, 0 where the row or tensor does.
    """

    name: str
    weight: str
    activation: str | None
    group: int = 0

    @property
    def bits(self) -> float:
        """Bits that a weight takes with its group's scale (16 bits, of NVFP4 8); scales of rows and tensors do not count."""
        plain = {"fp8": 8, "int8": 8, "int4": 4, "nvfp4": 4}[self.weight]
        return plain + ((8 if self.weight == "nvfp4" else 16) / self.group if self.group else 0)

    def modelopt(self) -> tuple[Any, dict[str, Any]]:
        """ModelOpt's attributes of the weight's and the input's quantizer."""
        fp8, off = {"num_bits": (4, 3), "axis": None, "enable": True}, {"enable": False}
        blocks = {"num_bits": 4, "block_sizes": {-1: self.group, "type": "static"}, "enable": True}
        nvfp4 = {"num_bits": (2, 1), "block_sizes": {-1: NVFP4_BLOCK, "type": "dynamic", "scale_bits": (4, 3)}, "axis": None,
                 "enable": True}  # fmt: skip
        weight = {"fp8": fp8, "int8": {"num_bits": 8, "axis": 0, "enable": True}, "int4": blocks, "nvfp4": nvfp4}[self.weight]
        if self.name == "w4a8":
            weight = [blocks, fp8]
        inputs = {None: off, "fp8": fp8, "int8": {"num_bits": 8, "axis": None, "enable": True}, "nvfp4": nvfp4}
        return weight, inputs[self.activation]


@dataclass(frozen=True)
class Method:
    """A format and how its numbers are found. `smoothing`: ModelOpt's algorithm that moves scales between input and weight."""

    format: str
    smoothing: str | None = None
    gptq: bool = False


METHODS = {
    "fp8": Method("fp8"),
    "int8_sq": Method("int8", "smoothquant"),
    "int4_awq": Method("int4", "awq_lite"),
    "w4a8_awq": Method("w4a8", "awq_lite"),
    "int4_gptq": Method("int4", gptq=True),
    "nvfp4": Method("nvfp4"),
}


# llama.cpp's own: every matrix, the embedding too, in blocks of 32 with a scale in fp16, or of Q4_K with a scale and an offset of
# six bits and two numbers in fp16 for eight blocks, which are as many bits
GGUF = {
    "q8_0": Format("q8_0", "int8", None, 32),
    "q4_0": Format("q4_0", "int4", None, 32),
    "q4_k": Format("q4_k", "int4", None, 32),
}


def format_of(name: str, group: int) -> Format:
    """The format by its name; `group` is that of INT4 weights."""
    return {
        "fp8": Format("fp8", "fp8", "fp8"),
        "int8": Format("int8", "int8", "int8"),
        "int4": Format("int4", "int4", None, group),
        "w4a8": Format("w4a8", "int4", "fp8", group),
        "nvfp4": Format("nvfp4", "nvfp4", "nvfp4", NVFP4_BLOCK),
    }[name]


def refuse_int8_cache(kv_cache: str | None) -> None:
    """Raises UserError for keys and values in INT8, which TensorRT-LLM alone takes."""
    if kv_cache == "int8":
        raise UserError("kv_cache=int8 is for format=tensorrt_llm: the other runtimes take fp8")
