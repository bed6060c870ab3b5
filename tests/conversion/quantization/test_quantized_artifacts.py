"""What is written is what was measured: read back by the format's rules, by transformers, and beside ModelOpt's own export."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from quantized_models import load, logits, quantized

from conversion import quantize, safetensors_io
from conversion.quantization import compressed_tensors, modelopt_folder, reader
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
    read = reader.logits(tmp_path, ids)
    torch.testing.assert_close(read, measured, rtol=0, atol=2e-5 * float(measured.abs().max()))
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
    with pytest.raises(RunError, match="differ"):
        quantize.check(tmp_path, made, ids[:2])


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
