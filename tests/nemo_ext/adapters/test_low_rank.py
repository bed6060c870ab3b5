"""LoRA's part of a linear's output in one function against its adapters one by one, which other tests compare with PEFT's."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conversion.compare.megatron import single_process
from nemo_ext import platform

platform.activate()

TOKENS, IN = 12, 16
# groups, {part: whole width}, {adapted part: (rank, alpha)}; one part of no name: an adapter of all of the output
CASES = {
    "whole": (1, {"": 24}, {"": (4, 6.0)}),
    "queries, keys and values of three groups": (3, {"q": 24, "k": 12, "v": 12}, {"q": (4, 8.0), "k": (4, 8.0), "v": (4, 8.0)}),
    "gate and up": (1, {"gate": 20, "up": 20}, {"gate": (4, 8.0), "up": (4, 8.0)}),
    "some, of other ranks and alphas": (3, {"q": 24, "k": 12, "v": 12}, {"q": (2, 8.0), "v": (5, 2.5)}),
}


@pytest.fixture(scope="module")
def parallel():
    with single_process():
        yield


def build(case, dtype, **more):
    """A linear of Megatron's, its adapters and how they lie in its output; B is not zero."""
    from megatron.core.transformer import TransformerConfig
    from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    from nemo_ext.adapters.lora import Parts

    groups, widths, adapted = CASES[case]
    torch.manual_seed(3)
    config = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=1, use_cpu_initialization=True, bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
    )  # fmt: skip
    options = dict(
        activation="identity", column_init_method="normal", row_init_method="normal", model_parallel_config=config, **more
    )
    adapters = {
        name: ParallelLinearAdapter(IN, widths[name], rank, base_linear_name=name, alpha=alpha, **options).to(dtype)
        for name, (rank, alpha) in adapted.items()
    }
    return torch.randn(sum(widths.values()), IN, dtype=dtype), adapters, Parts(widths, groups) if len(widths) > 1 else None


def separately(output, x, adapters, parts):
    found = {name: adapter(x) for name, adapter in adapters.items()}
    return output + (parts.join(found) if parts else found[""]).reshape(output.shape)


def run(way, weight, x, adapters, parts, gradient):
    """The output, the linear's own gradient, x's, and the adapters'."""
    weight = weight.clone().requires_grad_()
    x = x.clone().requires_grad_()
    for adapter in adapters.values():
        adapter.zero_grad()
    out = way(x @ weight.t(), x, adapters, parts)
    out.backward(gradient)
    of_adapters = [parameter.grad.clone() for adapter in adapters.values() for parameter in adapter.parameters()]
    return [out.detach(), weight.grad, x.grad, *of_adapters]


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_adapters(parallel, case):
    from nemo_ext.adapters import low_rank

    weight, adapters, parts = build(case, torch.float32)
    x, gradient = torch.randn(TOKENS // 2, 2, IN), torch.randn(TOKENS // 2, 2, len(weight))
    output = x @ weight.t()
    assert low_rank.holds(output, x, list(adapters.values()))
    one, other = (run(way, weight, x, adapters, parts, gradient) for way in (low_rank.add, separately))
    assert len(one) == 3 + 2 * len(adapters)
    for a, b in zip(one, other, strict=True):
        # sums of at most 24 products of order 1 to 10 in fp32, in another order
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5), (a - b).abs().max()
    assert (one[0] - output).norm() > 0.1 * output.norm()


@pytest.mark.parametrize("case", CASES)
def test_rounding_is_no_larger(parallel, case):
    """In bf16, against the same in fp32: one rounding of the sum where there were three."""
    from nemo_ext.adapters import low_rank

    weight, adapters, parts = build(case, torch.bfloat16)
    x, gradient = torch.randn(512, 1, IN).bfloat16(), torch.randn(512, 1, len(weight)).bfloat16()
    ways = [run(way, weight, x, adapters, parts, gradient) for way in (low_rank.add, separately)]
    exact = run(separately, weight.float(), x.float(), {k: v.float() for k, v in adapters.items()}, parts, gradient.float())
    for ours, theirs, right in zip(*ways, exact, strict=True):
        # both round once for the linear's own gradient, and alike; 1.05 is for the luck of some hundred roundings
        assert (ours - right).norm() <= 1.05 * (theirs - right).norm() + 1e-6 * right.norm()


def test_a_frozen_input_gets_no_gradient_and_the_output_is_changed_in_place(parallel):
    from nemo_ext.adapters import low_rank

    weight, adapters, parts = build("gate and up", torch.float32)
    x = torch.randn(TOKENS, 1, IN)
    output = x @ weight.t()
    expected = separately(output, x, adapters, parts)
    with torch.no_grad():
        assert low_rank.add(output, x, adapters, parts).data_ptr() == output.data_ptr()
    assert torch.allclose(output, expected, atol=1e-5)
    low_rank.add(x @ weight.t(), x, adapters, parts).sum().backward()
    assert x.grad is None and all(parameter.grad is not None for each in adapters.values() for parameter in each.parameters())


def test_hooks_of_the_adapters_linears_run(parallel):
    """Megatron waits in them for weights that other replicas have updated."""
    from nemo_ext.adapters import low_rank

    weight, adapters, parts = build("gate and up", torch.float32)
    seen = []
    for adapter in adapters.values():
        for linear in (adapter.linear_in, adapter.linear_out):
            linear.register_forward_pre_hook(lambda module, *unused: seen.append(module))
    x = torch.randn(TOKENS, 1, IN)
    low_rank.add(x @ weight.t(), x, adapters, parts)
    assert len(seen) == len(set(map(id, seen))) == 4


@pytest.mark.parametrize(
    "change",
    [
        dict(dropout=0.1),
        dict(activation="relu"),
        dict(is_expert=True),
        dict(dtype=torch.float64),
        dict(ranks=2),
        dict(strided=True),
    ],
)
def test_what_it_does_not_hold_for_is_left_to_the_adapters(parallel, change, monkeypatch):
    from megatron.core import parallel_state

    from nemo_ext.adapters import low_rank

    weight, adapters, _ = build("whole", torch.float32)
    (adapter,) = adapters.values()
    x = torch.randn(TOKENS, 1, IN, dtype=change.get("dtype", torch.float32))
    output = x @ weight.t().to(x.dtype)
    if change.get("strided"):
        output = output.expand(TOKENS, 3, -1)
    if "dropout" in change:
        adapter.dropout = nn.Dropout(change["dropout"])
    if "activation" in change:
        adapter.activation = nn.ReLU()
    adapter.is_expert = change.get("is_expert", False)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: change.get("ranks", 1))
    assert not low_rank.holds(output, x, [adapter])
    assert not low_rank.holds(output, x, [SimpleNamespace()])
