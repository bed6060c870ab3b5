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
        ("lora_llama3", dict(), "packed rows begin and end elsewhere in every step: pack=false"),
        ("sft_llama3", dict(), "packed rows"),
        ("lora_llama3", dict(pack=False, dropout=0.1), "every step would leave out the same, and dropout=0.1"),
        ("qlora_llama3", dict(pack=False), "cuda_graphs= is for recipe=pretrain_llama3"),
    ],
)
def test_a_graph_of_steps_that_differ_is_refused(recipe, given, why):
    with pytest.raises(UserError, match=why):
        recipes.resolve(recipe, dict(cuda_graphs=True, **given), cuda=True)


@pytest.mark.parametrize("recipe", ["sft_llama3", "lora_llama3", "dora_llama3"])
def test_a_graph_of_rows_of_one_conversation_is_taken(recipe):
    assert recipes.resolve(recipe, dict(cuda_graphs=True, pack=False), cuda=True)["cuda_graphs"]
