"""Small random models with a tokenizer that llama.cpp has, as Hugging Face folders."""

from pathlib import Path

import tiny_models
from safetensors.torch import load_file, save_file

from conversion.gguf import tokenizer as gguf_tokenizer

VOCABULARY = {
    "general.architecture": "x", "x.context_length": 256, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<pad>", "<s>", "</s>", "a", "b", "ab", "Ġ", "<tool>"],
    "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1, 4], "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}  # fmt: skip


def tiny(name: str, folder: Path, vocabulary: dict = VOCABULARY):
    """A random model with a tokenizer, whose norms fp32 can hold beside 1, and whose attention scale llama.cpp knows."""
    configs = tiny_models.configs()
    config = configs[name]
    text = config.get_text_config()
    if hasattr(text, "query_pre_attn_scalar"):
        text.query_pre_attn_scalar = text.head_dim
    original = tiny_models.configs
    tiny_models.configs = lambda: configs
    try:
        tiny_models.save(name, folder)
    finally:
        tiny_models.configs = original
    weights = load_file(folder / "model.safetensors")
    weights = {key: (value * 4096).round() / 4096 if "norm" in key else value for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    gguf_tokenizer.write(vocabulary, folder)
    return folder
