"""FlashAttention-4: which layers, calls and machines it is for, and on a GPU its results against fp32."""

import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from launchers import run
from nemo_ext import platform
from nemo_ext.errors import UserError

platform.activate()

from megatron.core.extensions.transformer_engine import TEDotProductAttention  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

import recipes  # noqa: E402
from nemo_ext import flash_attention  # noqa: E402
from nemo_ext.platform import hardware  # noqa: E402
from nemo_ext.platform.flash_attention import CausalAttention, FlashAttention, holds, use  # noqa: E402

on_hopper = pytest.mark.skipif(flash_attention.missing() is not None, reason=f"this machine {flash_attention.missing()}")
ROOT = Path(__file__).resolve().parents[3]
PINS = (ROOT / "requirements" / "flash_attention.txt").read_text().splitlines()
PINNED = next(line for line in PINS if line.startswith("flash-attn-4=")).split("==")[1]
ENDS = [0, 1, 64, 128, 193, 900, 1024]


def layer(**changes):
    """Transformer Engine's attributes of a causal layer, in a module of Megatron's class."""
    config = SimpleNamespace(context_parallel_size=1, fp8_dot_product_attention=False, fp8_multi_head_attention=False)
    found = dict(attention_type="self", attn_mask_type="causal", qkv_format="sbhd", window_size=(-1, 0), softmax_type="vanilla",
                 return_max_logit=False, attention_dropout=0.0, hidden_size_per_attention_head_k=64,
                 hidden_size_per_attention_head_v=64, config=config)  # fmt: skip
    module = TEDotProductAttention.__new__(TEDotProductAttention)
    torch.nn.Module.__init__(module)
    for name, value in (found | changes).items():
        if hasattr(config, name):
            setattr(config, name, value)
        else:
            setattr(module, name, value)
    return module


OTHERS = [
    dict(attention_type="cross"),
    dict(attn_mask_type="padding"),
    dict(qkv_format="bshd"),
    dict(window_size=(127, 0)),
    dict(softmax_type="learnable"),
    dict(return_max_logit=True),
    dict(attention_dropout=0.1),
    dict(hidden_size_per_attention_head_k=96, hidden_size_per_attention_head_v=96),
    dict(hidden_size_per_attention_head_v=128),
    dict(context_parallel_size=2),
    dict(fp8_dot_product_attention=True),
    dict(fp8_multi_head_attention=True),
]


def test_layers_that_it_fits_are_given_to_it(monkeypatch):
    class Other(TEDotProductAttention):
        pass

    fitting = [layer(), layer(hidden_size_per_attention_head_k=128, hidden_size_per_attention_head_v=128)]
    others = [layer(**changes) for changes in OTHERS]
    derived = layer()
    derived.__class__ = Other
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), *fitting, *others, derived])
    keys = list(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(flash_attention, "missing", lambda: None)
        assert use(model) == len(fitting)
    assert [type(each) for each in fitting] == [FlashAttention] * 2
    assert [type(each) for each in others] == [TEDotProductAttention] * len(OTHERS)
    assert type(derived) is Other
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("changes, wanted", [
    ({}, True),
    (dict(dtype=torch.float16), True),
    (dict(dtype=torch.float32), False),
    (dict(mask=AttnMaskType.padding_causal), False),
    (dict(mask=AttnMaskType.no_mask), False),
    (dict(bias=torch.zeros(1)), False),
    (dict(keys=16), False),  # decoding with a cache
    (dict(packed=PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 8]))), True),
    (dict(packed=PackedSeqParams(qkv_format="thd", cu_seqlens_q_padded=torch.tensor([0, 8]))), False),
    (dict(packed=PackedSeqParams(qkv_format="sbhd")), False),
])  # fmt: skip
def test_calls_that_it_is_for(changes, wanted):
    asked = dict(dtype=torch.bfloat16, mask=AttnMaskType.causal, bias=None, keys=8, packed=None) | changes
    query, key = (torch.zeros(tokens, 1, 4, 64, dtype=asked["dtype"]) for tokens in (8, asked["keys"]))
    assert holds(query, key, asked["mask"], asked["bias"], asked["packed"]) is wanted


def test_other_calls_are_transformer_engines(monkeypatch):
    """With all they came with."""
    seen = []
    monkeypatch.setattr(TEDotProductAttention, "forward", lambda *parts: seen.append(parts))
    module = layer()
    FlashAttention.adopt(module)
    query = torch.zeros(8, 1, 4, 64)
    module(query, query, query, None, attn_mask_type=AttnMaskType.causal, attention_bias="bias", packed_seq_params="packed")
    assert seen == [(module, query, query, query, None, AttnMaskType.causal, "bias", "packed")]


def test_a_model_without_such_layers_is_refused(monkeypatch):
    from nemo_ext.callbacks.kernels import UseKernels

    monkeypatch.setattr(flash_attention, "missing", lambda: None)
    stages = [torch.nn.ModuleList([layer()]), torch.nn.ModuleList([layer(attn_mask_type="padding")])]
    kernels = UseKernels("flash4", "separate")
    kernels.on_fit_start(SimpleNamespace(strategy=SimpleNamespace(megatron_parallel=stages)), None)
    assert [type(*stage) for stage in stages] == [FlashAttention, TEDotProductAttention]
    with pytest.raises(UserError, match="attention=flash4: no layer"):
        kernels.on_fit_start(SimpleNamespace(strategy=SimpleNamespace(megatron_parallel=stages[1:])), None)


@pytest.mark.parametrize("capability, installed, why", [
    (None, PINNED, "has no GPU"),
    ((8, 0), PINNED, "compute capability 8.0, not 9.0"),
    ((10, 0), PINNED, "compute capability 10.0"),
    ((9, 0), None, "has no flash-attn-4, and needs .*: pip install"),
    ((9, 0), "4.1.0", "has flash-attn-4 4.1.0, and needs "),
    ((9, 0), PINNED, None),
])  # fmt: skip
def test_machines(monkeypatch, capability, installed, why):
    monkeypatch.setattr(hardware, "has_cuda", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    def version(package):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    if why is None:
        assert flash_attention.missing() is None
    else:
        with pytest.raises(UserError, match=f"attention=flash4: this machine .*{why}"):
            use(torch.nn.Linear(2, 2))


def recipe(name="pretrain_llama3", **keys):
    return recipes.load(name, **dict(gpu="h100", size="1b", gpus=1, tp=1, pp=1, vp=1, cp=1, recompute="none") | keys)


def test_a_recipe_uses_it_where_asked():
    def kernels(**keys):
        return next(each for each in recipe(**keys).trainer.callbacks if each.__fn_or_cls__.__name__ == "UseKernels")

    assert kernels().attention == "transformer_engine"
    assert kernels(attention="flash4").attention == "flash4"
    assert kernels(name="lora_llama3", attention="flash4", precision="fp8").attention == "flash4"
    names = [each.__fn_or_cls__.__name__ for each in recipe().trainer.callbacks]
    assert names.index("UseKernels") < names.index("Evaluation")  # which may be the first to call the model


@pytest.mark.parametrize("keys, why", [
    (dict(gpu=None, device="cpu", size="smoke"), "for GPUs"),
    (dict(gpu="a100"), "gpu=a100"),
    (dict(gpu="l40"), "gpu=l40"),
    (dict(precision="fp32"), "precision=fp32"),
    (dict(cp=2, gpus=2), "cp=2"),
    (dict(name="pretrain_phi2", size="2.7b"), "not 80"),
    (dict(name="pretrain_gemma3", size="27b"), "window"),
])  # fmt: skip
def test_a_recipe_that_it_is_not_for_is_refused(keys, why):
    with pytest.raises(UserError, match=f"attention=flash4: .*{why}.*attention=transformer_engine"):
        recipe(**{**keys, "attention": "flash4"})


def test_the_command_is_refused_before_anything_starts(tmp_path):
    command = [sys.executable, "launchers/run.py", "recipe=pretrain_llama3", "size=smoke", "device=cpu", "attention=flash4"]
    ended = subprocess.run([*command, f"out={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: attention=flash4: it is for GPUs: attention=transformer_engine\n")
    assert not (tmp_path / "run").exists()


def test_a_plan_is_refused_too(capsys):
    assert run.main(["recipe=pretrain_llama3", "size=1b", "gpus=1", "gpu=l40", "attention=flash4", "plan=true"]) == 2
    assert "gpu=l40 is none: attention=transformer_engine" in capsys.readouterr().err


def inputs(b, heads, of_keys, d, tokens=1024):
    """Queries, keys, values and the output's gradient as Megatron has them, [s, b, heads, d]."""
    draw = torch.Generator("cuda").manual_seed(1)
    sizes = (heads, of_keys, of_keys, heads)
    return [torch.randn(tokens, b, n, d, device="cuda", generator=draw).bfloat16() for n in sizes]


def reference(query, key, value, gradient, dtype, ends=None):
    """(output, gradients of queries, keys and values) of torch's attention with a matrix of scores."""
    leaves = [each.detach().to(dtype).requires_grad_() for each in (query, key, value)]
    outs = []
    for start, end in zip(ends[:-1], ends[1:], strict=True) if ends else [(0, len(query))]:
        parts = [each[start:end].permute(1, 2, 0, 3) for each in leaves]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        outs.append(out.permute(2, 0, 1, 3))
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype))]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", flash_attention.HEADS)
@pytest.mark.parametrize("b, heads, of_keys, packed", [(1, 32, 8, False), (2, 8, 8, False), (3, 8, 1, False), (1, 32, 8, True)])
def test_errors_are_those_of_16_bits(b, heads, of_keys, d, packed):
    parts = inputs(b, heads, of_keys, d)
    ends = torch.tensor(ENDS, dtype=torch.int32, device="cuda") if packed else None
    taken = [each.squeeze(1) if packed else each for each in parts]
    leaves = [each.detach().requires_grad_() for each in taken[:3]]
    out = CausalAttention.apply(*leaves, d**-0.5, ends, False)
    assert out.is_contiguous()
    found = [out.detach(), *torch.autograd.grad(out, leaves, taken[3])]
    lengths = ENDS if packed else None
    for mine, wanted, rounded in zip(
        found, reference(*parts, torch.float32, lengths), reference(*parts, torch.bfloat16, lengths), strict=True
    ):
        error = (mine.view_as(wanted).float() - wanted).norm() / wanted.norm()
        assert error < 2 * (rounded.float() - wanted).norm() / wanted.norm()  # its probabilities are rounded once more: 1.25 seen
        assert error < 1e-2


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("d", flash_attention.HEADS)
@pytest.mark.parametrize("packed", [False, True])
def test_deterministic_gradients_are_equal_bit_for_bit(d, packed):
    parts = inputs(1, 32, 8, d, tokens=4096)
    ends = torch.tensor([0, 1000, 4096], dtype=torch.int32, device="cuda") if packed else None
    taken = [each.squeeze(1) if packed else each for each in parts]
    leaves = [each.requires_grad_() for each in taken[:3]]
    runs = []
    for _ in range(4):
        out = CausalAttention.apply(*leaves, d**-0.5, ends, True)
        runs.append([out.detach(), *torch.autograd.grad(out, leaves, taken[3])])
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(Transformer Engine's layer, the same as FlashAttention-4's), of 16 heads of 64 and 4 of keys, for FP8."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer import TransformerConfig

    store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, te_rng_tracker=True, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=1, hidden_size=1024, num_attention_heads=16, num_query_groups=4, bf16=True, params_dtype=torch.bfloat16,
        attention_dropout=0.0, fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=8, fp8_amax_compute_algo="max",
    )  # fmt: skip
    theirs, ours = (TEDotProductAttention(config, 1, AttnMaskType.causal, "self").cuda() for _ in range(2))
    assert use(torch.nn.ModuleList([ours])) == 1
    yield config, theirs, ours
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def called(module, parts, ends=None):
    packed = None
    if ends is not None:
        most = torch.tensor(max(b - a for a, b in zip(ENDS[:-1], ENDS[1:], strict=True)), device="cuda")
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=most, max_seqlen_kv=most)
    return module(*parts, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("b, packed", [(1, False), (2, False), (1, True)])
def test_megatrons_layer(built, monkeypatch, b, packed, fp8):
    """Output, gradients, what is kept of FP8 and for the backward pass: as Transformer Engine's, which is not called."""
    import contextlib

    from megatron.core.fp8_utils import get_fp8_context

    config, theirs, ours = built
    assert list(ours.state_dict()) == list(theirs.state_dict())
    parts = inputs(b, 16, 4, 64)
    joint = torch.cat(parts[1:3], -1)  # as Megatron's split leaves the values
    parts = [parts[0], parts[1], joint[..., 64:], parts[3]]
    taken = [each.squeeze(1) if packed else each for each in parts]
    ends = torch.tensor(ENDS, dtype=torch.int32, device="cuda") if packed else None
    results = []
    for module in (theirs, ours):
        leaves = [each.detach().requires_grad_() for each in taken[:3]]
        with monkeypatch.context() as patch:
            if module is ours:
                patch.setattr(TEDotProductAttention, "forward", None)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            with get_fp8_context(config) if fp8 else contextlib.nullcontext():
                out = called(module, leaves, ends)
            kept = torch.cuda.memory_allocated() - before
            gradients = torch.autograd.grad(out, leaves, taken[3].flatten(-2))
            with torch.no_grad(), get_fp8_context(config) if fp8 else contextlib.nullcontext():
                assert torch.equal(called(module, leaves, ends), out)
        results.append((kept, [out.detach(), *gradients], module.get_extra_state()))
    (their_memory, wanted, their_state), (memory, found, state) = results
    assert memory < 1.05 * their_memory + 2**20
    scales, their_scales = (pickle.loads(each.cpu().numpy().tobytes()) if fp8 else {} for each in (state, their_state))
    names = [name for name in their_scales if "scale" in name or "amax" in name]  # beside them stands a layer's own number
    assert len(names) == (4 if fp8 else 0) and all(torch.equal(scales[name], their_scales[name]) for name in names)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.shape == other.shape
        assert (mine.float() - other.float()).norm() < 1e-2 * other.float().norm()


@pytest.mark.gpu
@on_hopper
def test_a_graph_holds_it(built):
    """Captured and replayed, with new inputs; nothing of it waits for the GPU."""
    _, _, ours = built
    *taken, gradient = inputs(2, 16, 4, 64)
    leaves = [each.requires_grad_() for each in taken]

    def step():
        out = called(ours, leaves)
        return out, *torch.autograd.grad(out, leaves, gradient.flatten(-2))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    with torch.no_grad():
        for each in leaves:
            each.copy_(each.flip(0))
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        wanted = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(held[0], wanted[0])
    for mine, other in zip(held[1:], wanted[1:], strict=True):
        assert (mine.float() - other.float()).norm() < 1e-3 * other.float().norm()
