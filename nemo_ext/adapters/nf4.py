"""QLoRA's base (Dettmers et al. 2023, arXiv:2305.14314): the linears of a model's layers hold their weights in NF4.

A weight is cut into blocks of 64 along its rows. Each has its largest magnitude, and 4 bits an element that choose one of the 16
values of NF4; double quantization rounds the magnitudes to 8 bits, 256 of them with one fp32 scale, around their mean. The codes
and kernels are those of bitsandbytes, and so are the values: Megatron's fused linears are rounded part by part, as Hugging Face's
linears are, and a tensor-parallel shard as its part of the whole.

The weight itself exists for as long as a product takes: before a linear computes it is dequantized in the parameters' dtype, and
autograd keeps a reference to the NF4 form, from which it comes again in the backward pass. Such a linear has no `weight` among
its parameters: nothing wraps, saves or trains it. Embeddings, the output layer, norms, biases and routers stay as they are.

`quantizing()` is the context in which a model is built; `load()` then fills it from a converted checkpoint, a few layers at a
time: at no time does the model exist at full size.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional as bnb
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.extensions import transformer_engine
from nemo.collections.llm.peft.utils import is_expert_linear
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

BLOCK = 64  # elements with one magnitude
NESTED = 256  # magnitudes with one scale
LOADED_AT_ONCE = 2**30  # bytes of full weights in memory while they are loaded, but a layer at least
ROW = ("TERowParallelLinear", "TERowParallelGroupedLinear")  # whose input features are split over tensor ranks
COLUMN = ("TEColumnParallelLinear", "TELayerNormColumnParallelLinear", "TEColumnParallelGroupedLinear")
WEIGHT = re.compile(r"weight\d*")  # a linear of several experts has one for each


@dataclass(frozen=True)
class Parts:
    """What of Hugging Face's linears the rows of Megatron's are: `groups` (on this rank) of parts of `shares` rows each.

    `whole`: the parts are one linear in Hugging Face's model too, one after the other.
    """

    groups: int = 1
    shares: tuple[int, ...] = (1,)
    whole: bool = True

    def split(self, rows: Tensor) -> list[Tensor]:
        """[rows, n] -> the parts' [rows of each, n]."""
        grouped = rows.unflatten(0, (self.groups, -1))
        unit = grouped.shape[1] // sum(self.shares)
        return [part.flatten(0, 1) for part in grouped.split([share * unit for share in self.shares], 1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)


class NF4Weight:
    """A weight `[out, in]` in NF4: `packed` uint8, two elements a byte, and the magnitudes of its blocks.

    `dim` is the axis that is split over the ranks of `group`; without a group it is not split.
    """

    def __init__(
        self, weight: Tensor, double_quant: bool, parts: Parts, dim: int = 0, group: torch.distributed.ProcessGroup | None = None
    ):
        self.shape, self.dtype, self.parts = weight.shape, weight.dtype, parts
        self.packed, state = bnb.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        self.magnitudes: Tensor | list[_Rounded] = state.absmax
        if not double_quant:
            return
        if weight.shape[1] % BLOCK:  # blocks lie across rows: their magnitudes belong to no part, and are this rank's own
            self.parts, group = Parts(), None
            rows = state.absmax[:, None]
        else:
            rows = state.absmax.view(weight.shape[0], -1)
        split = self.parts.split(rows)
        full = [_gathered(part, dim, group) for part in split]
        tensors = [torch.cat(full)] if self.parts.whole else full
        rounded = [_Rounded(tensor) for tensor in tensors]
        if group is None or group.size() == 1:
            self.magnitudes = rounded
        else:  # groups of 256 lie across ranks: their values, which every rank finds from the whole tensor, in fp32
            values = torch.cat([each.values() for each in rounded]).split([len(part) for part in full])
            self.magnitudes = self.parts.join([part.chunk(group.size(), dim)[group.rank()] for part in values]).flatten()

    def dequantize(self) -> Tensor:
        """The weight, as a new tensor."""
        magnitudes = self.magnitudes
        if isinstance(magnitudes, list):
            values = torch.cat([each.values() for each in magnitudes]) if len(magnitudes) > 1 else magnitudes[0].values()
            if len(self.parts.shares) > 1:
                unit = len(values) // sum(self.parts.shares)
                values = self.parts.join(values.split([share * unit for share in self.parts.shares]))
            magnitudes = values.flatten()
        state = bnb.QuantState(magnitudes, shape=self.shape, dtype=self.dtype, blocksize=BLOCK, quant_type="nf4")
        return bnb.dequantize_4bit(self.packed, state)

    @property
    def nbytes(self) -> int:
        """Bytes in memory; bitsandbytes' tables, one for all weights, not counted."""
        own = self.magnitudes
        return self.packed.nbytes + (own.nbytes if isinstance(own, Tensor) else sum(each.nbytes for each in own))


class _Rounded:
    """Magnitudes [rows, n] in 8 bits: what `quantize_4bit(compress_statistics=True)` makes of a linear's."""

    def __init__(self, magnitudes: Tensor):
        self.offset = magnitudes.mean()
        self.codes, self.state = bnb.quantize_blockwise(magnitudes.contiguous() - self.offset, blocksize=NESTED)

    def values(self) -> Tensor:
        return bnb.dequantize_blockwise(self.codes, self.state).add_(self.offset)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.state.absmax.nbytes + self.offset.nbytes


def _gathered(part: Tensor, dim: int, group: torch.distributed.ProcessGroup | None) -> Tensor:
    if group is None or group.size() == 1:
        return part
    shards = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(shards, part.contiguous(), group=group)
    return torch.cat(shards, dim)


class NF4Linear:
    """The part of a linear with its weights in `nf4` that computes with them; comes before the linear's own class."""

    nf4: dict[str, NF4Weight]
    in_features = property(lambda self: self.nf4_shape[1])
    out_features = property(lambda self: self.nf4_shape[0])

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with self.dense():
            return super().forward(*arguments, **options)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The weights are there, and autograd keeps their NF4 form.

        Afterwards their memory is given back whoever still has the tensors: Transformer Engine's LayerNormLinear puts its weight
        into its autograd context, beside what it saves.
        """
        saved, storages = {}, []
        try:
            for name, nf4 in self.nf4.items():
                self.__dict__[name] = nf4.dequantize()
                storage = self.__dict__[name].untyped_storage()
                saved[storage.data_ptr()] = _Again(nf4)
                storages.append(storage)

            def pack(tensor: Tensor) -> Any:
                again = saved.get(tensor.untyped_storage().data_ptr())
                return tensor if again is None else (again, tensor.shape, tensor.stride(), tensor.storage_offset())

            with saved_tensors_hooks(pack, _unpack):
                yield
        finally:
            for name in self.nf4:
                self.__dict__.pop(name, None)
            for storage in storages:
                storage.resize_(0)


class _Again:
    """A dequantized weight for the backward pass; computed once for all that ask while one of them has it."""

    def __init__(self, nf4: NF4Weight):
        self.nf4 = nf4
        self.alive: StorageWeakRef | None = None

    def tensor(self) -> Tensor:
        storage = self.alive and torch.UntypedStorage._new_with_weak_ptr(self.alive.cdata)
        if storage is not None:
            return torch.empty(0, dtype=self.nf4.dtype, device=storage.device).set_(storage, 0, self.nf4.shape)
        weight = self.nf4.dequantize()
        self.alive = StorageWeakRef(weight.untyped_storage())
        return weight


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    again, shape, stride, offset = saved
    return again.tensor().as_strided(shape, stride, offset)


@contextmanager
def quantizing(double_quant: bool, whole: Sequence[str] = (), random: bool = False) -> Iterator[None]:
    """Linears of layers that are built in it give their weights up as soon as they are part of a layer.

    `whole` names fused linears (`linear_qkv`) that are one in Hugging Face's model too. The NF4 weights are to be loaded, or,
    with `random`, are those of the initialisation.
    """
    known = tuple(getattr(transformer_engine, name) for name in (*ROW, *COLUMN))

    def adopt(parent: nn.Module, name: str, module: nn.Module) -> None:
        if not isinstance(module, known) or isinstance(module, NF4Linear):
            return
        weights = {n: p for n, p in module._parameters.items() if WEIGHT.fullmatch(n)}
        module.nf4_parts, module.nf4_double_quant = _parts(module.config, name, whole), double_quant
        some = next(iter(weights.values()))
        module.nf4_shape, module.nf4_like = some.shape, torch.empty(0, dtype=some.dtype, device=some.device)
        module.nf4 = {}
        for weight in weights:
            value = module._parameters.pop(weight)
            module.nf4[weight] = NF4Weight(value.detach(), double_quant, module.nf4_parts) if random else None
        module.__class__ = _class(type(module))

    handle = nn.modules.module.register_module_module_registration_hook(adopt)
    try:
        yield
    finally:
        handle.remove()


@functools.cache
def _class(linear: type) -> type:
    return type(f"NF4{linear.__name__}", (NF4Linear, linear), {})


def _parts(config: Any, name: str, whole: Sequence[str]) -> Parts:
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if name == "linear_qkv":
        shares = (config.num_attention_heads // config.num_query_groups, 1, 1)
        return Parts(config.num_query_groups // ranks, shares, name in whole)
    if name == "linear_fc1" and config.gated_linear_unit:
        return Parts(1, (1, 1), name in whole)
    return Parts()


def load(model: Sequence[nn.Module], base: str, metadata: Mapping[str, Any] | None) -> None:
    """Fill the linears of these pipeline chunks from a converted checkpoint's folder. Collective."""
    folder = str(ckpt_to_weights_subdir(base, is_saving=False))
    for chunk in model:
        linears = {n: m for n, m in chunk.module.named_modules(prefix="module") if isinstance(m, NF4Linear)}
        for names in _batches(linears):
            chosen = {name: linears[name] for name in names}
            for module in chosen.values():
                for weight in module.nf4:
                    module._parameters[weight] = nn.Parameter(module.nf4_like.new_empty(module.nf4_shape), requires_grad=False)
            state = chunk.module.sharded_state_dict(prefix="module.", metadata=metadata)
            wanted = {f"{name}.{weight}": state[f"{name}.{weight}"] for name in names for weight in linears[name].nf4}
            del state
            loaded = dist_checkpointing.load({"state_dict": wanted}, folder, validate_access_integrity=False)["state_dict"]
            for name, module in chosen.items():
                for weight in module.nf4:
                    del module._parameters[weight]
                    module.nf4[weight] = _quantized(module, loaded.pop(f"{name}.{weight}"), name)


def _batches(linears: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """The names of linears, of some layers at a time."""
    batch, size, layer = [], 0, None
    for name, module in linears.items():
        at = re.search(r"\.layers\.\d+\.", name)[0]
        if at != layer and size >= LOADED_AT_ONCE:
            yield batch
            batch, size = [], 0
        layer = at
        batch.append(name)
        size += module.nf4_shape.numel() * module.nf4_like.element_size() * len(module.nf4)
    yield batch


def _quantized(module: nn.Module, weight: Tensor, name: str) -> NF4Weight:
    expert = is_expert_linear(name)
    group = parallel_state.get_expert_tensor_parallel_group() if expert else parallel_state.get_tensor_model_parallel_group()
    dim = 1 if isinstance(module, tuple(getattr(transformer_engine, row) for row in ROW)) else 0
    return NF4Weight(weight.to(module.nf4_like), module.nf4_double_quant, module.nf4_parts, dim, group)


def nbytes(model: nn.Module) -> int:
    """Bytes of the NF4 weights in a model."""
    return sum(nf4.nbytes for m in model.modules() if isinstance(m, NF4Linear) for nf4 in m.nf4.values())
