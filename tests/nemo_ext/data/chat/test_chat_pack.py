import time

import numpy as np
import pytest

from nemo_ext.data.chat.pack import one_each, pack


def by_definition(lengths, capacity):
    """First-fit decreasing, written down as it is defined."""
    rooms, bins = [], []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        number = next((b for b, room in enumerate(rooms) if room >= lengths[item]), None)
        if number is None:
            number = len(rooms)
            rooms.append(capacity)
            bins.append([])
        rooms[number] -= lengths[item]
        bins[number].append(item)
    return bins


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.integers(2, 34), rng.integers(1, 120))
    packing = pack(lengths, 33)
    assert [packing[i].tolist() for i in range(len(packing))] == by_definition(lengths.tolist(), 33)


def test_ties_are_exchanged_and_nothing_else():
    lengths = np.random.default_rng(0).integers(1, 12, 500)
    packing = pack(lengths, 32)
    first, again, other = (packing.shuffled_ties(lengths, seed) for seed in ([7, 0], [7, 0], [7, 1]))
    assert (first.items == again.items).all() and (first.items != other.items).any() and (first.items != packing.items).any()
    for changed in (first, other):
        assert sorted(changed.items) == list(range(500)) and (lengths[changed.items] == lengths[packing.items]).all()
        assert max(lengths[changed[i]].sum() for i in range(len(changed))) <= 32


def test_bounds():
    assert [pack(np.array([32]), 32)[0].tolist(), len(pack(np.array([], np.int64), 32))] == [[0], 0]
    assert len(pack(np.full(100, 17), 32)) == 100 and len(pack(np.full(100, 16), 32)) == 50
    assert [one_each(3)[i].tolist() for i in range(3)] == [[0], [1], [2]]
    for lengths in ([33], [0, 4]):
        with pytest.raises(ValueError, match="lengths from"):
            pack(np.array(lengths), 32)


def test_a_hundred_thousand_in_moments():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.8, 100_000).astype(np.int64), 1, 4096)
    begin = time.perf_counter()
    packing = pack(lengths, 4096)
    assert time.perf_counter() - begin < 10  # about half a second; quadratic work would take minutes
    assert lengths.sum() / (len(packing) * 4096) > 0.99
