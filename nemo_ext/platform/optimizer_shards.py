"""The distributed optimizer's states as they lie, for checkpoints that load at any other layout.

Megatron-Core 0.15 has each data-parallel group's first process gather the fp32 weights and moments in host memory before it
saves them `fully_reshardable`: training waits for some six passes over 12 bytes a parameter. But what a process holds, a range
of a flat buffer, is up to three boxes of each parameter that it touches, and a checkpoint's tensor may be stored in boxes of any
shape. So every process saves its own, from where they are; the checkpoint has the same names, shapes and metadata, and loading
is upstream's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def install() -> None:
    """Let `DistributedOptimizer` save this way, in this process."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(upstream, "__wrapped__"):
        return

    @functools.wraps(upstream)
    def sharded(self, model_sharded_state_dict, is_loading=False, metadata=None):
        if is_loading:
            return upstream(self, model_sharded_state_dict, is_loading, metadata)
        return own_states(self, model_sharded_state_dict)

    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements [start, stop) of a tensor of `shape` in C order, as boxes of it, in order: whole rows are one box."""
    if len(shape) < 2:
        yield (start,)[: len(shape)], (stop - start,)[: len(shape)]
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        rows = 0 if inside else (stop - start) // row
        if rows:
            yield (index, *(0 for _ in shape[1:])), (rows, *shape[1:])
            start += rows * row
            continue
        end = min(stop, (index + 1) * row)
        for offsets, sizes in boxes(shape[1:], inside, inside + end - start):
            yield (index, *offsets), (1, *sizes)
        start = end


def own_states(optimizer: Any, model_sharded_state_dict: dict) -> dict[int, list]:
    """This process's part of the fp32 weights and moments as `ShardedTensor`s that share their memory.

    Raises ValueError for a parameter that the model's sharded state lacks, or that is stored as anything but pieces of it.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    of_model, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    known = {id(each.data): each for each in nested_values(of_model)}
    ranges = {
        parameter: found["param"]
        for buffers in optimizer.gbuf_ranges
        for buckets in buffers.values()
        for bucket in buckets
        for parameter, found in bucket["param_map"].items()
    }
    states = {}
    for number, (parameter, held) in enumerate(ranges.items()):
        if id(parameter) not in known:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not in the model's sharded state")
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        tensors.pop("step", None)  # lies with the parameter groups
        pieces = list(_pieces(known[id(parameter)], held.start, held.end))
        states[number] = [
            _shard(part, box, name, flat[at : at + math.prod(box[1])], optimizer.distributed_optimizer_instance_id)
            for name, flat in tensors.items()
            for part, box, at in pieces
        ]
    return states


def _pieces(stored: Any, start: int, stop: int) -> Iterator[tuple[Any, Box, int]]:
    """What the elements [start, stop) of a parameter are of the tensors it is stored as: (part, box of it, where in the range).

    `stored` is the parameter's `ShardedTensor`, or the factory that cuts it into some (gate and up of a fused SwiGLU linear).
    """
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    if isinstance(stored, ShardedTensor):
        parts = [(stored, 0)]
    else:
        outline = torch.empty(stored.data.shape, dtype=torch.float32, device="meta")
        built = list(nested_values({"": replace(stored, data=outline).build()}))
        if not all((part.data is outline or part.data._base is outline) and part.data.is_contiguous() for part in built):
            raise ValueError(f"{stored.key} is not stored as contiguous pieces of the parameter")
        parts = [(part, part.data.storage_offset()) for part in built]
    for part, begin in parts:
        low, high = max(start, begin), min(stop, begin + math.prod(part.local_shape))
        at = low - start
        if low < high:
            for box in boxes(part.local_shape, low - begin, high - begin):
                yield part, box, at
                at += math.prod(box[1])


def _shard(part: Any, box: Box, name: str, flat: torch.Tensor, replica: int) -> Any:
    """The state `name` (param, exp_avg, exp_avg_sq) of a box of a model's `ShardedTensor`; `flat` [numel] is its content."""
    offsets, sizes = ((0,) * part.prepend_axis_num + box[0], (1,) * part.prepend_axis_num + box[1])
    return replace(
        part,
        key=f"optimizer.state.{name}.{part.key}",
        data=flat.view(sizes),
        dtype=flat.dtype,
        local_shape=sizes,
        global_offset=tuple(whole + inside for whole, inside in zip(part.global_offset, offsets, strict=True)),
        axis_fragmentations=None,  # boxes of different sizes
        prepend_axis_num=0,
        replica_id=(*part.replica_id[:2], replica),  # other processes of the data-parallel group hold other boxes
    )
