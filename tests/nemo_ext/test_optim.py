"""Schedules by hand, layer-wise groups, and the CPU's Adam against torch's."""

import math

import pytest
import torch

from nemo_ext import platform

platform.activate()

from nemo_ext.optim import depth_of, split_by_depth  # noqa: E402
from nemo_ext.platform.fused_adam import FusedAdam  # noqa: E402
from nemo_ext.schedule import schedule_factor  # noqa: E402


def factors(schedule, steps=11, warmup=0, floor=0.1, decay=0.4):
    return [
        schedule_factor(s, schedule=schedule, max_steps=steps, warmup_steps=warmup, floor=floor, decay_fraction=decay)
        for s in range(steps)
    ]


def test_warmup_is_linear_and_never_zero():
    assert factors("constant", steps=6, warmup=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine():
    values = factors("cosine")
    assert values[0] == 1.0 and values[-1] == pytest.approx(0.1) and values[5] == pytest.approx(0.55)
    assert values[2] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.2)))


def test_linear():
    assert factors("linear") == pytest.approx([1 - 0.09 * i for i in range(11)])


def test_wsd_is_constant_then_falls_in_the_last_share():
    values = factors("wsd", steps=11, warmup=2, decay=0.4)  # falls from step round(11 x 0.6) = 7 to step 10
    assert values[:2] == pytest.approx([1 / 3, 2 / 3]) and values[2:8] == [1.0] * 6
    assert values[8:] == pytest.approx([0.7, 0.4, 0.1])


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule 'cos'"):
        factors("cos")


def test_depths():
    names = {
        "module.embedding.word_embeddings.weight": 0,
        "module.decoder.layers.0.mlp.linear_fc1.weight": 5,
        "module.decoder.layers.3.self_attention.linear_qkv.weight": 8,
        "module.decoder.final_layernorm.weight": 13,
    }
    for name, depth in names.items():
        assert depth_of(name, layer_offset=4, num_layers=12, tied=True) == depth
    assert depth_of("module.output_layer.weight", 4, 12, tied=True) == 0
    assert depth_of("module.output_layer.weight", 4, 12, tied=False) == 13


def test_groups_split_by_depth_alike_on_every_rank():
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    groups = split_by_depth([{"params": [first, second], "lr_mult": 2.0, "wd_mult": 1.0}], {id(first): 0, id(second): 2}, 2, 0.5)
    assert [g["lr_mult"] for g in groups] == [0.5, 1.0, 2.0]
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(first)], [], [id(second)]]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fused_adam_is_torchs_adamw(weight_decay):
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(11)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    options = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    optimizers = FusedAdam(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-7)  # two roundings of values around 1
    assert optimizers[0].param_groups[0]["step"] == 5 and set(optimizers[0].state[ours[0]]) == {"exp_avg", "exp_avg_sq"}
