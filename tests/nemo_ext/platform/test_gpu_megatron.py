"""What Megatron is told on a GPU."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from nemo_ext import platform
from nemo_ext.platform import gpu_megatron, hardware


@pytest.mark.gpu
@pytest.mark.skipif(not hardware.has_cuda(), reason="needs a CUDA GPU")
def test_weight_gradients_are_added_in_fp32():
    draw = torch.Generator("cuda").manual_seed(1)
    inputs, gradients = (torch.randn(512, n, device="cuda", generator=draw).bfloat16() for n in (256, 384))
    into = torch.randn(384, 256, device="cuda", generator=draw)
    wanted = into.double() + gradients.double().t() @ inputs.double()
    gpu_megatron.add_weight_gradient(inputs, gradients, into)
    torch.testing.assert_close(into.double(), wanted, rtol=1e-5, atol=1e-3)  # fp32 sums of 512 products of up to 20


@pytest.mark.parametrize("missing", [True, False])
def test_the_extension_is_brought_where_it_is_missing(monkeypatch, missing):
    there = {"transformer_engine"} | (set() if missing else {gpu_megatron.EXTENSION})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if name in there else None)
    monkeypatch.setitem(sys.modules, gpu_megatron.EXTENSION, None)  # restored afterwards
    gpu_megatron.bring_weight_gradient()
    module = sys.modules[gpu_megatron.EXTENSION]
    assert (module is not None) == missing
    if missing:
        assert module.wgrad_gemm_accum_fp32 is gpu_megatron.add_weight_gradient


def test_the_loss_does_not_wait(monkeypatch):
    platform.activate()
    from megatron.core.models.common.language_module import language_module

    def loss(logits, labels, group, is_cg_capturable=False):
        return logits, labels, group, is_cg_capturable

    monkeypatch.setattr(language_module, "te_parallel_cross_entropy", loss)
    gpu_megatron.let_loss_run_on()
    assert language_module.te_parallel_cross_entropy(1, 2, 3, False) == (1, 2, 3, True)
    once = language_module.te_parallel_cross_entropy
    gpu_megatron.let_loss_run_on()
    assert language_module.te_parallel_cross_entropy is once
