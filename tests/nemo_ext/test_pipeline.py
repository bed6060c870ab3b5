"""How layers are shared out over pipeline stages."""

from __future__ import annotations

import pytest

from launchers.memory import Layout, estimate_stage, layers_in_flight
from launchers.plan import Request
from nemo_ext.pipeline import chunk_layers, megatron_layout
from recipes.models import size

LLAMA_8B = size("llama3", "8b").architecture
GIB = 2**30


def layout(pp: int, vp: int | None, microbatches: int = 16, balanced: bool = True) -> Layout:
    return Layout(1, pp, vp, 1, 1, False, 1, microbatches, "none", balanced=balanced)


@pytest.mark.parametrize(("pp", "vp", "expected"), [
    (1, None, [32]),
    (2, None, [17, 15]),
    (2, 2, [9, 9, 8, 6]),
    (2, 4, [5, 5, 4, 4, 4, 4, 4, 2]),
    (4, None, [9, 9, 8, 6]),
])  # fmt: skip
def test_the_output_layer_of_the_8b_counts_as_two_and_a_half_layers(pp, vp, expected):
    """525 million weights against 218 million: each stage's share of 34.4 is what it gets, to half a layer and rounding."""
    assert chunk_layers(LLAMA_8B, pp, vp) == expected


@pytest.mark.parametrize("word", ["smoke", "1b", "8b", "70b"])
@pytest.mark.parametrize(("pp", "vp"), [(2, None), (2, 4), (4, 2), (8, None)])
def test_every_layer_is_somewhere_and_no_chunk_is_empty(word, pp, vp):
    shape = size("llama3", word).architecture
    found = chunk_layers(shape, pp, vp)
    assert len(found) == pp * (vp or 1) and sum(found) == shape.num_layers and min(found) >= 1


def test_megatrons_notation():
    assert megatron_layout([2, 1, 3]) == "Ett|t|tttL"


def test_layers_in_flight_of_unequal_chunks():
    """By hand, chunks of 9 and 8 layers on the first of two stages: two microbatches of the first chunk, two of the second and
    then one of the first are 43, and when a second one's backward pass is done, another of the first comes: 44."""
    assert layers_in_flight(LLAMA_8B, layout(2, 2), 0) == 44
    assert layers_in_flight(LLAMA_8B, layout(2, None), 0) == 34
    assert layers_in_flight(LLAMA_8B, layout(2, None), 1) == 15
    assert layers_in_flight(LLAMA_8B, layout(2, 2, microbatches=2), 0) == 2 * 17


@pytest.mark.parametrize(("precision", "measured"), [("fp8", 119.72), ("bf16", 118.89)])
def test_memory_of_the_first_stage_is_what_was_measured(precision, measured):
    """On two H200, GiB that torch had allocated at most (`benchmarks/results/train_gpu.json`, 8b-pp2-vp2-balanced)."""
    request = Request(1, 2, 141 * GIB, "gpu", 8192, 16, 1, precision=precision, cross_entropy="te")
    assert estimate_stage(LLAMA_8B, request, layout(2, 2), 0).allocated / GIB == pytest.approx(measured, rel=0.005)
