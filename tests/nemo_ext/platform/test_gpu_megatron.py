"""What Megatron is told on a GPU."""

import importlib.util
import sys
import types
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


def test_swiglus_gradient_is_transformer_engines(monkeypatch):
    """Its kernel by hand: Megatron passes the gradient and what went in, and takes what comes out."""
    platform.activate()
    from megatron.core.fusions import fused_bias_swiglu

    def dswiglu(gradient, gate_up, quantizer):
        assert quantizer is None
        gate, up = gate_up.float().chunk(2, -1)
        sigmoid = gate.sigmoid()
        parts = gradient * up * sigmoid * (1 + gate * (1 - sigmoid)), gradient * gate * sigmoid
        calls.append(gate_up.dtype)
        return torch.cat(parts, -1).to(gate_up.dtype)

    calls = []
    package, extension = types.ModuleType("transformer_engine"), types.SimpleNamespace(dswiglu=dswiglu)
    package.pytorch = types.ModuleType("transformer_engine.pytorch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    for name, module in (("", package), (".pytorch", package.pytorch), ("_torch", extension)):
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    monkeypatch.setattr(fused_bias_swiglu.SwiGLUFunction, "backward", fused_bias_swiglu.SwiGLUFunction.backward)
    gpu_megatron.bring_swiglu_gradient()
    for store_fp8, tolerance in ((False, 2**-7), (True, 0.2)):
        gate_up = torch.randn(4, 2, 12, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        gradient = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
        fused_bias_swiglu.bias_swiglu_impl(gate_up, None, store_fp8).backward(gradient)
        exact = gate_up.detach().float().requires_grad_()
        gate, up = exact.chunk(2, -1)
        (torch.nn.functional.silu(gate) * up).backward(gradient.float())
        assert (gate_up.grad.float() - exact.grad).norm() < tolerance * exact.grad.norm()
    assert calls == [torch.bfloat16] * 2


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
