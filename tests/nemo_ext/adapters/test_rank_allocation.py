"""AdaLoRA's budget against PEFT's schedule, its keys, and what a summary says of ranks."""

import pytest

import recipes
from nemo_ext import adapters, platform, rank_report
from nemo_ext.errors import UserError
from recipes.models import size

platform.activate()


@pytest.mark.parametrize(("steps", "warmup", "final", "interval"), [(20, 3, 5, 2), (20, 0, 0, 1), (30, 10, 7, 4), (5, 1, 1, 3)])
def test_budget_is_pefts(steps, warmup, final, interval):
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    from nemo_ext.callbacks.rank_allocation import budget

    config = AdaLoraConfig(init_r=6, target_r=2, tinit=warmup, tfinal=final, deltaT=interval, total_step=steps)
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config, allocator.init_bgt, allocator.target_bgt = config, 6 * 9, 2 * 9
    for step in range(1, steps + 1):
        theirs, allocates = allocator.budget_schedule(step)
        allocates = step == steps - final or (allocates and step < steps - final)
        ours = budget(step, steps=steps, warmup=warmup, final=final, interval=interval, first=54, last=18)
        assert ours == (theirs if allocates else None), step


def test_parameters_of_both_kinds():
    a = size("llama3", "smoke").architecture
    names = adapters.targets(a.family, "all-linear")
    sides = [sum(adapters.shape(a, name)) for name in names]
    keys = recipes.resolve("adalora_llama3", {"size": "smoke"}, cuda=False)
    assert adapters.trained(a, "adalora", keys) == a.num_layers * 12 * sum(side + 1 for side in sides)
    keys = recipes.resolve("fourierft_llama3", {"size": "smoke"}, cuda=False)
    assert adapters.trained(a, "fourierft", keys) == a.num_layers * 1000 * len(names)


@pytest.mark.parametrize(
    ("recipe", "keys", "words"),
    [
        ("adalora_llama3", dict(init_rank=4, target_rank=8), "target_rank=8 must be below init_rank=4"),
        ("adalora_llama3", dict(target_rank=0), "target_rank=0 must be above 0"),
        ("adalora_llama3", dict(steps=20, rank_warmup=12, rank_final=8), "leave no step of steps=20"),
        ("adalora_llama3", dict(importance_decay=1.5), "importance_decay=1.5"),
        ("adalora_llama3", dict(rank=8), "rank= is for recipe=lora_llama3"),
        ("fourierft_llama3", dict(n_frequency=10**9), "n_frequency=1000000000 is more than k_proj has"),
        ("fourierft_llama3", dict(dropout=0.1), "dropout= is for"),
        ("lora_llama3", dict(n_frequency=10), "n_frequency= is for recipe=fourierft_llama3"),
    ],
)
def test_bad_input_is_one_line(recipe, keys, words):
    with pytest.raises(UserError, match=words) as raised:
        recipes.finish({"steps": 100, **recipes.resolve(recipe, keys, cuda=False)})
    assert "\n" not in str(raised.value)


def test_the_summarys_ranks():
    steps = [{"step": s} for s in range(3)]
    assert rank_report.table(steps) == []
    assert rank_report.plot(steps) is None
    steps += [{"step": s, "ranks": {"q_proj": [12 - s, 12 - s], "v_proj": [12, 0]}} for s in range(3, 11)]
    lines = rank_report.table(steps)
    assert lines[-1] == "| 10 | 2.0 | 6.0 | 16 |"
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 6
    assert rank_report.plot(steps).startswith(b"\x89PNG")


@pytest.mark.parametrize("own", [None, (0, 6), (2, 5), (6, 6)])
def test_a_cut_reaches_the_fp32_copy(own):
    """Whole, or the shard of it that the distributed optimizer keeps on this rank."""
    from types import SimpleNamespace

    import torch
    from megatron.core.optimizer.distrib_optimizer import Range

    from nemo_ext.callbacks.rank_allocation import _cut

    whole = torch.arange(1.0, 7.0)
    parameter = torch.nn.Parameter(whole.bfloat16())
    start, stop = own or (0, 6)
    parameter.main_param, parameter.main_param_sharded = whole[start:stop].clone(), own is not None
    places = SimpleNamespace(model_param_gbuf_map={parameter}, _get_model_param_range_map=lambda _: {"param": Range(*own)})
    others = SimpleNamespace(model_param_gbuf_map={})
    with torch.no_grad():
        _cut(parameter, whole % 2 == 0, SimpleNamespace(chained_optimizers=[others, places]))
    expected = torch.tensor([1.0, 0.0, 3.0, 0.0, 5.0, 0.0])
    assert torch.equal(parameter.float(), expected)
    assert torch.equal(parameter.main_param, expected[start:stop])
