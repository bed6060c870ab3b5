"""What a family's table is made of: rows of tensor names, and how its configuration reads and is written.

A row says which Hugging Face tensors make one Megatron tensor and with which layout. Megatron's names are those of Transformer
Engine's modules, which NeMo's checkpoints have; `{i}` is the layer, `{e}` the expert, `{q}` the query's and `{k}` the key's head.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from conversion.layout import PLAIN, Layout
from nemo_ext.architecture import Architecture

Config = Mapping[str, Any]  # a Hugging Face config.json, or its text part
WRAPPED = ("language_model.model.", "model.language_model.")  # what stands for "model." of a language model among other parts


@dataclass(frozen=True)
class Row:
    """`hf` names and their shapes ("q h": rows by columns, see `shape`, or numbers) <-> one `megatron` name."""

    hf: Mapping[str, str | tuple[int, ...]]
    megatron: str
    layout: Layout = PLAIN
    when: Callable[[Architecture], bool] = lambda architecture: True

    def axes(self, architecture: Architecture) -> dict[str, int]:
        """The axes along which a checkpoint stacks this row's tensors, outermost first, such as {"i": layers, "e": experts}."""
        sizes = {"i": architecture.num_layers, "e": architecture.num_moe_experts or 0}
        sizes |= {"q": architecture.num_attention_heads, "k": architecture.num_query_groups}
        return {axis: size for axis, size in sizes.items() if f"{{{axis}}}" in self.megatron}

    def indices(self, architecture: Architecture) -> Iterator[dict[str, int]]:
        """Every {"i": layer, "e": expert} of this row's tensors, in order; one empty dictionary where there is one tensor."""
        axes = self.axes(architecture)
        for index in itertools.product(*map(range, axes.values())):
            yield dict(zip(axes, index, strict=True))

    @property
    def key(self) -> str:
        """The name under which a checkpoint stacks the tensors of all layers, experts and heads."""
        return re.sub(r"\.\{[ieqk]\}", "", self.megatron)


def shape(symbols: str | tuple[int, ...], a: Architecture) -> tuple[int, ...]:
    """The shape behind a row's symbols, such as "q h" -> (query width, hidden size); numbers are one already."""
    if not isinstance(symbols, str):
        return symbols
    sizes = {
        "h": a.hidden_size, "ffn": a.ffn_hidden_size, "2ffn": 2 * a.ffn_hidden_size, "vocab": a.vocab_size,
        "q": a.attention_width, "kv": a.kv_width, "qkv": a.attention_width + 2 * a.kv_width, "d": a.kv_channels,
        "experts": a.num_moe_experts,
    }  # fmt: skip
    return tuple(sizes[symbol] for symbol in symbols.split())


@dataclass(frozen=True)
class Family:
    """Everything conversion knows of a family: its rows and how its configuration reads and is written."""

    name: str  # Architecture.family
    model_types: tuple[str, ...]  # Hugging Face's model_type; the first is the one written
    causal_lm: str  # Hugging Face's class
    rows: tuple[Row, ...]
    read: Callable[[Config], dict[str, Any]]  # fields of Architecture beyond the common ones; refuses what Megatron cannot do
    write: Callable[[Architecture], dict[str, Any]]  # fields of config.json beyond the common ones
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' values for what a config.json may leave out
    text_config: bool = False  # the language model may be wrapped with a vision part, under text_config
    prefixes: tuple[str, ...] = ("model.",)  # what stands for "model." in the checkpoints of the wrapped form
    epsilon: str = "rms_norm_eps"  # config.json's key of the norms' epsilon
    ignored: tuple[str, ...] = field(default=(".rotary_emb.inv_freq",))  # parts of names of tensors that are not weights

    def rows_of(self, architecture: Architecture) -> list[Row]:
        """The rows that exist in this architecture (no output projection where embeddings are tied, for example)."""
        return [row for row in self.rows if row.when(architecture)]
