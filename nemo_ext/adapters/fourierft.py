"""FourierFT (Gao et al. 2024, arXiv:2405.03003) as a NeMo transform: W x + dW x, with dW known by a few of its frequencies.

dW[p, q] = scaling / (out in) sum_k c_k cos(2 pi (u_k p / out + v_k q / in)), the real part of the inverse Fourier transform of a
matrix that has the learnt coefficients c `[n]` at n drawn places (u, v) and is zero elsewhere. Places and scale are PEFT's, and
so are the two starts: c = 0 (PEFT's `init_weights=True`), where the model begins as it was, or c from N(0, 1), the paper's. There
is one spectrum for each linear of the Hugging Face model.

`SpectralLinear` never keeps dW for the backward pass, and computes dW x in the cheaper of two ways: from dW, or, where few
frequencies meet a large matrix, by cos(a + b) = cos a cos b - sin a sin b as two thin products [in, 2n] and [2n, out]. Tensor
parallel ranks compute their rows (or columns) of dW; the coefficients are replicated and Megatron adds up their gradients.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.collections.llm.peft.utils import get_adapter_attributes_from_linear
from torch import Tensor, nn

from nemo_ext.adapters.initial import generator
from nemo_ext.adapters.lora import CanonicalLoRA
from nemo_ext.adapters.spectrum import places


@dataclass
class FourierFT(CanonicalLoRA):
    """One spectrum of `n_frequency` coefficients for each linear that Hugging Face has."""

    n_frequency: int = 1000
    scaling: float = 300.0
    frequency_seed: int = 777
    start: str = "zeros"

    def adapter(self, m: nn.Module, width: int, part: str, full_name: str) -> nn.Module:
        """The adapter of `width` of m's output features."""
        return SpectralAdapter(m, width, full_name.rsplit(".", 1)[-1] if part == full_name else "", self.n_frequency,
                               self.scaling, self.frequency_seed, self.start == "normal")  # fmt: skip


class SpectralAdapter(nn.Module):
    """dW x beside a linear, this rank's part of it: [s, b, in] -> [s, b, out], both as the linear has them."""

    def __init__(self, linear: nn.Module, width: int, fused: str, count: int, scaling: float, seed: int,
                 normal: bool):  # fmt: skip
        """`width` are all output features of the adapted part of Megatron's `linear`; `fused` is its name where that is all."""
        super().__init__()
        config = linear.config
        self.input_is_parallel, inputs, _, gathered, _ = get_adapter_attributes_from_linear(linear)
        self.sequence_parallel = config.sequence_parallel
        self.gathered = config.sequence_parallel and gathered  # the linear hands on all tokens, and adds up their gradients
        self.device = next(linear.parameters()).device
        self.count, self.outputs, self.inputs, self.normal = count, width, inputs, normal
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rows, columns = Slice(0, width), Slice(0, inputs)
        if self.input_is_parallel:
            columns = columns.share()
        elif fused == "linear_qkv":
            rows = _fused_heads(config, width)
        elif fused == "linear_fc1" and config.gated_linear_unit:
            rows = Slices((Slice(0, width // 2).share(), Slice(width // 2, width).share()))
        else:
            rows = rows.share()
        self.frequencies = Frequencies(width, inputs, count, seed, rows, columns, scaling / (width * inputs), ranks)
        self.coefficients = nn.Parameter(torch.zeros(count, dtype=config.params_dtype, device=self.device))
        # each rank has the gradient of its part of dW: Megatron takes their mean, so that a part counts times their number
        self.coefficients.average_gradients_across_tp_domain = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel and not self.gathered:
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x)
        y = SpectralLinear.apply(x, self.coefficients, self.frequencies)
        if not self.input_is_parallel:
            return y
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y)
        return mappings.reduce_from_tensor_model_parallel_region(y)

    @torch.no_grad()
    def draw(self, words: str) -> None:
        """The first coefficients: zeros, or determined by `words` alone."""
        if self.normal:
            self.coefficients.copy_(torch.randn(self.count, generator=generator(words)))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The coefficients, the same on every tensor parallel rank."""
        return make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets)


@dataclass(frozen=True)
class Slice:
    """Rows or columns [start, stop) of a matrix."""

    start: int
    stop: int

    def share(self) -> Slice:
        """This tensor parallel rank's part of it."""
        ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        width = (self.stop - self.start) // ranks
        return Slice(self.start + rank * width, self.start + (rank + 1) * width)

    def __len__(self) -> int:
        return self.stop - self.start

    def numbers(self) -> Tensor:
        return torch.arange(self.start, self.stop)


@dataclass(frozen=True)
class Slices:
    """Rows in pieces, as Megatron has those of a fused linear."""

    pieces: tuple[Slice, ...]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def numbers(self) -> Tensor:
        return torch.cat([piece.numbers() for piece in self.pieces])


def _fused_heads(config: Any, width: int) -> Slices:
    """Hugging Face's rows [queries, keys, values] in Megatron's order: by query groups, of which this rank has its share."""
    groups, heads = config.num_query_groups, config.num_attention_heads // config.num_query_groups
    head = width // (groups * (heads + 2))
    keys = groups * heads * head
    own = Slice(0, groups).share()
    pieces = []
    for group in range(own.start, own.stop):
        pieces.append(Slice(group * heads * head, (group + 1) * heads * head))
        pieces += [Slice(start + group * head, start + (group + 1) * head) for start in (keys, keys + groups * head)]
    return Slices(tuple(pieces))


@dataclass(frozen=True)
class Frequencies:
    """Which frequencies of a `[outputs, inputs]` matrix are learnt, and which of its rows and columns this rank computes."""

    outputs: int
    inputs: int
    count: int
    seed: int
    rows: Slice | Slices
    columns: Slice
    scale: float  # of the sum of cosines
    ranks: int = field(default=1, compare=False)

    @property
    def thin(self) -> bool:
        """Whether two thin products take fewer multiplications than dW: a forward and a backward pass compared."""
        rows, columns = len(self.rows), len(self.columns)
        return 2 * self.count * (2 * rows + 3 * columns) < 3 * rows * columns


class SpectralLinear(torch.autograd.Function):
    """dW x for x [..., in] and coefficients [n]: keeps x, and computes everything else again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, frequencies: Frequencies) -> Tensor:
        ctx.save_for_backward(x, coefficients)
        ctx.frequencies = frequencies
        if frequencies.thin:
            outward, inward = _waves(frequencies, x.dtype, x.device)
            return ((x @ inward.T) * _doubled(coefficients, frequencies).to(x.dtype)) @ outward
        return nn.functional.linear(x, delta(coefficients, frequencies).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x, coefficients), frequencies = ctx.saved_tensors, ctx.frequencies
        to_x, of_x = None, ctx.needs_input_grad[0]
        if frequencies.thin:
            outward, inward = _waves(frequencies, x.dtype, x.device)
            inner = gradient @ outward.T
            products = torch.einsum("...k,...k->k", inner.float(), (x @ inward.T).float())
            to_coefficients = (products[: frequencies.count] + products[frequencies.count :]) * frequencies.scale
            if of_x:
                to_x = (inner * _doubled(coefficients, frequencies).to(x.dtype)) @ inward
        else:
            if of_x:
                to_x = gradient @ delta(coefficients, frequencies).to(x.dtype)
            of_matrix = gradient.flatten(0, -2).T @ x.flatten(0, -2)
            to_coefficients = of_coefficients(of_matrix.float(), frequencies)
        return to_x, (to_coefficients * frequencies.ranks).to(coefficients.dtype), None


def delta(coefficients: Tensor, frequencies: Frequencies) -> Tensor:
    """dW's rows and columns of this rank, fp32.

    Along the axis that is whole the result is real, so that half of the frequencies do: c at (u, v) is c at (-u, -v).
    """
    f, by_columns = frequencies, _by_columns(frequencies)
    (far, near), weights, split, whole, own = _half_plane(f, coefficients.device)
    half = torch.zeros(split, whole // 2 + 1, dtype=torch.complex64, device=coefficients.device)
    values = (coefficients.float() * weights * (f.scale * split * whole)).to(half.dtype)
    half = torch.fft.ifft(half.index_put_((far, near), values, accumulate=True), dim=0)[own]
    part = torch.fft.irfft(half, n=whole, dim=1)
    return part.T if by_columns else part


def of_coefficients(matrix: Tensor, frequencies: Frequencies) -> Tensor:
    """The gradient of the coefficients from that of this rank's part of dW, fp32."""
    f = frequencies
    (far, near), _, split, whole, own = _half_plane(f, matrix.device)
    half = matrix.new_zeros(split, whole // 2 + 1, dtype=torch.complex64)
    half[own] = torch.fft.rfft(matrix.T if _by_columns(f) else matrix, dim=1)
    return torch.fft.fft(half, dim=0)[far, near].real * f.scale


def _by_columns(frequencies: Frequencies) -> bool:
    return len(frequencies.columns) < frequencies.inputs


@functools.lru_cache(maxsize=64)
def _half_plane(f: Frequencies, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor, int, int, Tensor]:
    """((frequencies of the axis that ranks share, of the whole one up to its half), weights, both lengths, this rank's numbers).

    What lies strictly between zero and half is counted twice by the inverse transform to real numbers.
    """
    u, v = places(f.outputs, f.inputs, f.count, f.seed)
    split, whole, own = f.outputs, f.inputs, f.rows
    if _by_columns(f):
        u, v, split, whole, own = v, u, f.inputs, f.outputs, f.columns
    mirrored = v > whole // 2
    far, near = torch.where(mirrored, -u % split, u), torch.where(mirrored, whole - v, v)
    weights = torch.where((near == 0) | (2 * near == whole), 1.0, 0.5)
    return (far.to(device), near.to(device)), weights.to(device), split, whole, own.numbers().to(device)


@functools.lru_cache(maxsize=64)
def _waves(f: Frequencies, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[cos; sin] of the rows `[2n, rows]` and [cos; -sin] of the columns `[2n, columns]`; layers of one shape share them."""
    u, v = (place.to(device) for place in places(f.outputs, f.inputs, f.count, f.seed))
    down = 2 * math.pi / f.outputs * (u[:, None] * f.rows.numbers().to(device) % f.outputs)
    across = 2 * math.pi / f.inputs * (v[:, None] * f.columns.numbers().to(device) % f.inputs)
    return torch.cat([down.cos(), down.sin()]).to(dtype), torch.cat([across.cos(), -across.sin()]).to(dtype)


def _doubled(coefficients: Tensor, frequencies: Frequencies) -> Tensor:
    return torch.cat([coefficients, coefficients]).float() * frequencies.scale
