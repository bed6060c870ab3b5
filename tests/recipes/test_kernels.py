"""Keys that choose kernels of GPUs."""

import pytest

import recipes
from nemo_ext.errors import UserError


def test_a_graph_is_refused_on_a_cpu():
    with pytest.raises(UserError, match="cuda_graphs=true is for GPUs"):
        recipes.resolve("pretrain_llama3", dict(cuda_graphs=True), cuda=False)
    assert recipes.resolve("pretrain_llama3", dict(cuda_graphs=True), cuda=True)["cuda_graphs"]


@pytest.mark.parametrize(
    ("recipe", "given", "why"),
    [
        ("pretrain_mixtral", dict(), "choice of experts"),
        ("pretrain_llama3", dict(recompute="full"), "nothing can be recomputed in a graph, and recompute=full"),
        ("cpt_llama3", dict(clip=0.0), "which clip=0 leaves out"),
        ("lora_llama3", dict(), "cuda_graphs= is for recipe=pretrain_llama3"),
    ],
)
def test_a_graph_is_refused_and_not_chosen_where_it_cannot_be(recipe, given, why):
    with pytest.raises(UserError, match=why):
        recipes.resolve(recipe, dict(cuda_graphs=True, **given), cuda=True)
    assert recipes.resolve(recipe, given, cuda=True)["cuda_graphs"] is False


@pytest.mark.parametrize(("given", "cuda"), [(dict(precision="fp16"), True), (dict(precision="fp32"), True), ({}, False)])
def test_a_graph_is_not_chosen_for_what_was_not_measured(given, cuda):
    assert recipes.resolve("pretrain_llama3", given, cuda=cuda)["cuda_graphs"] is False


def test_a_graph_is_the_plans_choice_elsewhere():
    assert recipes.resolve("cpt_llama3", dict(clip=0.0, on_nan="skip"), cuda=True)["cuda_graphs"] is None


@pytest.mark.parametrize("recipe", ["pretrain_llama3", "lora_llama3", "neva_llama3"])
@pytest.mark.parametrize("cuda", [False, True])
def test_keys_resolve_to_themselves(recipe, cuda):
    """As those of a finished run do, when it is exported or continued."""
    once = recipes.resolve(recipe, dict(size="8b" if cuda else "smoke"), cuda=cuda)
    assert recipes.resolve(recipe, dict(once), cuda=cuda) == once
