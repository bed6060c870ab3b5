"""Configurations: what is read from config.json, what is refused, and that the tables cover the real models' tensors."""

import json

import pytest
import tiny_models

from conversion import families
from nemo_ext.architecture import Architecture, LongRope, RopeScaling, SlidingWindow
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
MISTRAL_V01 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "vocab_size": 256000,
}  # fmt: skip
PHI3_MINI = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32064,
}  # fmt: skip
STABLELM_16 = {
    "architectures": ["StableLmForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_dropout": 0.0,
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096, "model_type": "stablelm", "num_attention_heads": 32, "num_hidden_layers": 24,
    "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_scaling": None, "rope_theta": 10000,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_qkv_bias": True, "vocab_size": 100352,
}  # fmt: skip
_LONG_48 = {"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [2.5] * 48}  # as many, not the published values


def test_llama_31_8b():
    a = families.architecture(LLAMA_31_8B)
    assert a == Architecture(
        family="llama", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        vocab_size=128256, kv_channels=128, max_position_embeddings=131072, layernorm_epsilon=1e-5, rotary_base=500000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    )  # fmt: skip
    assert a.num_parameters() == 8_030_261_248  # the model card's 8.03B


# Parameters as transformers counts them, the published config.json without what conversion never reads, some fields.
PUBLISHED = {
    "TinyLlama-1.1B": (1_100_048_384, LLAMA_31_8B | {
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 32000,
    }, {}),
    "Llama-2-7b": (6_738_415_616, {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000,
    }, {"rotary_base": 10000.0, "num_query_groups": 32}),
    "SmolLM2-135M": (134_515_008, LLAMA_31_8B | {
        "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
    }, {"rotary_base": 1e5, "share_embeddings_and_output_weights": True}),
    "DeepSeek-R1-Distill-Llama-8B": (8_030_261_248, LLAMA_31_8B | {
        "bos_token_id": 128000, "eos_token_id": 128001, "dtype": "bfloat16",
    }, {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)}),
    "DeepSeek-R1-Distill-Qwen-1.5B": (1_777_088_000, {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
        "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12,
        "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
        "tie_word_embeddings": False, "dtype": "bfloat16", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    }, {"sliding_window": None, "add_qkv_bias": True, "share_embeddings_and_output_weights": False}),
    "DeepSeek-R1-Distill-Qwen-7B": (7_615_616_512, {
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
    }, {"sliding_window": None, "rotary_base": 10000.0}),
    "Mistral-7B-v0.1": (7_241_732_096, MISTRAL_V01, {
        "sliding_window": SlidingWindow(4096, every=0, rotary_base_local=None), "kv_channels": 128, "layernorm_epsilon": 1e-5,
    }),
    "Mistral-7B-v0.3": (7_248_023_552, MISTRAL_V01 | {
        "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768,
    }, {"sliding_window": None, "rotary_base": 1e6}),
    "Mistral-Nemo-Base-2407": (12_247_782_400, MISTRAL_V01 | {
        "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 128000, "num_hidden_layers": 40,
        "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 131072,
    }, {"kv_channels": 128, "attention_width": 4096}),
    "gemma-2-2b": (2_614_341_888, GEMMA2_2B, {
        "family": "gemma2", "softmax_scale": 1 / 16, "share_embeddings_and_output_weights": True,
        "sliding_window": SlidingWindow(4096, every=2, rotary_base_local=None), "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }),
    "gemma-2-27b": (27_227_128_320, GEMMA2_2B | {
        "head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32, "num_hidden_layers": 46,
        "num_key_value_heads": 16, "query_pre_attn_scalar": 144,
    }, {"softmax_scale": 1 / 12}),
    "phi-2": (2_779_683_840, {
        "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0,
        "eos_token_id": 50256, "hidden_act": "gelu_new", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "phi",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4,
        "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "torch_dtype": "float16", "vocab_size": 51200,
    }, {"rotary_percent": 0.4, "normalization": "LayerNorm", "gated_linear_unit": False, "parallel_residual": True}),
    "Phi-3-mini-4k": (3_821_079_552, PHI3_MINI, {"sliding_window": SlidingWindow(2047, every=0, rotary_base_local=None)}),
    "Phi-3-mini-128k": (3_821_079_552, PHI3_MINI | {
        "max_position_embeddings": 131072, "rope_scaling": _LONG_48, "sliding_window": 262144,
    }, {"sliding_window": None, "rope_scaling": LongRope([1.05] * 48, [2.5] * 48, 4096)}),
    "Phi-4-mini": (3_836_021_760, PHI3_MINI | {
        "max_position_embeddings": 131072, "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
        "rope_scaling": _LONG_48, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
    }, {"rotary_percent": 0.75, "kv_channels": 128}),
    "stablelm-2-1_6b": (1_644_515_328, STABLELM_16, {
        "add_qkv_bias": True, "rotary_percent": 0.25, "normalization": "LayerNorm", "parallel_residual": False,
    }),
    "stablelm-2-12b": (12_143_185_920, STABLELM_16 | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False,
    }, {"parallel_residual": True, "qk_layernorm_per_head": True, "add_qkv_bias": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    """Fields as read, parameters as transformers counts them (on a meta device), and a config.json that reads back the same."""
    import transformers

    parameters, config, fields = PUBLISHED[name]
    a = families.architecture(config)
    assert {field: getattr(a, field) for field in fields} == fields
    assert a.num_parameters() == parameters
    written = transformers.AutoConfig.for_model(**families.hf_config(a))
    assert families.architecture(json.loads(written.to_json_string())) == a


def test_longrope_magnitude():
    """sqrt(1 + ln 32 / ln 4096) for Phi-3-mini-128k: ln 32 / ln 4096 is 5/12."""
    a = families.architecture(PUBLISHED["Phi-3-mini-128k"][1])
    assert a.rope_scaling.magnitude(a.max_position_embeddings) == pytest.approx((17 / 12) ** 0.5, rel=1e-12)
    assert a.rope_scaling.magnitude(4096) == 1.0


def test_gemma3_4b_takes_what_is_left_out_from_the_defaults():
    a = families.architecture(GEMMA3_4B)
    assert (a.family, a.num_layers, a.num_attention_heads, a.num_query_groups, a.kv_channels) == ("gemma3", 34, 8, 4, 256)
    assert (a.vocab_size, a.max_position_embeddings, a.softmax_scale, a.rotary_base) == (262208, 131072, 1 / 16, 1e6)
    assert a.sliding_window == SlidingWindow(size=1024, every=6, rotary_base_local=10000.0, global_rope_factor=8.0)
    assert a.share_embeddings_and_output_weights and a.qk_layernorm


@pytest.mark.parametrize("name", tiny_models.DENSE)
def test_the_configuration_comes_back(name):
    """transformers reads what we write and describes the same architecture; parameters are counted as transformers does."""
    import torch
    import transformers

    a = families.architecture(json.loads(tiny_models.configs()[name].to_json_string()))
    written = families.hf_config(a, "float32")
    config = transformers.AutoConfig.for_model(**written)
    assert families.architecture(json.loads(config.to_json_string())) == a
    assert families.architecture(written) == a
    with torch.device("meta"), tiny_models.no_initial_values(name):
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
        ({"model_type": "falcon"}, r"'falcon'.*known: llama, mistral, qwen2, .*gemma3_text, gemma3"),
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
        ("qwen3", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window=32"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mistral", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("phi", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("phi", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("phi3", {"rope_scaling": {"type": "yarn"}}, "rope_type='yarn'"),
        ("phi3_longrope", {"rope_scaling": tiny_models.LONG_ROPE | {"attention_factor": 1.2}}, "attention_factor=1.2"),
        (
            "phi3_longrope",
            {"rope_scaling": tiny_models.LONG_ROPE | {"long_factor": [1.0, 2.0]}},
            "2 factors.*6 rotary frequencies",
        ),
        ("stablelm", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("stablelm", {"head_dim": 24}, "head_dim=24"),
        ("gemma2", {"attention_bias": True}, "attention_bias=True"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        (
            "gemma2",
            {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] + ["full_attention"] * 5},
            "layer_types",
        ),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3_text", {"layer_types": ["full_attention"] + ["sliding_attention"] * 6}, "layer_types"),
    ],
)
def test_options_that_nemo_lacks_are_refused(name, change, message):
    config = json.loads(tiny_models.configs()[name].to_json_string()) | change
    with pytest.raises(UserError, match=message):
        families.architecture(config)


@pytest.mark.parametrize("name", ["phi3", "mistral"])
def test_windows_that_do_not_cut_are_none(name):
    config = json.loads(tiny_models.configs()[name].to_json_string()) | {"sliding_window": 256}
    assert families.architecture(config).sliding_window is None


def test_transformers_5_rotary_share_and_longrope():
    config = json.loads(tiny_models.configs()["phi3_longrope"].to_json_string())
    old = ("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")
    new = {k: v for k, v in config.items() if k not in old}
    new["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                              "original_max_position_embeddings": 32,
                              **{k: tiny_models.LONG_ROPE[k] for k in ("short_factor", "long_factor")}}  # fmt: skip
    assert families.architecture(new) == families.architecture(config)
