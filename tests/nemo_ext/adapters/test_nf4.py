"""NF4 linears: bitsandbytes' values for Hugging Face's linears, one product's worth of full weight, and what of it is kept."""

import pytest
import torch

from nemo_ext import platform

platform.activate()

from bitsandbytes import functional as bnb  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.extensions.transformer_engine import (  # noqa: E402
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.transformer import TransformerConfig  # noqa: E402
from torch import nn  # noqa: E402

from nemo_ext.adapters import nf4  # noqa: E402

GROUPS, PER_GROUP, SIZE, HIDDEN = 2, 2, 32, 192


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """A group of this process alone, and Megatron's of it."""
    file = tmp_path_factory.mktemp("group") / "store"
    started = not torch.distributed.is_initialized()
    if started:
        torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    if started:
        torch.distributed.destroy_process_group()


def rounded(weight, double_quant=True):
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    return bnb.dequantize_4bit(packed, state)


def fused(q, k, v):
    """Megatron's order: each group's queries, key and value."""
    parts = [part.unflatten(0, (GROUPS, -1)) for part in (q, k, v)]
    return torch.cat(parts, 1).flatten(0, 1)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_queries_keys_and_values_are_rounded_as_hugging_faces_linears(double_quant, whole, dtype):
    torch.manual_seed(0)
    widths = (GROUPS * PER_GROUP * SIZE, GROUPS * SIZE, GROUPS * SIZE)
    q, k, v = ((torch.randn(width, HIDDEN) * scale).to(dtype) for width, scale in zip(widths, (0.02, 0.1, 1.0), strict=True))
    parts = nf4.Parts(GROUPS, (PER_GROUP, 1, 1), whole)
    ours = nf4.NF4Weight(fused(q, k, v), double_quant, parts).dequantize()
    one = rounded(torch.cat([q, k, v]), double_quant).split(widths)
    expected = fused(*(one if whole else [rounded(part, double_quant) for part in (q, k, v)]))
    assert ours.dtype == dtype and torch.equal(ours, expected)
    if double_quant and not whole:
        assert not torch.equal(ours, fused(*one))  # the distinction is there


@pytest.mark.parametrize("shape", [(128, 192), (64, 88)])
def test_other_shapes_are_rounded_as_they_are(shape):
    weight = torch.randn(shape)
    assert torch.equal(nf4.NF4Weight(weight, True, nf4.Parts()).dequantize(), rounded(weight))


@pytest.mark.parametrize(("double_quant", "each"), [(True, 0.5 + (1 + 4 / 256) / 64), (False, 0.5 + 4 / 64)])
def test_bytes(double_quant, each):
    from launchers.memory import nf4_bytes

    weight = torch.randn(512, 1024)
    measured = nf4.NF4Weight(weight, double_quant, nf4.Parts()).nbytes
    assert measured == pytest.approx(each * weight.numel(), abs=8)
    assert nf4_bytes(double_quant, 1) == each


def test_a_plan_counts_them():
    """The 8B shape has 6,979,321,856 elements in its layers' linears and 1,050,939,392 elsewhere; 24 GiB at sequence 4,096."""
    from launchers.memory import GiB, Request
    from launchers.plan import plan
    from recipes.models import size

    shape = size("llama3", "8b").architecture
    request = Request(1, 1, 24 * GiB, "gpu", seq=4096, global_batch=32, micro_batch=1, trainable=0.005, nf4=True)
    planned = plan(shape, request)
    adapter = 0.005 * shape.num_parameters() * 2
    assert planned.fits
    assert planned.memory.weights == pytest.approx(6_979_321_856 * (0.5 + 260 / 256 / 64) + 2 * 1_050_939_392 + adapter, rel=1e-6)


def layer(dtype=torch.float32):
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=GROUPS * PER_GROUP, num_query_groups=GROUPS, kv_channels=SIZE,
        ffn_hidden_size=256, gated_linear_unit=True, add_bias_linear=False, params_dtype=dtype, normalization="RMSNorm",
    )  # fmt: skip
    options = dict(config=config, init_method=config.init_method, bias=False, skip_bias_add=False, is_expert=False)
    module = nn.Module()
    module.linear_qkv = TELayerNormColumnParallelLinear(HIDDEN, 256, gather_output=False, **options)
    module.linear_fc1 = TEColumnParallelLinear(HIDDEN, 512, gather_output=False, **options)
    module.linear_fc2 = TERowParallelLinear(256, HIDDEN, input_is_parallel=True, **options)
    return module


@pytest.fixture
def pair():
    """The same layer in NF4, and with the dequantized weights as ordinary frozen ones."""
    torch.manual_seed(0)
    plain = layer()
    torch.manual_seed(0)
    with nf4.quantizing(True, random=True):
        quantized = layer()
    for name, module in quantized.named_children():
        weight = plain.get_submodule(name).weight
        assert 0.01 < (module.nf4["weight"].dequantize() - weight).std() / weight.std() < 0.2
        weight.data = module.nf4["weight"].dequantize()
        weight.requires_grad_(False)
    return quantized, plain


def test_a_linear_computes_with_the_dequantized_weight(pair):
    for (name, ours), plain in zip(pair[0].named_children(), pair[1].children(), strict=True):
        assert isinstance(ours, type(plain)) and (ours.in_features, ours.out_features) == (plain.in_features, plain.out_features)
        x = torch.randn(5, 1, plain.in_features)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        results = [module(each)[0] for module, each in zip((ours, plain), inputs, strict=True)]
        assert torch.equal(*results)
        for result in results:
            result.square().sum().backward()
        assert torch.equal(*(each.grad for each in inputs)), name


def test_a_linear_has_no_weight_of_its_own(pair):
    assert not any(name.endswith(".weight") for name in pair[0].state_dict())
    assert [name for name, _ in pair[0].named_parameters()] == ["linear_qkv.layer_norm_weight"]
    assert all("weight" not in vars(module) for module in pair[0].children())


def test_autograd_keeps_no_full_weight():
    """It is made once in a forward pass, not kept, and made once again in the backward pass."""
    with nf4.quantizing(True, random=True):
        module = layer()
    linear, size = module.linear_fc1, 512 * HIDDEN * 4
    x = torch.randn(3, 1, HIDDEN, requires_grad=True)
    made = []
    dequantize = nf4.NF4Weight.dequantize
    nf4.NF4Weight.dequantize = lambda self: made.append(dequantize(self)) or made[-1]
    try:
        out = linear(x)[0]
        assert len(made) == 1
        kept = torch.multiprocessing.reductions.StorageWeakRef(made.pop().untyped_storage())
        assert kept.expired()
        out.sum().backward()
        assert len(made) == 1 and made[0].nbytes == size
    finally:
        nf4.NF4Weight.dequantize = dequantize
    expected = torch.ones(3, 1, 512) @ made[0]
    assert torch.allclose(x.grad, expected, atol=1e-5)


def test_two_that_saved_a_weight_share_it():
    with nf4.quantizing(True, random=True):
        linear = layer().linear_fc1
    made = []
    dequantize = nf4.NF4Weight.dequantize

    class Twice(torch.autograd.Function):
        """Saves the weight twice, and keeps it in its context, as Transformer Engine does."""

        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight, weight)
            ctx.weight = weight
            return x @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            assert ctx.weight.untyped_storage().nbytes() == 0
            one, two = ctx.saved_tensors
            assert one.data_ptr() == two.data_ptr() and torch.equal(one, two)
            return gradient @ one, None

    x = torch.randn(3, HIDDEN, requires_grad=True)
    with linear.dense():
        out = Twice.apply(x, linear.weight)
    nf4.NF4Weight.dequantize = lambda self: made.append(self.shape) or dequantize(self)
    try:
        out.sum().backward()
    finally:
        nf4.NF4Weight.dequantize = dequantize
    assert made == [(512, HIDDEN)]
    assert torch.allclose(x.grad, linear.nf4["weight"].dequantize().sum(0).expand(3, -1), atol=1e-5)


def test_linears_outside_stay(pair):
    with nf4.quantizing(True, random=True):
        holder = nn.Module()
        holder.output_layer = nn.Linear(4, 4)
    assert type(holder.output_layer) is nn.Linear
    assert type(layer().linear_fc1) is TEColumnParallelLinear  # nothing is left behind by the context
