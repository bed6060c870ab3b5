"""TensorRT-LLM checkpoints: put together again by their loader's rules, and beside ModelOpt's own export."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from quantized_models import logits, quantized

from conversion import safetensors_io
from conversion.quantization import reader, reader_tensorrt_llm, tensorrt_llm
from conversion.quantization.formats import format_of
from conversion.quantization.tensorrt_llm import Layout
from nemo_ext.errors import UserError

CONFIG = dict(model_type="llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=1024, intermediate_size=2816,
              num_hidden_layers=6)  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A random Llama whose halves are multiples of 64, with a vocabulary that is not."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=250, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, max_position_embeddings=64, attention_bias=True)  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder := tmp_path_factory.mktemp("wide"))
    return folder


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(250, (4, 32), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "method, tp, pp, options",
    [
        ("fp8", 2, 1, {"kv": "fp8"}),
        ("fp8", 4, 1, {}),
        ("int8_sq", 2, 2, {"kv": "int8"}),
        ("int4_awq", 2, 1, {"group": 32}),
        ("w4a8_awq", 2, 1, {}),
        ("int4_gptq", 1, 2, {"mixed": True}),
    ],
)
def test_reader_gives_the_measured_logits(wide, tokens, tmp_path, method, tp, pp, options):
    made = quantized(wide, method, tokens, **options)
    measured = logits(made.model, tokens)
    tensorrt_llm.write(tmp_path, made, layout=Layout(tp, pp))
    read = reader.logits(reader_tensorrt_llm.load(tmp_path, made.config)[1], tokens)
    torch.testing.assert_close(read, measured, rtol=0, atol=2e-5 * float(measured.abs().max()))
    assert len(list(tmp_path.glob("rank*.safetensors"))) == tp * pp
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == 256 and config["mapping"]["world_size"] == tp * pp
    assert config["quantization"]["quant_algo"] in ("FP8", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "MIXED_PRECISION")
    assert config["quantization"]["kv_cache_quant_algo"] == {None: None, "fp8": "FP8", "int8": "INT8"}[options.get("kv")]


@pytest.mark.parametrize("method", ["fp8", "int8_sq", "w4a8_awq"])
def test_modelopt_exports_the_same_ranks(wide, tokens, tmp_path, method):
    """ModelOpt's export of the same model, but for the vocabulary's padding and scales of one, which it leaves out."""
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    made = quantized(wide, method, tokens)
    (tmp_path / "ours").mkdir()
    tensorrt_llm.write(tmp_path / "ours", made, layout=Layout(2, 1))
    export_tensorrt_llm_checkpoint(made.model, "llama", torch.bfloat16, tmp_path / "theirs", inference_tensor_parallel=2)
    for rank in range(2):
        ours, theirs = (safetensors_io.read_header(tmp_path / each / f"rank{rank}.safetensors") for each in ("ours", "theirs"))
        assert {name for name in ours if "prequant" not in name} == set(theirs)
        for name in theirs:
            if "layers" in name:
                assert torch.equal(ours[name].read().float(), theirs[name].read().float()), name


@pytest.mark.parametrize(
    "change, layout, group, message",
    [
        ({}, (3, 1), 0, "tp=3 does not divide the model's 8 heads"),
        ({}, (1, 4), 0, "pp=4 does not divide the model's 6 layers"),
        ({}, (2, 1), 128, ""),
        ({}, (8, 1), 128, "tp=8 leaves down_proj 352 inputs a rank, not a multiple of the group of 128"),
        ({"intermediate_size": 2818}, (4, 1), 0, "tp=4 does not divide the intermediate size"),
        ({"model_type": "stablelm"}, (1, 1), 0, "written for llama, mistral, qwen2, not for stablelm"),
        ({"model_type": "mistral", "sliding_window": 4096}, (1, 1), 0, "sliding window"),
    ],
)
def test_layouts(change, layout, group, message):
    form = format_of("int4", group) if group else format_of("fp8", 0)
    if not message:
        return Layout(*layout).check({**CONFIG, **change}, form)
    with pytest.raises(UserError, match=message):
        Layout(*layout).check({**CONFIG, **change}, form)


def test_part_of_a_fused_layer_is_refused(wide, tokens, tmp_path):
    made = quantized(wide, "fp8", tokens)
    del made.plan["model.layers.0.self_attn.k_proj"]
    with pytest.raises(UserError, match="are one layer in TensorRT-LLM: exclude all of them or none"):
        tensorrt_llm.write(tmp_path, made)


def test_vocabulary_is_padded_before_it_is_split():
    assert [tensorrt_llm.padded_vocabulary(size, tp) for size, tp in ((128, 2), (129, 1), (49152, 8), (250, 4))] == [
        128, 192, 49152, 256,
    ]  # fmt: skip
