"""A range of a flattened tensor as boxes of it."""

import math
import random

import pytest
import torch

from nemo_ext.platform.optimizer_shards import boxes

SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (6, 1), (2, 3, 4), (3, 1, 5), (2, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_range_is_its_boxes_in_order(shape):
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    ranges = [(a, b) for a in range(tensor.numel()) for b in range(a + 1, tensor.numel() + 1)]
    for start, stop in random.Random(0).sample(ranges, min(len(ranges), 200)):
        found = list(boxes(shape, start, stop))
        content = [tensor[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in found]
        assert torch.cat(content).tolist() == list(range(start, stop))
        assert all(len(offsets) == len(sizes) == len(shape) for offsets, sizes in found)
        assert len(found) <= max(1, 2 * len(shape) - 1)


def test_whole_tensors_and_whole_rows_are_one_box():
    assert list(boxes((3, 4), 0, 12)) == [((0, 0), (3, 4))]
    assert list(boxes((3, 4), 4, 12)) == [((1, 0), (2, 4))]
    assert list(boxes((3, 4), 3, 9)) == [((0, 3), (1, 1)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    assert list(boxes((3, 4), 5, 5)) == []
