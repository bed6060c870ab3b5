"""Megatron's gated MLP in FP8 whose SwiGLU and gradient are quantized where they are computed, against fp32."""

import pytest
import torch
from torch.nn import functional

from nemo_ext import platform
from nemo_ext.platform import hardware

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hardware.has_cuda(), reason="needs a CUDA GPU")]
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]


def reference(gate_up, gradient):
    """SwiGLU and the gradient of its input in fp32."""
    whole = gate_up.float().requires_grad_()
    gate, up = whole.chunk(2, -1)
    values = functional.silu(gate) * up
    values.backward(gradient.float())
    return values.detach(), whole.grad


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("tokens, width", [(512, 384), (200, 80)])
def test_rows_columns_and_largest(dtype, tokens, width):
    from nemo_ext.platform import swiglu_fp8

    draw = torch.Generator("cuda").manual_seed(1)
    gate_up, gradient = (torch.randn(tokens, n, device="cuda", generator=draw).bfloat16() for n in (2 * width, width))
    scale = torch.tensor([90.0], device="cuda")  # some values are beyond E4M3's largest
    limit = torch.finfo(dtype).max
    made = (
        lambda amax, columns: swiglu_fp8.forward(gate_up, dtype, scale, amax, columns),
        lambda amax, columns: swiglu_fp8.backward(gradient, gate_up, dtype, scale, amax, columns),
    )
    for make, wanted in zip(made, reference(gate_up, gradient), strict=True):
        amax = torch.zeros(1, device="cuda")
        rows, columns, inverse = make(amax, True)
        expected = (wanted * scale).clamp(-limit, limit).to(dtype)
        assert (rows.float() != expected.float()).float().mean() < 1e-3  # an exponential's last bit decides few roundings
        torch.testing.assert_close(rows.float(), expected.float(), rtol=0.26, atol=0)
        assert torch.equal(columns.float(), rows.float().t())
        torch.testing.assert_close(amax[0], wanted.abs().max(), rtol=1e-5, atol=0)
        torch.testing.assert_close(inverse * scale, torch.ones_like(scale))
        amax.fill_(1e3)
        assert make(amax, False)[1] is None
        assert amax.item() == 1e3


def test_what_is_no_number_stays_so():
    from nemo_ext.platform import swiglu_fp8

    gate_up = torch.ones(64, 64, device="cuda").bfloat16()
    gate_up[3, 5], gate_up[4, 6] = float("nan"), 1e30
    one = torch.ones(1, device="cuda")
    rows = swiglu_fp8.forward(gate_up, torch.float8_e4m3fn, one, one.clone(), True)[0].float()
    assert rows.isnan().nonzero().tolist() == [[3, 5]]
    assert rows[4, 6] == 448


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(configuration, a function that builds an MLP with equal weights)."""
    platform.activate()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, gated_linear_unit=True,
        activation_func=functional.silu, add_bias_linear=False, bias_activation_fusion=True, normalization="RMSNorm", bf16=True,
        params_dtype=torch.bfloat16, gradient_accumulation_fusion=True, fp8="hybrid", fp8_recipe="delayed",
        fp8_amax_history_len=8, fp8_amax_compute_algo="max",
    )  # fmt: skip

    def build(learns: bool = True) -> MLP:
        FP8GlobalStateManager.reset()
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        parts = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
        mlp = MLP(config, parts, input_size=256, ffn_hidden_size=512).cuda()
        for each in mlp.parameters():
            each.main_grad, each.grad_added_to_main_grad = torch.zeros_like(each, dtype=torch.float32), False
            each.requires_grad_(learns)
        return mlp

    yield config, build
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def run(config, mlp, steps: int = 3, call=None):
    """(output, gradient of the input, of both weights, fp32) of the last of `steps` steps of two micro batches, [64, 3, 256]."""
    from megatron.core.fp8_utils import get_fp8_context

    draw = torch.Generator("cuda").manual_seed(3)
    inputs, gradient = (torch.randn(64, 3, 256, device="cuda", generator=draw).bfloat16() for _ in range(2))
    inputs.requires_grad_()
    for _ in range(steps):
        inputs.grad = None
        for each in mlp.parameters():
            each.main_grad.zero_()
        for each in (mlp.linear_fc1, mlp.linear_fc2):
            each.is_first_microbatch = True
        for _ in range(2):
            with get_fp8_context(config):
                out = call(mlp, inputs) if call else mlp(inputs)[0]
            out.backward(gradient)
    return [out.detach().float(), inputs.grad.float(), mlp.linear_fc1.weight.main_grad, mlp.linear_fc2.weight.main_grad]


def in_fp32(mlp):
    draw = torch.Generator("cuda").manual_seed(3)
    inputs, gradient = (torch.randn(64, 3, 256, device="cuda", generator=draw).bfloat16().float() for _ in range(2))
    inputs.requires_grad_()
    first, second = (each.weight.detach().float().requires_grad_() for each in (mlp.linear_fc1, mlp.linear_fc2))
    normed = functional.rms_norm(inputs, (256,), eps=mlp.linear_fc1.eps)
    gate, up = (normed @ first.t()).chunk(2, -1)
    out = (functional.silu(gate) * up) @ second.t()
    out.backward(gradient)
    return [out.detach(), 2 * inputs.grad, 2 * first.grad, 2 * second.grad]


def calls(monkeypatch):
    from nemo_ext.platform import fused_mlp

    seen, inner = [], fused_mlp._forward
    monkeypatch.setattr(fused_mlp, "_forward", lambda *parts: seen.append(1) or inner(*parts))
    return seen


@pytest.mark.parametrize("learns", [True, False])
def test_errors_are_no_larger_than_transformer_engines(built, monkeypatch, learns):
    """And the scales come out the same, to what bf16 rounds of the largest values."""
    from megatron.core.transformer.mlp import MLP

    config, build = built
    seen = calls(monkeypatch)
    mlp = build(learns)
    new = run(config, mlp)
    assert len(seen) == 6
    with monkeypatch.context() as patch:
        patch.setattr(MLP, "forward", MLP.forward.__wrapped__)
        other = build(learns)
        old = run(config, other)
    assert len(seen) == 6
    for ours, theirs, wanted in list(zip(new, old, in_fp32(mlp), strict=True))[: 4 if learns else 2]:
        mine, yours = ((each - wanted).norm() / wanted.norm() for each in (ours, theirs))
        assert mine < 1.05 * yours and yours < 0.15
    for name in ("linear_fc1", "linear_fc2"):
        for key in ("scaling_fwd", "scaling_bwd"):
            ours, theirs = (getattr(each, name).fp8_meta[key] for each in (mlp, other))
            torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-2, atol=0)
            assert ours.amax_history.count_nonzero() == theirs.amax_history.count_nonzero() > 0


def test_megatrons_way_stays(built, monkeypatch):
    from megatron.core.extensions.transformer_engine import te_checkpoint
    from megatron.core.fp8_utils import get_fp8_context
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    config, build = built
    seen = calls(monkeypatch)

    def recomputed(mlp, inputs):
        return te_checkpoint(mlp, False, get_cuda_rng_tracker, None, inputs)[0]

    whole = run(config, build())
    assert len(seen) == 6
    again = run(config, build(), call=recomputed)
    assert len(seen) == 6
    for a, b in zip(whole, again, strict=True):
        assert (a - b).norm() < 0.1 * b.norm()

    class Adapted(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight = linear, linear.weight

        def forward(self, values):
            assert type(values) is torch.Tensor
            return self.linear(values)

    mlp = build()
    run(config, mlp)
    before = len(seen)
    mlp.linear_fc2 = Adapted(mlp.linear_fc2)
    with get_fp8_context(config), torch.no_grad():
        mlp(torch.randn(64, 1, 256, device="cuda").bfloat16())
    assert len(seen) == before


def test_a_continued_run_computes_the_same(built, monkeypatch):
    """Its first pass too, whose quantizers are new."""
    config, build = built
    seen = calls(monkeypatch)
    first = build()
    run(config, first)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    expected = run(config, first, steps=1)
    second = build()
    second.load_state_dict(state)
    found = run(config, second, steps=1)
    assert len(seen) == 10
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_evaluation_and_what_is_kept(built, monkeypatch):
    """Without gradients the output is the same, and with them as much is kept for the backward pass as Megatron's way keeps."""
    from megatron.core.fp8_utils import get_fp8_context
    from megatron.core.transformer.mlp import MLP

    config, build = built
    seen = calls(monkeypatch)
    mlp = build()
    run(config, mlp)
    inputs = torch.randn(2048, 1, 256, device="cuda").bfloat16()
    with torch.no_grad(), get_fp8_context(config):  # whose end updates scales where there are gradients
        alone = mlp(inputs)[0]
    assert len(seen) == 7
    kept = []
    # the same scales and then, after an update of them, others: two roundings to 4 bits, of SwiGLU's values and of its input
    for way, most in ((MLP.forward, 0.0), (MLP.forward.__wrapped__, 0.1)):
        monkeypatch.setattr(MLP, "forward", way)
        held = torch.cuda.memory_allocated()
        with get_fp8_context(config):
            out = mlp(inputs)[0]
        kept.append(torch.cuda.memory_allocated() - held)
        assert (out - alone).norm() <= most * alone.norm()
        del out
    assert abs(kept[0] - kept[1]) < 2048 * 512 // 4  # SwiGLU's values in FP8 are 2048 x 512
