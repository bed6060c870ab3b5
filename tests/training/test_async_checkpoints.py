"""Checkpoints written while training goes on: the same bits as those for which it stood still, good at any other layout."""

import pytest
import torch
from test_layouts import BUCKETS, assert_same, losses

from nemo_ext import platform, run_folder

platform.activate()

SHARDED = dict(distributed_optimizer=True, overlap=True, precision="bf16", every=1, keep=9)


@pytest.fixture(scope="module")
def runs(train):
    """Two processes that share the optimizer's states, and two that go on with half of each parameter each."""
    return train(
        [
            dict(name="behind", keys=dict(SHARDED, async_save=True), stop_at=4, overrides=BUCKETS),
            dict(name="standing", keys=dict(SHARDED, async_save=False), overrides=BUCKETS),
            dict(name="tp2", keys=dict(tp=2, precision="bf16", every=1, keep=9, async_save=True), continue_copy_of="behind"),
        ],
        2,
    )


def content(checkpoint):
    """Every tensor of a checkpoint, whole, by its name."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    tensors = {}
    _load_state_dict(tensors, FileSystemReader(checkpoint / "weights"), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in tensors.items() if torch.is_tensor(value)}


def test_same_bits_as_those_for_which_training_stood_still(runs):
    """Saves one to four: the plan is made, checked and used again."""
    for step in (1, 2, 4):
        behind, standing = (content(runs / name / f"checkpoints/step-{step:06d}") for name in ("behind", "standing"))
        assert behind.keys() == standing.keys()
        assert sum(name.startswith("optimizer.state.") for name in behind) >= 3 * 8
        for name, value in behind.items():
            assert torch.equal(value, standing[name]), (step, name)
    first, last = (content(runs / f"behind/checkpoints/step-00000{step}") for step in (1, 4))
    assert all(not torch.equal(first[name], last[name]) for name in first if name.startswith("optimizer.state.param"))


def test_continues_at_another_layout(runs):
    """Sums in bf16 go another way with two halves of a weight: to what test_layouts.py allows bf16 against fp32."""
    assert_same(losses(runs, "standing"), losses(runs, "tp2"), tolerance=5e-3)
    assert [step for step, _ in run_folder.checkpoints(runs / "tp2/checkpoints")] == [1, 2, 3, 4, 5, 6]
