"""Keys that choose kernels of GPUs."""

import pytest

import recipes
from nemo_ext.errors import UserError


def test_a_graph_is_refused_on_a_cpu():
    with pytest.raises(UserError, match="cuda_graphs=true is for GPUs"):
        recipes.resolve("pretrain_llama3", dict(cuda_graphs=True), cuda=False)
    assert recipes.resolve("pretrain_llama3", dict(cuda_graphs=True), cuda=True)["cuda_graphs"]
