"""ONNX decoders: onnxruntime computes what was measured, with and without a cache, and the file holds it as its operators say."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from quantized_models import load, logits, quantized

from conversion import quantize
from conversion.quantization import onnx_file
from nemo_ext.command_line import main
from nemo_ext.errors import RunError, UserError

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(llama, ids, tmp_path_factory):
    """A Llama in int4, measured and written."""
    made = quantized(llama, "int4_gptq", ids, group=32)
    folder = tmp_path_factory.mktemp("onnx")
    onnx_file.write(folder, made)
    return folder, made


def session(folder):
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def test_onnxruntime_gives_the_measured_logits(exported, llama, ids):
    """`logits` reads half of the text at once and the rest one by one from the cache."""
    folder, made = exported
    measured = logits(made.model, ids[:2])
    read = onnx_file.logits(folder, ids[:2])
    torch.testing.assert_close(read, measured, rtol=0, atol=1e-5 * float(measured.abs().max()))
    assert (measured - logits(load(llama), ids[:2])).abs().mean() > 100 * (read - measured).abs().mean()
    assert "computed by onnxruntime, the logits of 48 tokens differ by at most" in quantize.check(folder, made, ids[:1])
    assert (folder / "tokenizer.json").is_file() and json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_a_changed_scale_is_seen(exported, ids, tmp_path):
    folder, made = exported
    model = onnx.load(folder / "model.onnx")
    scale = next(each for each in model.graph.initializer if each.name.endswith("layers.1.mlp.up_proj.scale"))
    scale.raw_data = (onnx.numpy_helper.to_array(scale) * np.float32(1.02)).tobytes()
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(RunError, match="differ"):
        quantize.check(tmp_path, made, ids[:1])
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(RunError, match="onnxruntime cannot load"):
        onnx_file.logits(tmp_path, ids[:1])


def test_rows_of_different_lengths(exported, ids):
    """A shorter text stands at the right of its row, masked before it: its last token's logits are those it has alone."""
    folder, made = exported
    run, count = session(folder), 24
    shapes = {each.name: each.shape for each in run.get_inputs() if each.name.startswith("past_key_values.")}
    assert list(shapes)[:2] == ["past_key_values.0.key", "past_key_values.0.value"] and len(shapes) == 4
    inputs = {name: np.zeros((2, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
    mask = np.ones((2, count), np.int64)
    mask[1, :9] = 0
    inputs |= {"input_ids": ids[:2, :count].numpy(), "attention_mask": mask}
    inputs["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
    found = run.run(["logits"], inputs)[0]
    alone = logits(made.model, ids[1:2, 9:count])
    np.testing.assert_allclose(found[1, -1], alone[0, -1].numpy(), atol=1e-5 * float(alone.abs().max()))
    np.testing.assert_allclose(found[0], logits(made.model, ids[:1, :count])[0].numpy(), atol=1e-5 * float(alone.abs().max()))


def test_the_file_holds_the_measured_weights(exported):
    """Codes and scales as MatMulNBits' documentation has them; the embedding in the model's dtype."""
    folder, made = exported
    graph = onnx.load(folder / "model.onnx").graph
    stored = {each.name: each for each in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == len(made.plan) == 14
    for node in products:
        settings = {each.name: each.i for each in node.attribute}
        assert settings["bits"] == 4 and settings["block_size"] == 32 and settings["accuracy_level"] == 1
        packed, scale = (onnx.numpy_helper.to_array(stored[name]) for name in node.input[1:3])
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(settings["N"], -1, 32).astype(np.float32) - 8
        weight = (codes * scale.reshape(settings["N"], -1, 1)).reshape(settings["N"], settings["K"])
        module = made.model.get_submodule(node.input[1].removeprefix("model.").removesuffix(".packed"))
        with torch.no_grad():
            assert np.array_equal(weight, module.weight_quantizer(module.weight).float().numpy())
    embedding = next(each for name, each in stored.items() if "embed_tokens" in name)
    assert embedding.data_type == onnx.TensorProto.BFLOAT16


def test_int8_with_windows(ids, tmp_path):
    """A Gemma 2: inputs in int8 too, soft caps, windows in every other layer, norms that add one, a shared embedding."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Gemma2Config(vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=128)  # fmt: skip
    model = tf.Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "gemma")
    made = quantized(tmp_path / "gemma", "int8_sq", ids)
    (tmp_path / "out").mkdir()
    onnx_file.write(tmp_path / "out", made)
    measured = logits(made.model, ids[:2])
    read = onnx_file.logits(tmp_path / "out", ids[:2])
    torch.testing.assert_close(read, measured, rtol=0, atol=1e-4 * float(measured.abs().max()))
    assert (measured - logits(load(tmp_path / "gemma"), ids[:2])).abs().mean() > 100 * (read - measured).abs().mean()
    assert "computed by onnxruntime" in quantize.check(tmp_path / "out", made, ids[:1])
    torch.testing.assert_close(logits(made.model, ids[:2]), measured, rtol=0, atol=0)  # the check leaves the model as it was
    kinds = [node.op_type for node in onnx.load(tmp_path / "out/model.onnx", load_external_data=False).graph.node]
    assert kinds.count("QuantizeLinear") >= 8 and kinds.count("Attention") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["method=fp8"], "fp8 is not written as ONNX"),
        (["kv_cache=fp8"], "an ONNX decoder's KV cache is fp32"),
        (["auto=bits:5"], "fp8 is not written as ONNX"),
        (["tp=2"], "tp= and pp= split a TensorRT-LLM checkpoint"),
    ],
)
def test_what_is_refused(llama, tmp_path, capsys, arguments, message):
    given = ["method=int4_gptq", *arguments] if not arguments[0].startswith("method") else arguments
    line = [f"model=hf:{llama}", "format=onnx", f"out={tmp_path / 'out'}", *given]
    assert main(quantize.Options, quantize.command, line, about="", example="") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch):
    from conversion.quantization.formats import format_of

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    with pytest.raises(UserError, match="format=onnx needs onnxruntime: pip install onnxruntime"):
        onnx_file.check(format_of("int4", 32))
