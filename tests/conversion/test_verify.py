"""Logits compared: by hand on small tensors, and what is wrong in a checkpoint is named exactly."""

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_nemo, verify
from conversion.compare import activations
from conversion.compare.activations import Activation
from nemo_ext.errors import UserError

LAYER = "model.layers.2."


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(Hugging Face folder, NeMo folder) of a tiny model by its name, made once."""
    made = {}

    def get(name: str, **options) -> tuple[Path, Path]:
        if (key := (name, *options.items())) not in made:
            folder = tmp_path_factory.mktemp(name)
            hf = tiny_models.save(name, folder / "hf")
            made[key] = hf, hf_to_nemo.convert(hf, folder / "nemo", **options)
        return made[key]

    return get


def changed(hf: Path, folder: Path, edit=None, **config) -> Path:
    """A copy of a Hugging Face folder with other weights or another configuration."""
    shutil.copytree(hf, folder)
    if edit:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def swap_gate_and_up(w):
    gate, up = f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"
    w[gate], w[up] = w[up], w[gate]


def interleave_query_rows(w):
    """Rotary pairs as (2j, 2j+1), as Meta's and llama.cpp's checkpoints have them."""
    name = f"{LAYER}self_attn.q_proj.weight"
    w[name] = w[name].view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)


def ungrouped_keys(w):
    """The two groups' keys the other way round."""
    name = f"{LAYER}self_attn.k_proj.weight"
    w[name] = w[name].roll(16, 0)


def shift_embedding(w):
    """Each token has its neighbour's vector."""
    w["model.embed_tokens.weight"] = w["model.embed_tokens.weight"].roll(1, 0)


def nudge(name: str, by: float = 0.05):
    def edit(w):
        w[name].view(-1)[7] += by

    return edit


def test_compare_by_hand():
    reference = torch.tensor([[0.0, math.log(3.0)], [1.0, 0.0]])
    found = activations.compare(reference, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert found.max_abs == pytest.approx(math.log(3.0)) and found.mean_abs == pytest.approx(math.log(3.0) / 4)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)  # (1/4, 3/4) against (1/2, 1/2)
    assert found.kl_max == pytest.approx(kl) and found.kl_mean == pytest.approx(kl / 2)
    assert found.top1_agreement == 0.5 and found.largest_logit == pytest.approx(math.log(3.0))


def test_compare_over_more_positions_than_a_chunk():
    generator = torch.Generator().manual_seed(0)
    reference, other = torch.randn(2, 101, 7, generator=generator, dtype=torch.float64).float()
    found = activations.compare(reference, other)
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    assert found.kl_mean == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    assert found.mean_abs == pytest.approx((reference - other).abs().mean().item())
    assert found.top1_agreement == pytest.approx((reference.argmax(-1) == other.argmax(-1)).float().mean().item())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails(bad):
    other = torch.zeros(3, 5)
    other[1, 2] = bad
    found = activations.compare(torch.ones(3, 5), other)
    assert not verify.PromptResult("", 3, found, allowed=1e9).passed


def test_first_difference_by_hand():
    def trace(*values):
        return {f"layers.{i}": Activation("m", torch.tensor([[1.0, 0.0], [0.0, v]])) for i, v in enumerate(values)}

    reference = trace(1, 1, 1, 1)
    assert activations.first_difference(reference, trace(1, 1 + 1e-7, 1 + 1e-7, 1 + 2e-7)) is None
    assert activations.first_difference(reference, trace(1, 1 + 1e-7, 1.01, 1.5))[0] == "layers.2"
    assert activations.first_difference(reference, trace(1, 1 + 1e-6, 1.000012, 1.3))[0] == "layers.2"
    assert activations.first_difference(reference, trace(1, 1, math.nan, math.nan))[0] == "layers.2"
    slow = [1 + 3e-6, 1 + 8e-6, 1 + 2e-5, 1.1]  # rounding of many layers before the mistake
    assert activations.first_difference(reference, trace(*slow))[0] == "layers.3"


@pytest.mark.parametrize(
    "edit, module, tensors",
    [
        (shift_embedding, "model.embed_tokens", ["model.embed_tokens.weight"]),
        (nudge(f"{LAYER}input_layernorm.weight"), f"{LAYER}self_attn", [f"{LAYER}input_layernorm.weight"]),
        (interleave_query_rows, f"{LAYER}self_attn", [f"{LAYER}self_attn.q_proj.weight"]),
        (ungrouped_keys, f"{LAYER}self_attn", [f"{LAYER}self_attn.k_proj.weight"]),
        (nudge(f"{LAYER}self_attn.o_proj.weight"), f"{LAYER}self_attn", [f"{LAYER}self_attn.o_proj.weight"]),
        (nudge(f"{LAYER}post_attention_layernorm.weight"), f"{LAYER}mlp", [f"{LAYER}post_attention_layernorm.weight"]),
        (swap_gate_and_up, f"{LAYER}mlp", [f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"]),
        (nudge(f"{LAYER}mlp.down_proj.weight"), f"{LAYER}mlp", [f"{LAYER}mlp.down_proj.weight"]),
        (nudge("model.norm.weight"), "model.norm", ["model.norm.weight"]),
        (nudge("lm_head.weight"), "lm_head", ["lm_head.weight"]),
    ],
)
def test_a_wrong_tensor_is_named(converted, tmp_path, edit, module, tensors):
    hf, nemo = converted("llama")
    report = verify.check(changed(hf, tmp_path / "hf", edit), nemo)
    assert not report.passed and report.first_difference["a"] == module
    assert [entry["name"] for entry in report.first_difference["tensors"]] == tensors
    assert module in report.failure and tensors[0] in report.failure and "\n" not in report.failure


@pytest.mark.parametrize(
    "name, wrong, field",
    [
        ("llama", {"rope_theta": 20_000.0}, "rotary_base"),
        ("llama_tied_scaled", {"rope_scaling": None}, "rope_scaling"),
        ("gemma3_text", {"sliding_window": 13}, "sliding_window"),
        ("llama", {"rms_norm_eps": 1e-2}, "layernorm_epsilon"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_configuration_is_named(converted, tmp_path, name, wrong, field, dtype):
    hf, nemo = converted(name)
    report = verify.check(changed(hf, tmp_path / "hf", **wrong), nemo, dtype=dtype)
    assert not report.passed and report.first_difference["a"] == "model.layers.0.self_attn"
    assert report.first_difference["b"] == "decoder.layers.0.self_attention"
    assert list(report.first_difference["configuration"]) == [field] and report.first_difference["tensors"] == []


@pytest.mark.parametrize("name", ["llama", "llama_tied_scaled", "gemma3_text"])
def test_bf16_accepts_a_right_conversion(converted, name):
    report = verify.check(*converted(name), dtype="bfloat16")
    assert report.passed, report.failure
    for prompt in report.prompts:
        assert 1e-3 < prompt.own.max_abs < 1 and 1e-3 < prompt.difference.max_abs  # both really ran in bf16


def test_bf16_refuses_a_swapped_gate(converted, tmp_path):
    hf, nemo = converted("llama")
    report = verify.check(changed(hf, tmp_path / "hf", swap_gate_and_up), nemo, dtype="bfloat16")
    assert not report.passed and report.first_difference["a"] == f"{LAYER}mlp"


def test_weights_stored_in_another_dtype_are_rounded_before_fp32_is_compared(converted):
    report = verify.check(*converted("llama", dtype="bfloat16"), tensors=True)
    assert report.passed and report.prompts[0].allowed == 1e-4 and report.tensors.rounded == 39
    assert any("one side stores bfloat16" in note for note in report.notes)


def test_two_folders_of_one_format(converted, tmp_path):
    hf, nemo = converted("llama")
    other = changed(hf, tmp_path / "hf", nudge(f"{LAYER}mlp.down_proj.weight"))
    assert verify.check(hf, hf).prompts[0].difference.max_abs == 0
    report = verify.check(hf, other)
    assert not report.passed and report.first_difference["b"] == f"{LAYER}mlp"
    assert verify.check(nemo, nemo).prompts[0].difference.max_abs == 0
    report = verify.check(nemo, hf_to_nemo.convert(other, tmp_path / "nemo"))
    assert not report.passed and report.first_difference["a"] == "decoder.layers.2.mlp"
    assert verify.check(nemo, hf).passed


def test_too_little_memory_is_said_before_loading(converted, monkeypatch):
    from nemo_ext.platform import hardware

    monkeypatch.setattr(hardware, "free_memory", lambda: 10_000_000)
    with pytest.raises(UserError, match=r"in float32 needs about 1\.\d GB of memory and 0\.0 GB are free: verify=false"):
        verify.check(*converted("llama"))


def test_not_checkpoints(converted, tmp_path):
    hf, _ = converted("llama")
    with pytest.raises(UserError, match="no weights/metadata.json"):
        verify.check(hf, tmp_path)
    with pytest.raises(UserError, match="there is no such"):
        verify.check(hf, tmp_path / "nothing")
    with pytest.raises(UserError, match="onnx: is none of hf:, nemo:, gguf:"):
        verify.check(f"onnx:{hf}", hf)
    with pytest.raises(UserError, match="float8 is not one of"):
        verify.check(hf, hf, dtype="float8")
