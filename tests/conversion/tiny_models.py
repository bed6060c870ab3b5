"""Small random Hugging Face models of every family, with norms, biases and scales that make mistakes visible."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest import mock

SIZES = dict(vocab_size=250, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip

DENSE = ["llama", "llama_tied_scaled", "mistral", "mistral_nemo", "qwen2", "qwen3", "phi", "phi3", "phi3_window", "phi3_longrope",
         "stablelm", "stablelm_12b", "gemma2", "gemma3_text", "gemma3"]  # fmt: skip
LONG_ROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8], "long_factor": [1.1, 1.7, 2.3, 4.0, 6.5, 8.0]}


def configs() -> dict:
    """{name: transformers configuration} of everything the families promise."""
    import transformers as tf

    gemma = SIZES | dict(num_hidden_layers=8, head_dim=16, sliding_window=12, query_pre_attn_scalar=24)
    found = {
        "llama": tf.LlamaConfig(**SIZES),
        "llama_tied_scaled": tf.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_scaling=LLAMA3_ROPE, rope_theta=500.0),
        "qwen2": tf.Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen3": tf.Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=False),
        "mistral": tf.MistralConfig(**SIZES, head_dim=24, sliding_window=12),
        "mistral_nemo": tf.MistralConfig(**SIZES, head_dim=24, sliding_window=None, rope_theta=1e6),
        "phi": tf.PhiConfig(**SIZES, partial_rotary_factor=0.4),
        "phi3": tf.Phi3Config(**SIZES, sliding_window=None),
        "phi3_window": tf.Phi3Config(**SIZES, sliding_window=12),
        "phi3_longrope": tf.Phi3Config(
            **SIZES,
            tie_word_embeddings=True,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=32,
            rope_scaling=LONG_ROPE,
        ),
        "stablelm": tf.StableLmConfig(**SIZES, use_qkv_bias=True),
        "stablelm_12b": tf.StableLmConfig(**SIZES, qk_layernorm=True, use_parallel_residual=True),
        "gemma2": tf.Gemma2Config(**gemma, attn_logit_softcapping=1.5, final_logit_softcapping=4.0),
        "mixtral": tf.MixtralConfig(**SIZES | dict(intermediate_size=96), num_local_experts=4, router_aux_loss_coef=0.02),
        "gemma3_text": tf.Gemma3TextConfig(**gemma, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    }
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    found["gemma3"] = tf.Gemma3Config(
        text_config=gemma,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=249,
        boi_token_index=248,
        eoi_token_index=247,
    )
    return found


def no_initial_values(name: str):
    """A context in which transformers 4.57 builds StableLM's 12B with torch's initial values.

    Its own ask the norms of the heads for biases, which these do not have.
    """
    import transformers as tf

    return mock.patch.object(tf.StableLmPreTrainedModel, "_init_weights") if "12b" in name else nullcontext()


def save(name: str, folder: Path, **options) -> Path:
    """Write the model `name` of `configs` with random weights; `options` go to save_pretrained."""
    import torch
    import transformers as tf

    config = configs()[name]
    torch.manual_seed(0)
    if name == "gemma3":
        model = tf.Gemma3ForConditionalGeneration(config)
    else:
        with no_initial_values(name):
            model = tf.AutoModelForCausalLM.from_config(config)
    model = model.float()
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            if "norm" in tensor_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.mul_(3.0)
    model.save_pretrained(folder, **options)
    return folder
