"""What a model computes for a prompt: its logits and, on demand, the hidden state after every step of the residual stream.

Two models are compared at the same points, whatever their modules are called: "embedding" (what the first layer is given),
"layers.N.attention" (the residual stream after attention, where a layer has such a point), "layers.N" (a layer's output),
"norm" (the last norm's output) and "logits".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nemo_ext.errors import UserError

LOGITS = "logits"
LAYER = re.compile(r"layers\.(\d+)")
CHUNK = 32  # positions compared at once: a softmax in double precision over 262 144 words is 64 MB for 32
SPARE = 1.5e9  # bytes: Python, libraries and activations of a process that runs a model
LOUD = 1e-5  # relative error of a hidden state that rounding in fp32 does not give
JUMP = 4.0  # and how much larger than at all points before: rounding grows slowly


@dataclass(frozen=True)
class Activation:
    """A tensor `[s, h]` or `[s, vocab]`, fp32 on the CPU, and the module that is to blame if it is the first to be wrong."""

    module: str
    value: torch.Tensor


Trace = dict[str, Activation]  # by point, in the order of computation; "logits" always, the others on demand


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' logits `[s, vocab]` for the same tokens lie apart."""

    max_abs: float
    mean_abs: float
    largest_logit: float  # of the reference, absolute: the scale of the differences
    kl_mean: float  # Kullback-Leibler divergence from the reference, in nats, over the positions
    kl_max: float
    top1_agreement: float  # fraction of positions with the same most likely token

    @property
    def relative(self) -> float:
        """The largest difference as a fraction of the largest logit."""
        return self.max_abs / self.largest_logit if self.largest_logit else math.inf


def compare(reference: torch.Tensor, other: torch.Tensor) -> LogitDifference:
    """Differences of two fp32 logit tensors `[..., vocab]`; NaN where one of them is not finite."""
    reference, other = (logits.reshape(-1, logits.shape[-1]) for logits in (reference, other))
    if reference.shape != other.shape:
        raise UserError(f"the models have {reference.shape[-1]} and {other.shape[-1]} logits: their vocabularies differ")
    largest = total = scale = 0.0
    kl, same = [], 0
    for r, o in zip(reference.split(CHUNK), other.split(CHUNK), strict=True):
        difference = (r - o).abs()
        largest, scale = _max(largest, difference), _max(scale, r.abs())
        total += difference.double().sum().item()
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (r, o))
        kl += (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist()  # rounding alone makes it negative
        same += (r.argmax(-1) == o.argmax(-1)).sum().item()
    positions = len(kl)
    kl_max = math.nan if any(map(math.isnan, kl)) else max(kl)
    return LogitDifference(largest, total / reference.numel(), scale, sum(kl) / positions, kl_max, same / positions)


def _max(so_far: float, values: torch.Tensor) -> float:
    found = values.max().item()
    return math.nan if math.isnan(so_far) or math.isnan(found) else max(so_far, found)


def first_difference(reference: Trace, other: Trace) -> tuple[str, float] | None:
    """The first point whose values differ by more than rounding in fp32, and its relative error; None if there is none.

    The error at a point is the largest, over positions, of |difference| / |reference| in the Euclidean norm. Where none is loud,
    the point where it grew most is taken if the logits are further apart than rounding takes them.
    """
    errors = {point: _error(reference[point].value, other[point].value) for point in reference if point in other}
    before, growth = 1e-8, {}
    for point, error in errors.items():
        if not error <= LOUD and not error <= JUMP * before:  # NaN is loud
            return point, error
        growth[point] = error / before
        before = max(before, error)
    point = max(growth, key=growth.__getitem__)
    return (point, errors[point]) if growth[point] > 10 * JUMP and errors[point] > 1e-6 else None


def _error(reference: torch.Tensor, other: torch.Tensor) -> float:
    if reference.shape != other.shape:
        return math.inf
    return ((reference - other).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-30)).max().item()


@contextmanager
def recording(hooks: Sequence[tuple[str, str, torch.nn.Module, Callable]], trace: Trace) -> Iterator[None]:
    """While the block runs, put into `trace` what passes the modules of `hooks`: (point, blamed module, module, where).

    `where(inputs, named inputs, output)` picks the tensor, `[1, s, h]` or `[s, 1, h]`. The points keep the order of `hooks`.
    """
    found: Trace = {}

    def hook(point: str, name: str, where: Callable) -> Callable:
        def record(module, inputs, named, output):
            value = where(inputs, named, output)
            found[point] = Activation(name, value.detach().reshape(-1, value.shape[-1]).float().cpu())

        return record

    handles = [module.register_forward_hook(hook(point, name, where), with_kwargs=True) for point, name, module, where in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        trace.update({point: found[point] for point, *_ in hooks if point in found})


def first_input(inputs: tuple, named: dict, output: object) -> torch.Tensor:
    return inputs[0] if inputs else named["hidden_states"]


def first_output(inputs: tuple, named: dict, output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def round_weights(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Round every parameter to `dtype` in place, keeping its own type: the values of a checkpoint stored in `dtype`."""
    if dtype is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))


def require_memory(weights: float, what: str, processes: int = 1) -> None:
    """Refuse, before anything is loaded, a model whose `weights` bytes do not fit this machine's free memory.

    With CUDA the GPU's free memory counts, `weights` divided over `processes` of them.
    """
    from nemo_ext.platform import hardware

    if hardware.has_cuda():
        free, needed = torch.cuda.mem_get_info()[0], weights / processes + SPARE
    else:
        free, needed = hardware.free_memory(), weights + SPARE * processes
    if needed > free:
        raise UserError(
            f"running {what} needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: "
            "verify=false (or logits=false) leaves the models out"
        )
