"""The output layer fused with its loss: on a CPU against Megatron's, with kernels in plain PyTorch; on a GPU itself."""

import sys
from types import SimpleNamespace

import output_layer_worker as worker
import pytest
import torch
import torch.nn.functional as F
from nemo_processes import run_group

import recipes
from nemo_ext import chunks
from nemo_ext.errors import UserError
from nemo_ext.platform import hardware, output_layer

on_gpu = pytest.mark.skipif(not hardware.has_cuda(), reason="needs a CUDA GPU")


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(output_layer, "_kernels", lambda: worker.Plain)
    monkeypatch.setattr(output_layer.gpu_megatron, "add_weight_gradient", worker.add_weight_gradient)


def alone(**changes):
    """A ColumnParallelLinear of one process, as far as it is asked."""
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    fields = dict(tp_group=group, sequence_parallel=False, allreduce_dgrad=False, gradient_accumulation_fusion=True) | changes
    return SimpleNamespace(**fields)


def drawn(tokens=300, vocabulary=500, hidden=48, device="cpu", dtype=torch.float32):
    """Hidden states [s, b, h], weight, labels [b, s], of which one is ignored, and gradients of the losses [b, s], some zero."""
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(tokens // 2, 2, hidden, generator=draw)
    w = torch.randn(vocabulary, hidden, generator=draw) * hidden**-0.5 * 3
    labels = torch.randint(vocabulary, (2, tokens // 2), generator=draw)
    labels[1, 4] = -100
    g = torch.rand(2, tokens // 2, generator=draw)
    g[0, ::5] = 0.0
    return x.to(device, dtype), w.to(device, dtype), labels.to(device), g.to(device)


def by_autograd(x, w, labels, g):
    x, w = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    losses = F.cross_entropy((x @ w.t()).permute(1, 2, 0), labels, reduction="none")
    losses.backward(g)
    return losses.detach(), x.grad, w.grad


@pytest.mark.parametrize("chunk", [2**28, 128 * 500, 1], ids=["whole", "three", "least"])
@pytest.mark.parametrize("kind", ["added", "returned", "frozen"])
def test_losses_and_gradients_are_those_of_autograd(plain, monkeypatch, chunk, kind):
    monkeypatch.setattr(chunks, "LOGITS", chunk)
    x, w, labels, g = drawn()
    losses, x_gradient, w_gradient = by_autograd(x, w, labels, g)
    x.requires_grad_()
    w.requires_grad_(kind != "frozen")
    if kind == "added":
        w.main_grad = torch.ones_like(w)
    found = output_layer.OutputLoss.apply(x, w, labels, alone(), True)
    found.backward(g)
    torch.testing.assert_close(found, losses)
    torch.testing.assert_close(x.grad, x_gradient)
    if kind == "added":
        torch.testing.assert_close(w.main_grad - 1, w_gradient, rtol=1e-4, atol=1e-5)
    if kind == "returned":
        torch.testing.assert_close(w.grad, w_gradient)
    assert kind == "returned" or w.grad is None
    assert torch.equal(output_layer.OutputLoss.apply(x.detach(), w.detach(), labels, alone(), False), found)


class Quantized:
    """Transformer Engine's FP8 tensor: values by rows, by columns or both, and what they are multiplied with."""

    DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

    def __init__(self, data, data_transpose, fp8_scale_inv, fp8_dtype):
        self.data, self.transposed, self.inverse, self.dtype = data, data_transpose, fp8_scale_inv, self.DTYPES[fp8_dtype]

    @classmethod
    def quantizer(cls, dtype, device):
        def quantize(values):
            inverse = values.abs().max().float() / torch.finfo(cls.DTYPES[dtype]).max
            bits = (values.float() / inverse).to(cls.DTYPES[dtype])
            return cls(bits.view(torch.uint8), bits.t().contiguous().view(torch.uint8), inverse, dtype)

        return quantize

    def update_usage(self, rowwise_usage, columnwise_usage):
        self.data = self.data if rowwise_usage else None
        self.transposed = self.transposed if columnwise_usage else None

    def values(self, by_columns):
        bits = self.transposed if by_columns else self.data
        assert bits.is_contiguous() and bits.shape[1] % 16 == 0  # what cuBLAS asks
        found = bits.view(self.dtype).float() * self.inverse
        return found.t() if by_columns else found


def general_gemm(a, b, out_dtype, layout, grad, use_split_accumulator, out=None, accumulate=False):
    """Transformer Engine's, on Hopper: an operand that is summed over its rows is taken from what it has by columns."""
    a, b = a.values(layout[0] == "N"), b.values(layout[1] == "T")
    found = b @ a if layout == "NN" else b.t() @ a
    found = (found + out if accumulate else found).to(out_dtype)
    return (found if out is None else out.copy_(found),)


@pytest.mark.parametrize("chunk", [2**28, 128 * 512], ids=["whole", "three"])
@pytest.mark.parametrize("kind", ["added", "returned", "frozen"])
def test_fp8_gradients(plain, monkeypatch, chunk, kind):
    """With Transformer Engine's tensors and products by their definitions; e5m2 has 2 bits after the first, e4m3 has 3."""
    names = SimpleNamespace(kFloat8E4M3="e4m3", kFloat8E5M2="e5m2")
    te = "transformer_engine.pytorch"
    for name, module in {
        "transformer_engine_torch": dict(DType=names),
        f"{te}.cpp_extensions": dict(general_gemm=general_gemm),
        f"{te}.tensor.float8_tensor": dict(Float8CurrentScalingQuantizer=Quantized.quantizer),
        f"{te}.tensor.storage.float8_tensor_storage": dict(Float8TensorStorage=Quantized),
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**module))
    monkeypatch.setattr(chunks, "LOGITS", chunk)
    x, w, labels, g = drawn(tokens=288, vocabulary=512)
    losses, x_gradient, w_gradient = by_autograd(x, w, labels, g)
    x.requires_grad_()
    w.requires_grad_(kind != "frozen")
    if kind == "added":
        w.main_grad = torch.ones_like(w)
    layer = alone(fp8_weight=None, is_first_microbatch=True)
    found = output_layer.OutputLoss.apply(x, w, labels, layer, True)
    found.backward(g)
    torch.testing.assert_close(found, losses)  # of logits that are not in FP8
    assert 0.01 < (x.grad - x_gradient).norm() / x_gradient.norm() < 0.06
    if kind != "frozen":
        mine = w.grad if kind == "returned" else w.main_grad - 1
        assert 0.01 < (mine - w_gradient).norm() / w_gradient.norm() < 0.06
    assert not layer.is_first_microbatch and layer.fp8_weight.data is None
    assert torch.equal(output_layer.OutputLoss.apply(x.detach(), w.detach(), labels, layer, False), found)


def test_no_chunk_has_more_logits_than_said():
    assert chunks.chunk_tokens(128_256) == 2_048  # 525 MB in bf16
    assert chunks.chunk_tokens(64_128) == 4_096
    assert chunks.chunk_tokens(10**9) == 128


def test_what_the_hook_of_a_weight_is_given(monkeypatch):
    given = []
    base = SimpleNamespace(get_dummy_wgrad=lambda shape, dtype, zero: given.append((shape, dtype, zero)) or "placeholder")
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", base)
    weight, main_grad = torch.nn.Parameter(torch.zeros(3, 2).bfloat16()), torch.zeros(3, 2)
    assert output_layer._placeholder(weight, main_grad) is None and weight.main_grad is main_grad and not given
    weight.grad_added_to_main_grad = False
    assert output_layer._placeholder(weight, main_grad) == "placeholder" and weight.grad_added_to_main_grad
    weight.zero_out_wgrad = True
    output_layer._placeholder(weight, main_grad)
    assert given == [([3, 2], torch.bfloat16, False), ([3, 2], torch.bfloat16, True)]


def test_the_weight_is_quantized_once_a_step(monkeypatch):
    made = []
    monkeypatch.setattr(output_layer, "_quantized", lambda values: made.append(values) or len(made))
    layer = SimpleNamespace(fp8_weight=None, is_first_microbatch=True)
    assert [output_layer._quantized_weight(layer, "weight") for _ in range(3)] == [1, 1, 1]
    layer.is_first_microbatch = True  # Megatron, at the next step
    assert [output_layer._quantized_weight(layer, "new") for _ in range(2)] == [2, 2]
    assert made == ["weight", "new"]


def test_it_is_refused_where_it_has_no_meaning():
    gpu = dict(device="gpu", gpus=1)
    for name, keys, message in (
        ("pretrain_llama3", dict(gpu, output_layer="fp8"),
         "output_layer=fp8 is for GPUs with precision=fp8, not for precision=bf16"),
        ("pretrain_llama3", dict(gpu, output_layer="fused", precision="fp16"),
         "output_layer=fused is for GPUs with precision=bf16 or fp8, not for precision=fp16"),
        ("pretrain_llama3", dict(device="cpu", output_layer="fused", precision="bf16"),
         "output_layer=fused is for GPUs with precision=bf16 or fp8, not for a CPU"),
        ("pretrain_gemma2", dict(gpu, output_layer="fused"), "output_layer=fused: gemma2's has soft caps: output_layer=separate"),
        ("pretrain_phi2", dict(gpu, output_layer="fused"), "output_layer=fused: phi's has a bias: output_layer=separate"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            recipes.resolve(name, keys, cuda=False)
        assert str(caught.value) == message


def test_a_recipe_marks_the_layer():
    given = dict(size="1b", device="gpu", gpus=1, precision="fp8")
    asked = {each: recipes.load("pretrain_llama3", **given, output_layer=each) for each in ("separate", "fused", "fp8")}
    for each, recipe in asked.items():
        (kernels,) = (callback for callback in recipe.trainer.callbacks if callback.__fn_or_cls__.__name__ == "UseKernels")
        assert kernels.output_layer == each


def test_the_layer_is_marked_before_training(monkeypatch):
    from nemo_ext.callbacks.kernels import UseKernels

    seen = []
    monkeypatch.setattr(output_layer, "use", lambda stage, fp8: seen.append((stage, fp8)))
    trainer = SimpleNamespace(strategy=SimpleNamespace(megatron_parallel=["first", "last"]))
    for way in ("separate", "fused", "fp8"):
        UseKernels("transformer_engine", way).on_fit_start(trainer, None)
    assert seen == [("first", False), ("last", False), ("first", True), ("last", True)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """{layout: what each of two processes found}."""
    folder = tmp_path_factory.mktemp("output_layer")
    run_group(2, worker.main, folder, log=folder / "log")
    return {name: [torch.load(folder / f"{name}-rank{rank}.pt") for rank in range(2)] for name in worker.LAYOUTS}


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="the CPU platform is not installed where CUDA is")
@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_a_megatron_model_computes_the_same(both, layout):
    for upstream, fused, added, refused in both[layout]:
        assert upstream["gradients"].keys() == fused["gradients"].keys() != set()
        for found in (fused, added):
            torch.testing.assert_close(found["losses"], upstream["losses"])
            for name, gradient in upstream["gradients"].items():
                torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)
            assert found["pre-hooks"] == [1]  # DDP's, which wait for a weight that is being gathered
        assert refused == ["soft caps", "a bias", "a loss of its own", "another loss"]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("fp8", "largest"), [(False, 0.015), (True, 0.07)], ids=["bf16", "fp8"])
@pytest.mark.parametrize("chunk", [2**28, 256 * 4096])
def test_on_a_gpu(monkeypatch, fp8, largest, chunk):
    """Relative errors of the gradients against fp32, in the norm; bf16 and FP8 round to 8 and 3 or 4 bits."""
    monkeypatch.setattr(chunks, "LOGITS", chunk)
    x, w, labels, g = drawn(1024, 4096, 512, "cuda", torch.bfloat16)
    losses, x_gradient, w_gradient = by_autograd(x, w, labels, g)
    x.requires_grad_()
    w.requires_grad_()
    w.main_grad, w.grad_added_to_main_grad = torch.ones(w.shape, device="cuda"), False
    layer = alone(**(dict(fp8_weight=None, is_first_microbatch=True) if fp8 else {}))
    found = output_layer.OutputLoss.apply(x, w, labels, layer, True)
    found.backward(g)
    for mine, wanted in ((x.grad, x_gradient), (w.main_grad - 1, w_gradient)):
        assert (mine - wanted).norm() < largest * wanted.norm()
    assert (found - losses).abs().max() < 0.1 and (found - losses).mean().abs() < 0.005 and found[1, 4] == 0
    assert w.grad_added_to_main_grad
    frozen = x.detach().clone().requires_grad_()
    output_layer.OutputLoss.apply(frozen, w.detach(), labels, layer, True).backward(g)
    assert (frozen.grad - x.grad).norm() < 1e-3 * x.grad.norm()


@pytest.mark.gpu
@on_gpu
def test_kernels_are_the_definitions():
    from nemo_ext.platform import output_kernels

    draw = torch.Generator("cuda").manual_seed(3)
    logits = 4 * torch.randn(300, 5000, device="cuda", generator=draw).bfloat16()
    labels = torch.randint(15_000, (300,), device="cuda", generator=draw)  # of three ranks, of which this is the second
    labels[2] = -100
    log_sums, first = logits.double().logsumexp(-1), 5000
    wanted = logits.double().softmax(-1) - (labels[:, None] - first == torch.arange(5000, device="cuda")).double()
    wanted[2] = 0
    found = torch.empty(2, 300, device="cuda")
    in_place = logits.clone()
    output_kernels.statistics(in_place, labels, first, found, gradient=True)
    torch.testing.assert_close(found[0].double(), log_sums, rtol=0, atol=2e-5)
    inside = (labels >= first) & (labels < 2 * first)
    assert torch.equal(found[1, inside], logits[inside, labels[inside] - first].float()) and found[1, ~inside].isneginf().all()
    torch.testing.assert_close(in_place.double(), wanted, rtol=0.005, atol=1e-7)
    rows = torch.empty(300, 5000, dtype=torch.float8_e5m2, device="cuda")
    columns = torch.zeros(5000, 1024, dtype=torch.float8_e5m2, device="cuda")
    output_kernels.gradient(logits, labels, first, found[0], rows, columns[:, 128:428], output_layer.SCALE)
    bits, rounded = (each.view(torch.uint8).int() for each in (rows, (output_layer.SCALE * wanted).float().to(torch.float8_e5m2)))
    assert (bits - rounded).abs().max() <= 1 and (bits != rounded).float().mean() < 1e-3  # where two lie equally near
    assert torch.equal(columns[:, 128:428].t().contiguous().view(torch.uint8), rows.view(torch.uint8))
    assert not columns[:, :128].view(torch.uint8).any() and not columns[:, 428:].view(torch.uint8).any()
