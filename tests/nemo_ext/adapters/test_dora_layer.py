"""One linear with a DoRA against PEFT's, with dropout and a bias, and the equations of its experts, in one process."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conversion.compare.megatron import single_process
from nemo_ext import platform

platform.activate()


@pytest.fixture(scope="module")
def parallel():
    with single_process():
        yield


def layer(bias=True, inputs=12, outputs=20):
    """Megatron's linear with a bias that it adds itself, and PEFT's base with the same weights."""
    import megatron.core.extensions.transformer_engine as te
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(5)
    config = TransformerConfig(num_layers=1, hidden_size=inputs, num_attention_heads=1, perform_initialization=True)
    linear = te.TEColumnParallelLinear(
        inputs, outputs, config=config, init_method=nn.init.normal_, bias=bias, skip_bias_add=False, gather_output=False,
        is_expert=False,
    )  # fmt: skip
    base = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        if bias:
            linear.bias.normal_()
            base.bias.copy_(linear.bias)
        base.weight.copy_(linear.weight)
    return linear, base


def randomise(adapter):
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if parameter.dim() == 1 else 0))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_equal_pefts(parallel, dropout):
    from peft import LoraConfig, inject_adapter_in_model

    from nemo_ext.adapters.dora import DoRAAdapter, DoRALinear

    linear, base = layer()
    ours = DoRALinear(linear, DoRAAdapter(linear, 20, "linear_q", 4, 6.0, dropout))
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, use_dora=True, target_modules=["base"])
    theirs = inject_adapter_in_model(config, nn.ModuleDict({"base": base}))["base"]
    norms = theirs.lora_magnitude_vector["default"].weight
    assert torch.allclose(ours.adapter.weight_magnitude, norms, rtol=1e-6)
    randomise(ours.adapter)
    pairs = {
        "linear_in.weight": theirs.lora_A["default"].weight,
        "linear_out.weight": theirs.lora_B["default"].weight,
        "weight_magnitude": norms,
    }
    own = dict(ours.adapter.named_parameters())
    assert set(own) == set(pairs)
    for name, parameter in pairs.items():
        parameter.data.copy_(own[name].data)
    x = torch.randn(7, 2, 12)
    found, gradients = [], []
    for module, parameters in ((lambda t: ours(t)[0], own.values()), (theirs, (pairs[name] for name in own))):
        t = x.clone().requires_grad_()
        torch.manual_seed(9)  # the same dropout
        y = module(t)
        gradients.append(torch.autograd.grad(y.sin().sum(), [t, *parameters]))
        found.append(y)
    assert torch.allclose(*found, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)
    assert (found[0] - base(x)).abs().max() > 0.5


def test_lengths_need_no_sum_of_the_matrices(parallel):
    """n of every expert, against the matrix itself; in bf16 to bf16's precision."""
    from nemo_ext.adapters.moe_dora import RoutedDoRAAdapter

    linear, _ = layer(bias=False)
    adapter = RoutedDoRAAdapter(linear, 20, "linear_q", 4, 6.0, 0.0, experts=3, top_k=1)
    adapter.begin(linear.weight[None])
    assert torch.allclose(adapter.weight_magnitude, linear.weight.norm(dim=1).expand(3, -1))
    randomise(adapter)
    a, b = adapter.linear_in.weight.view(3, 4, 12), adapter.linear_out.weight.view(20, 3, 4)
    exact = torch.stack([(linear.weight + 6 / 4 * b[:, i] @ a[i]).norm(dim=1) for i in range(3)])
    assert torch.allclose(adapter.lengths(adapter.linear_in(), adapter.linear_out(), linear.weight[None]), exact, rtol=1e-5)
    magnitude = adapter.weight_magnitude.detach().clone()
    adapter.bfloat16()
    assert adapter.linear_in.weight.dtype == torch.bfloat16
    assert torch.equal(adapter.weight_magnitude, magnitude)
    rounded = adapter.lengths(adapter.linear_in(), adapter.linear_out(), linear.weight[None].bfloat16())
    assert rounded.dtype == torch.float32 and torch.allclose(rounded, exact, rtol=2e-2)


def test_balancing_loss(parallel):
    """One where tokens are shared evenly, E where all go to one expert; of every row by itself."""
    from nemo_ext.adapters.moe_dora import balancing_loss

    even = torch.eye(4)[:, None]
    one = torch.eye(4)[torch.zeros(4, dtype=torch.long)][:, None]
    p = torch.cat([even, one], dim=1)
    assert balancing_loss(p, p).tolist() == [1.0, 4.0]
    mixed, choices = torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.6, 0.3]]]), torch.tensor([[[1.0, 1, 0]], [[0.0, 1, 1]]])
    assert balancing_loss(mixed, choices).item() == pytest.approx(3 * (0.25 * 0.3 + 0.5 * 0.45 + 0.25 * 0.25))


def test_balance_weighs_the_rows_by_what_the_step_learns(parallel):
    from nemo_ext.adapters.moe_dora import Balance, RoutedDoRAAdapter

    linear, _ = layer(bias=False)
    adapter = RoutedDoRAAdapter(linear, 20, "linear_q", 4, 6.0, 0.0, experts=3, top_k=1)
    adapter.begin(linear.weight[None])
    chunks = nn.ModuleList([adapter])
    chunks.config = SimpleNamespace(grad_scale_func=lambda loss: loss * 8)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(megatron_parallel=chunks), datamodule=SimpleNamespace(learnt=lambda step: {4: 100}[step]),
        global_step=4,
    )  # fmt: skip
    callback = Balance(0.5, routers=10, rows=16)
    callback.on_train_batch_start(trainer, None, None, 0)
    assert RoutedDoRAAdapter.loss_scale == 0.5 * 8 * 100 / 160
    nn.init.normal_(adapter.router.weight)
    x = torch.randn(7, 2, 12)
    gate = adapter.gate(x)
    assert torch.equal((gate > 0).sum(-1), torch.ones(7, 2)) and torch.allclose(gate.sum(-1), torch.ones(7, 2))
    (given,) = torch.autograd.grad(gate.sum(), adapter.router.weight)  # of the balancing loss alone: the weights' sum is constant
    p = (x @ adapter.router.weight.T).softmax(-1)
    f = torch.nn.functional.one_hot(p.argmax(-1), 3).float().mean(0)
    (wanted,) = torch.autograd.grad((3 * f * p.mean(0)).sum() * RoutedDoRAAdapter.loss_scale, adapter.router.weight)
    assert wanted.abs().max() > 1e-3 and torch.allclose(given, wanted, atol=1e-5)
    adapter.gate(x)
    callback.on_train_batch_end(trainer)
    assert callback.figures["balance"] == pytest.approx((3 * f * p.mean(0)).sum(-1).mean().item())
    assert adapter.balance == []
    adapter.eval().gate(x)
    assert adapter.balance == []
    RoutedDoRAAdapter.loss_scale = 0.0
