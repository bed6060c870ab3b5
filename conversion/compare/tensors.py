"""Checkpoints compared tensor by tensor under Hugging Face's names, whatever their format: streaming, no model is built."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from conversion import families, safetensors_io
from conversion.checkpoint import Checkpoint
from conversion.multimodal import rows
from conversion.multimodal.rows import with_senses
from conversion.nemo_to_hf import Piece, pieces_of
from nemo_ext.errors import UserError

Progress = Callable[[int, int, str], None]


class LazyTensor(Protocol):
    """A tensor that is read when it is wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that only one checkpoint has, or whose shape or values differ."""

    name: str
    what: str
    max_abs: float = float("inf")  # largest difference of an element; infinite where there is nothing to subtract


@dataclass
class TensorReport:
    """What comparing two checkpoints' tensors found."""

    total: int = 0  # tensors of both together, each name once
    bitwise: int = 0  # equal bit for bit
    rounded: int = 0  # equal after rounding to the narrower of their two dtypes
    dtypes: tuple[str, str] = ("", "")
    differences: list[TensorDifference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.differences

    @property
    def worst(self) -> TensorDifference:
        """The one that differs most; those that are missing come first."""
        return max(self.differences, key=lambda difference: difference.max_abs)

    @property
    def failure(self) -> str | None:
        """One line, None where nothing differs."""
        if self.passed:
            return None
        return f"{len(self.differences)} of {self.total} tensors differ, worst {self.worst.name}: {self.worst.what}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def hf_tensors(checkpoint: Checkpoint) -> Mapping[str, LazyTensor]:
    """A checkpoint's tensors under the names that Hugging Face's causal language model of its family has.

    What a Hugging Face folder has beyond its family's table stays under its own name, except buffers, a vision part's weights
    and the copy of a tied embedding. Raises UserError if the checkpoint cannot be read.
    """
    if checkpoint.kind == "nemo":
        return _nemo_tensors(checkpoint)
    if checkpoint.kind == "gguf":
        return _gguf_tensors(checkpoint)
    stored = safetensors_io.open_folder(checkpoint.path)
    try:
        family = families.family_of(checkpoint.config)
    except UserError:  # two folders of a family without a table still have names to compare
        return stored
    senses = checkpoint.senses
    family = with_senses(family, checkpoint.architecture, senses, stored)
    prefix = families.base_prefix(family, stored)
    canonical = {families.hf_name(name, prefix): name for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors = {}
    for name, info in stored.items():
        if any(part in name for part in family.ignored):
            continue
        named = canonical.get(name, f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name)
        named = rows.canonical(named) if senses else named
        tensors[named] = info
    if checkpoint.architecture.share_embeddings_and_output_weights and "lm_head.weight" in tensors:
        if torch.equal(tensors["lm_head.weight"].read(), tensors["model.embed_tokens.weight"].read()):
            del tensors["lm_head.weight"]
    return tensors


def compare(
    a: Mapping[str, LazyTensor],
    b: Mapping[str, LazyTensor],
    *,
    only: Callable[[str], bool] = lambda name: True,
    progress: Progress | None = None,
) -> TensorReport:
    """Compare the tensors whose names are `only`; two are in memory at a time. `progress(done, total, "tensors")` follows.

    Two dtypes are no difference as such: the wider tensor is rounded to the narrower's dtype and must then be equal.
    """
    names = [name for name in dict.fromkeys([*b, *a]) if only(name)]  # b's order: a NeMo checkpoint's fused tensors are read once
    report = TensorReport(total=len(names), dtypes=(_dtypes(a), _dtypes(b)))
    for done, name in enumerate(names, 1):
        if name not in b:
            report.differences.append(TensorDifference(name, "missing in b"))
        elif name not in a:
            report.differences.append(TensorDifference(name, "not in a"))
        elif tuple(a[name].shape) != tuple(b[name].shape):
            shapes = f"shape {list(a[name].shape)} in a, {list(b[name].shape)} in b"
            report.differences.append(TensorDifference(name, shapes))
        else:
            _compare_values(report, name, a[name].read(), b[name].read())
        if progress:
            progress(done, len(names), "tensors")
    return report


def only_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype | None:
    """The one dtype of all tensors, None where there are several."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else None


@dataclass(frozen=True)
class _Lazy:
    """A `LazyTensor` around a function."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def _nemo_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    a, tensors = checkpoint.architecture, {}
    read_once = functools.lru_cache(maxsize=1)(lambda piece: piece.read(a))  # the parts of a fused tensor follow each other
    for piece in pieces_of(with_senses(families.FAMILIES[a.family], a, checkpoint.senses), a, checkpoint.nemo, {}):
        for name, shape in piece.shapes(a).items():
            tensors[name] = _Lazy(shape, piece.saved.dtype, functools.partial(_part, read_once, piece, name))
    return tensors


def _part(read: Callable[[Piece], dict[str, torch.Tensor]], piece: Piece, name: str) -> torch.Tensor:
    return read(piece)[name]


def _gguf_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    from conversion import gguf

    return gguf.hf_tensors(checkpoint.path)


def _compare_values(report: TensorReport, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == b.dtype and _same_bits(a, b):
        report.bitwise += 1
        return
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    if a.dtype != b.dtype and _same_bits(a.to(narrow), b.to(narrow)):
        report.rounded += 1
        return
    difference = (a.float() - b.float()).abs().max().item()
    scale = a.float().abs().max().item()
    report.differences.append(
        TensorDifference(name, f"differs by up to {difference:.3g} (largest value {scale:.3g})", difference)
    )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)))


def _dtypes(tensors: Mapping[str, LazyTensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
