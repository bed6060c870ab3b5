"""Small random Hugging Face models of every family, with norms, biases and scales that make mistakes visible."""

from __future__ import annotations

from pathlib import Path

SIZES = dict(vocab_size=250, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip


def configs() -> dict:
    """{name: transformers configuration} of everything the families promise."""
    import transformers as tf

    gemma = SIZES | dict(num_hidden_layers=8, head_dim=16, sliding_window=12, query_pre_attn_scalar=24)
    found = {
        "llama": tf.LlamaConfig(**SIZES),
        "llama_tied_scaled": tf.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_scaling=LLAMA3_ROPE, rope_theta=500.0),
        "qwen2": tf.Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen3": tf.Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=False),
        "phi3": tf.Phi3Config(**SIZES, sliding_window=None),
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


def save(name: str, folder: Path, **options) -> Path:
    """Write the model `name` of `configs` with random weights; `options` go to save_pretrained."""
    import torch
    import transformers as tf

    config = configs()[name]
    torch.manual_seed(0)
    if name == "gemma3":
        model = tf.Gemma3ForConditionalGeneration(config)
    else:
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
