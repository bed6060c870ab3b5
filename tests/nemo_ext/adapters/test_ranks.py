"""Ranks and alphas of single linears, DoRA's parameters, and what the recipes refuse in one line."""

import pytest

import recipes
from nemo_ext import adapters
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

KEYS = {"rank": 16, "alpha": 32.0, "rslora": False, "dropout": 0.0, "targets": "all-linear"}
SMALL = Architecture("llama", 4, 64, 176, 4, num_query_groups=2, vocab_size=512)


def test_of_single_linears():
    keys = {**KEYS, "targets": "q_proj,mlp", "ranks": "mlp:8,up_proj:32", "alphas": {"q_proj": 4}}
    assert adapters.ranks("llama", keys) == {"q_proj": 16, "gate_proj": 8, "up_proj": 32, "down_proj": 8}
    assert adapters.alphas("llama", keys) == {"q_proj": 4.0, "gate_proj": 32.0, "up_proj": 32.0, "down_proj": 32.0}
    settings = adapters.transform_settings(SMALL, {**keys, "rslora": True}, "dora")
    assert settings["kind"] == "canonical_dora"
    assert settings["ranks"] == {"linear_q": 16, "linear_fc1_gate": 8, "linear_fc1_up": 32, "linear_fc2": 8}
    assert settings["alphas"]["linear_q"] / 16 == 4 / 16**0.5
    assert settings["alphas"]["linear_fc1_up"] / 32 == pytest.approx(32 / 32**0.5)


def test_parameters():
    """q_proj 64 to 64 and up_proj 64 to 176: A and B of ranks 2 and 3, magnitudes, and routers of 64 inputs."""
    keys = {**KEYS, "targets": "q_proj,up_proj", "ranks": "q_proj:2,up_proj:3"}
    matrices, magnitudes, routers = 2 * 128 + 3 * 240, 64 + 176, 64 + 64
    assert adapters.trained(SMALL, "lora", keys) == 4 * matrices
    assert adapters.trained(SMALL, "dora", keys) == 4 * (matrices + magnitudes)
    keys |= {"experts": 5, "top_layers": 3}
    assert adapters.trained(SMALL, "moe_dora", keys) == (1 + 3 * 5) * (matrices + magnitudes) + 3 * 5 * routers
    assert adapters.top_layers(SMALL, {"top_layers": None}) == 2


@pytest.mark.parametrize(
    ("recipe", "keys", "says"),
    [
        ("lora", dict(ranks="q_proj:0"), "ranks=q_proj:0 must give an integer above 0"),
        ("dora", dict(rank=0), "rank=0 must be above 0"),
        ("dora", dict(ranks="q_proj:2.5"), "ranks=q_proj:2.5 must give an integer above 0"),
        ("dora", dict(ranks="q_proj"), "ranks=:q_proj must give an integer above 0"),
        ("dora", dict(alphas="q_proj:nan"), "alphas=q_proj:nan must give a number above 0"),
        ("dora", dict(ranks="c_attn:4"), "ranks= has c_attn, which is no linear of a llama model"),
        ("dora", dict(targets="attention", ranks="mlp:4"), "ranks=mlp:4: targets=attention has no mlp"),
        ("dora", dict(targets="c_attn"), "targets= has c_attn, which is no linear"),
        ("dora", dict(experts=8), "experts= is for recipe=moe_dora_llama3, not for dora_llama3"),
        ("sft", dict(ranks="q_proj:4"), "ranks= is for recipe=lora_llama3, not for sft_llama3"),
        ("moe_dora", dict(experts=2, top_k=3), "top_k=3 is more than experts=2"),
        ("moe_dora", dict(top_k=0), "top_k=0 must be above 0"),
        ("moe_dora", dict(top_layers=31), "top_layers=31, but the model has 30 layers"),
        ("moe_dora", dict(balance=-1.0), "balance=-1.0 must not be negative"),
        ("moe_dora", dict(export="hf"), "export=hf: neither PEFT nor transformers has the routers"),
        ("moe_dora", dict(export="lora"), "export=lora: neither PEFT nor transformers has the routers"),
    ],
)
def test_refused(recipe, keys, says):
    with pytest.raises(UserError) as error:
        recipes.resolve(f"{recipe}_llama3", {"device": "cpu", **keys}, cuda=False)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_tensor_parallelism_divides_loras_ranks_alone():
    given = {"device": "cpu", "rank": 8, "ranks": "up_proj:6", "tp": 4}
    keys = recipes.resolve("lora_llama3", given, cuda=False)
    with pytest.raises(UserError, match="ranks=up_proj:6 is not a multiple of tp=4"):
        recipes.check_layout("lora_llama3", keys)
    recipes.check_layout("dora_llama3", recipes.resolve("dora_llama3", given, cuda=False))
