"""What is written is what was measured: read back by the format's rules, by transformers, and beside ModelOpt's own export."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

from quantized_models import load, logits, quantized

from conversion import quantize, safetensors_io
from conversion.quantization import arithmetic, calibrate, compressed_tensors, modelopt_folder, reader, verify
from nemo_ext.errors import RunError, UserError

CASES = [
    ("fp8", compressed_tensors, {}), ("fp8", compressed_tensors, {"kv": "fp8"}), ("int8_sq", compressed_tensors, {}),
    ("int4_awq", compressed_tensors, {"kv": "fp8"}), ("int4_gptq", compressed_tensors, {"group": 32}),
    ("nvfp4", compressed_tensors, {}), ("int4_awq", compressed_tensors, {"mixed": True}),
    ("fp8", modelopt_folder, {"kv": "fp8"}), ("int4_awq", modelopt_folder, {}), ("w4a8_awq", modelopt_folder, {}),
    ("nvfp4", modelopt_folder, {}), ("int4_gptq", modelopt_folder, {"mixed": True}),
]  # fmt: skip


@pytest.mark.parametrize("method, writer, options", CASES, ids=[f"{m}-{w.__name__.split('.')[-1]}-{o}" for m, w, o in CASES])
def test_reader_gives_the_measured_logits(llama, ids, tmp_path, method, writer, options):
    made = quantized(llama, method, ids, **options)
    measured = logits(made.model, ids)
    writer.write(tmp_path, made)
    found, model = reader.load(tmp_path)
    read = reader.logits(model, ids)
    torch.testing.assert_close(read, measured, rtol=0, atol=2e-5 * float(measured.abs().max()))
    verify.weights(made, model)
    again, worst = verify.outputs(made, found, model, ids, 1e-5)
    assert torch.equal(again, measured) and worst < 1e-5
    lost = (measured - logits(load(llama), ids)).abs().mean()
    assert lost > 100 * (read - measured).abs().mean()  # the comparison would see a layer that is not quantized
    assert lost < 0.5 * measured.std()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and (tmp_path / "tokenizer.json").is_file()


def test_a_changed_scale_is_seen(llama, ids, tmp_path):
    made = quantized(llama, "int8_sq", ids)
    compressed_tensors.write(tmp_path, made)
    assert "differ by at most" in quantize.check(tmp_path, made, ids[:2])
    info = safetensors_io.open_folder(tmp_path)["model.layers.1.mlp.up_proj.weight_scale"]
    info.write(info.read() * 1.02)
    with pytest.raises(RunError, match="model.layers.1.mlp.up_proj.weight is not what was measured"):
        quantize.check(tmp_path, made, ids[:2])


FAULTS = {
    "an input's scale": lambda found: found.inputs.update({QUERY: reader.to_fp8(np.float32([0.011]))}),
    "inputs of two layers": lambda found: found.inputs.update({QUERY: found.inputs[OUT], OUT: found.inputs[QUERY]}),
    "an input as it is": lambda found: found.inputs.pop(QUERY),
    "keys as they are": lambda found: found.kv.update({ATTENTION: (lambda x: x, found.kv[ATTENTION][1])}),
    "no cache": lambda found: found.kv.pop(ATTENTION),
    "weights of two layers": lambda found: found.weights.update(
        {f"{QUERY}.weight": found.weights[f"{OUT}.weight"], f"{OUT}.weight": found.weights[f"{QUERY}.weight"]}
    ),
    "a norm": lambda found: found.weights["model.norm.weight"].mul_(1 + 2**-7),
    "a bias": lambda found: found.weights[f"{QUERY}.bias"].add_(2**-7),
}
ATTENTION = "model.layers.1.self_attn"
QUERY, OUT = f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj"


@pytest.fixture(scope="module")
def written(llama, ids, tmp_path_factory):
    made = quantized(llama, "fp8", ids, kv="fp8")
    modelopt_folder.write(folder := tmp_path_factory.mktemp("written"), made)
    return made, folder


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_seen_module_by_module(written, ids, fault):
    """Without the logits, which say little on a GPU."""
    made, folder = written
    found = reader.read(folder)
    FAULTS[fault](found)
    model = reader.build(json.loads((folder / "config.json").read_text()), found)
    with pytest.raises(RunError, match="read back by the format's rules"):
        verify.weights(made, model)
        verify.outputs(made, found, model, ids[:2], quantize.AGREEMENT["float32"])
    assert not any(module._forward_hooks for module in made.model.modules())


def test_modules_agree_where_logits_do_not(written, ids):
    """With noise of 1e-5 in the embedding, as two layers need it to carry inputs to other codes; `weights` would see it."""
    made, folder = written
    found = reader.read(folder)
    embedding = found.weights["model.embed_tokens.weight"]
    embedding *= 1 + 1e-5 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    model = reader.build(json.loads((folder / "config.json").read_text()), found)
    measured, worst = verify.outputs(made, found, model, ids, quantize.AGREEMENT["float32"])
    assert worst > 0
    assert (reader.logits(model, ids) - measured).abs().max() > quantize.AGREEMENT["float32"] * measured.abs().max()


class DividesAsAGpu(TorchDispatchMode):
    """torch on a GPU: what a number divides is multiplied by the number's rounded reciprocal."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.div.Tensor and isinstance(args[1], (int, float)) and args[0].is_floating_point():
            return args[0] * (1 / torch.tensor(float(args[1])))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["fp8", "int8_sq", "nvfp4"])
def test_inputs_are_rounded_the_same_on_a_gpu(method):
    """On the boundaries between codes, where the last bit of a quotient decides."""
    codes = torch.arange(-120, 120) + 0.5
    with DividesAsAGpu():
        assert float(torch.tensor([169.0]) / 13.0) != 13.0  # torch's own example of it
        for scale in torch.linspace(0.01, 0.1, 200).bfloat16().float():
            x = (codes * scale)[None]
            if method == "nvfp4":
                x = torch.cat([6 * scale * torch.arange(17, 33, 2)[:, None], torch.full((8, 15), 11 * scale)], 1)
                ours, theirs = arithmetic.fake_nvfp4(x, 16, scale * 2688), reader.to_nvfp4(scale.numpy())(x)
            elif method == "fp8":
                ours, theirs = arithmetic.fake_fp8(x, scale * 448), reader.to_fp8(scale.numpy())(x)
            else:
                ours, theirs = arithmetic.fake_int(x, scale * 127), reader.to_int8(scale.numpy())(x)
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["fp8", "int8_sq", "nvfp4", "int4_gptq", "w4a8_awq"])
def test_an_artifact_is_the_same_bits_on_a_gpu(llama, ids, tmp_path, method):
    with DividesAsAGpu():
        made = quantized(llama, method, ids)
        (modelopt_folder if method == "w4a8_awq" else compressed_tensors).write(tmp_path, made)
        _, model = reader.load(tmp_path)
        assert torch.equal(reader.logits(model, ids), logits(made.model, ids))


def test_nvfp4s_scale_survives_its_reciprocal():
    """compressed-tensors stores that, and the reader takes the reciprocal again."""
    changed = 0
    for amax in torch.rand(200, generator=torch.Generator().manual_seed(0)) * 50 + 0.1:
        quantizer = SimpleNamespace(amax=amax)
        calibrate._make_invertible(quantizer)
        scale = (quantizer.amax / 2688).numpy()
        assert np.float32(1) / (np.float32(1) / scale) == scale and 0 <= quantizer.amax - amax < 1e-5 * amax
        changed += bool(quantizer.amax != amax)
    assert 5 < changed < 100


@pytest.mark.parametrize("method, options", [("fp8", {}), ("int8_sq", {}), ("int4_gptq", {}), ("int4_awq", {"mixed": True})])
def test_transformers_loads_compressed_tensors(llama, ids, tmp_path, method, options):
    pytest.importorskip("compressed_tensors")
    import transformers as tf

    made = quantized(llama, method, ids, **options)
    compressed_tensors.write(tmp_path, made)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    measured = logits(made.model, ids)
    torch.testing.assert_close(logits(loaded, ids), measured, rtol=0, atol=2e-5 * float(measured.abs().max()))


@pytest.mark.parametrize("method", ["fp8", "int4_gptq"])
def test_modelopt_exports_the_same_tensors(llama, ids, tmp_path, method):
    from modelopt.torch.export import export_hf_checkpoint

    made = quantized(llama, method, ids)
    (tmp_path / "ours").mkdir()
    modelopt_folder.write(tmp_path / "ours", made)
    if method == "int4_gptq":  # without AWQ's scales ModelOpt does not export what it would label W4A16_AWQ
        for name in made.plan:
            linear = made.model.get_submodule(name)
            linear.input_quantizer.pre_quant_scale = torch.ones(linear.in_features)
    # in bfloat16 ModelOpt divides by the scale in bfloat16 too, and takes the codes of what is then rounded twice
    export_hf_checkpoint(made.model, dtype=torch.float32, export_dir=tmp_path / "theirs")
    ours, theirs = (safetensors_io.open_folder(tmp_path / name) for name in ("ours", "theirs"))
    norms = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # ModelOpt folds the scales of their inputs, here ones
    extra = {name for name in ours if name.endswith("pre_quant_scale") and name.split(".")[-2] in norms}
    assert set(ours) - extra == set(theirs) and bool(extra) == (method == "int4_gptq")
    for name in theirs:
        if name.removesuffix(".weight") in made.plan:
            assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name].read().float(), theirs[name].read().float()), name
    ours, theirs = (json.loads((tmp_path / each / "hf_quant_config.json").read_text()) for each in ("ours", "theirs"))
    ours, theirs = ours["quantization"], theirs["quantization"]
    assert ours["quant_algo"] == theirs["quant_algo"] == {"fp8": "FP8", "int4_gptq": "W4A16_AWQ"}[method]
    assert ours.get("group_size") == theirs.get("group_size") and ours["exclude_modules"] == ["lm_head"]


def test_formats_without_a_layout_are_refused(llama, ids, tmp_path):
    with pytest.raises(UserError, match="compressed-tensors has no w4a8"):
        compressed_tensors.write(tmp_path, quantized(llama, "w4a8_awq", ids))
    with pytest.raises(UserError, match="no runtime loads int8"):
        modelopt_folder.write(tmp_path, quantized(llama, "int8_sq", ids))


def test_reader_numbers():
    """Every E4M3 byte against torch's, rounding against torch's cast, every E2M1 code against the standard's table."""
    codes = torch.arange(256, dtype=torch.uint8)
    ours = torch.from_numpy(reader.decode_e4m3(codes.numpy()))
    assert torch.equal(ours.nan_to_num(1e9), codes.view(torch.float8_e4m3fn).float().nan_to_num(1e9))
    x = torch.cat([torch.randn(20000) * 10 ** torch.linspace(-4, 3, 20000), (ours[:-1] + ours[1:]).nan_to_num(0) / 2])
    x = x.clamp(-448, 448)
    assert torch.equal(reader.e4m3(x), x.to(torch.float8_e4m3fn).float())
    assert reader.e4m3(torch.tensor([1e4, -1e4])).tolist() == [448.0, -448.0]
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert reader.decode_e2m1(codes[:16].numpy()).tolist() == [*table, *(-v for v in table)]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.75])
    assert reader.e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -1]
