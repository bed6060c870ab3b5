"""Configurations: what is read from config.json, what is refused, and that the tables cover the real models' tensors."""

import json

import pytest
import tiny_models

from conversion import families
from nemo_ext.architecture import Architecture, RopeScaling, SlidingWindow
from nemo_ext.errors import UserError

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256, "initializer_range": 0.02,
}  # fmt: skip
GEMMA3_4B = {  # the published file leaves the rest to transformers' defaults
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "initializer_range": 0.02,
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    "vision_config": {"hidden_size": 1152}, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_llama_31_8b():
    a = families.architecture(LLAMA_31_8B)
    assert a == Architecture(
        family="llama", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        vocab_size=128256, kv_channels=128, max_position_embeddings=131072, layernorm_epsilon=1e-5, rotary_base=500000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    )  # fmt: skip
    assert a.num_parameters() == 8_030_261_248  # the model card's 8.03B


def test_gemma3_4b_takes_what_is_left_out_from_the_defaults():
    a = families.architecture(GEMMA3_4B)
    assert (a.family, a.num_layers, a.num_attention_heads, a.num_query_groups, a.kv_channels) == ("gemma3", 34, 8, 4, 256)
    assert (a.vocab_size, a.max_position_embeddings, a.softmax_scale, a.rotary_base) == (262208, 131072, 1 / 16, 1e6)
    assert a.sliding_window == SlidingWindow(size=1024, every=6, rotary_base_local=10000.0, global_rope_factor=8.0)
    assert a.share_embeddings_and_output_weights and a.qk_layernorm


@pytest.mark.parametrize("name", ["llama", "llama_tied_scaled", "qwen2", "qwen3", "phi3", "gemma3_text", "gemma3"])
def test_the_configuration_comes_back(name):
    """transformers reads what we write and describes the same architecture; parameters are counted as transformers does."""
    import torch
    import transformers

    a = families.architecture(json.loads(tiny_models.configs()[name].to_json_string()))
    written = families.hf_config(a, "float32")
    config = transformers.AutoConfig.for_model(**written)
    assert families.architecture(json.loads(config.to_json_string())) == a
    assert families.architecture(written) == a
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert a.num_parameters() == sum(p.numel() for p in model.parameters())


def test_transformers_5_rope_parameters():
    new = {k: v for k, v in LLAMA_31_8B.items() if not k.startswith("rope")}
    new["rope_parameters"] = LLAMA_31_8B["rope_scaling"] | {"rope_theta": 500000.0}
    assert families.architecture(new) == families.architecture(LLAMA_31_8B)
    text = {k: v for k, v in GEMMA3_4B["text_config"].items() if k != "rope_scaling"}
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert families.architecture(GEMMA3_4B | {"text_config": text}) == families.architecture(GEMMA3_4B)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "falcon"}, r"'falcon'.*known: llama, qwen2, qwen3, phi3, gemma3_text, gemma3"),
        ({"model_type": None}, "known: llama"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_key_value_heads": 5}, "not a multiple"),
        ({"hidden_size": None}, "does not describe a llama model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized \\(gptq\\)"),
    ],
)
def test_what_does_not_convert_is_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        families.architecture(LLAMA_31_8B | change)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="lacks intermediate_size"):
        families.architecture({k: v for k, v in LLAMA_31_8B.items() if k != "intermediate_size"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window=32"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("phi3", {"sliding_window": 100}, "sliding_window=100"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_type='longrope'"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3_text", {"layer_types": ["full_attention"] + ["sliding_attention"] * 6}, "layer_types"),
    ],
)
def test_options_that_nemo_lacks_are_refused(name, change, message):
    config = json.loads(tiny_models.configs()[name].to_json_string()) | change
    with pytest.raises(UserError, match=message):
        families.architecture(config)


def test_windows_that_do_not_cut_are_accepted():
    config = json.loads(tiny_models.configs()["phi3"].to_json_string()) | {"sliding_window": 256}
    assert families.architecture(config).sliding_window is None
