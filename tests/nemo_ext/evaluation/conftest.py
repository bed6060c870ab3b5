"""A random model with a tokenizer of its own, small enough to check by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_ext import platform

platform.activate()

TEXTS = [
    "The quick brown fox jumps over the lazy dog. A model reads a text and says how likely each word of it is.",
    "Question: which of these is right? Answer: A. Answer: B. Answer: C. Answer: D. What is 2 + 2? The answer is 4.",
    "Perplexity is the exponential of the mean loss; bits per byte do not depend on the tokenizer, and compare any two models.",
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A Llama of 64 positions without a chat template; bos and eos are <s> and </s>."""
    return build(tmp_path_factory.mktemp("lm") / "tiny", 0)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """Another one, with a chat template and more positions."""
    return build(tmp_path_factory.mktemp("chat") / "tiny-chat", 1, positions=256, chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def model(folder):
    from nemo_ext.evaluation.model import Model

    return Model(folder, "tiny")


@pytest.fixture(scope="session")
def chat_model(chat_folder):
    from nemo_ext.evaluation.model import Model

    return Model(chat_folder, "tiny-chat")


def build(folder: Path, seed: int, positions: int = 64, **tokenizer_config) -> Path:
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=positions, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.mul_(4.0)
    network.save_pretrained(folder)
    return folder
