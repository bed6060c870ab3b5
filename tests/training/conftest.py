"""What the training tests share: a small Llama in a converted checkpoint, a small tokenizer, a small corpus."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from unittest import mock

import layouts
import pytest

from nemo_ext import platform

platform.activate()

VOCAB = 512
SEQ = layouts.KEYS["seq"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE of 512 tokens trained on the Python documentation."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from nemo_ext.data import stdlib_docs

    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = ByteLevelBPETokenizer()
    texts = [text for _, text in zip(range(40), _texts(stdlib_docs), strict=False)]
    bpe.train_from_iterator(texts, vocab_size=VOCAB, special_tokens=["<|endoftext|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tokenizer, tmp_path_factory):
    """Forty documents of the Python documentation, tokenised."""
    from nemo_ext.data import corpus, sources, stdlib_docs

    folder = tmp_path_factory.mktemp("data")
    text = folder / "docs.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for _, t in zip(range(40), _texts(stdlib_docs), strict=False)))
    return corpus.prepare(sources.parse(str(text)), tokenizer, folder / "cache", heldout=0.1, seq_length=SEQ, workers=1)


@pytest.fixture(scope="session")
def chats(tokenizer, tmp_path_factory):
    """Two hundred conversations of a question and an answer of a few words, tokenised."""
    from nemo_ext.data.chat.render import Settings
    from nemo_ext.data.chat.store import prepare
    from nemo_ext.data.sources import RECORDS, parse

    folder, rng = tmp_path_factory.mktemp("chats"), random.Random(1)
    words = "def class return import the of a string list value is in not module function argument".split()

    def text():
        return " ".join(rng.choices(words, k=rng.randint(1, 4)))

    records = [{"messages": [{"role": r, "content": text()} for r in ("user", "assistant")]} for _ in range(200)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = parse(str(folder / "chat.jsonl"), RECORDS)
    return prepare(sources, tokenizer, folder / "cache", Settings(SEQ), heldout=0.1, workers=1)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, dict]:
    """{"tied": ..., "untied": ..., "mixtral": ...}: random Hugging Face models of four layers, converted to Megatron's format:
    three Llamas, a Mixtral without the balancing loss, which Hugging Face and Megatron count differently, and families whose
    layers are unlike a Llama's."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, Phi3Config, PhiConfig, StableLmConfig
    from transformers import StableLmPreTrainedModel as StableLm

    from conversion.hf_to_nemo import convert

    sizes = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=256)  # fmt: skip
    configs = {
        "tied": LlamaConfig(**sizes, intermediate_size=176, tie_word_embeddings=True),
        "untied": LlamaConfig(**sizes, intermediate_size=176, tie_word_embeddings=False),
        "wide": LlamaConfig(**{**sizes, "hidden_size": 128}, intermediate_size=256, tie_word_embeddings=True),
        "mixtral": MixtralConfig(**sizes, intermediate_size=96, num_local_experts=4, router_aux_loss_coef=0.0),
        "phi": PhiConfig(**sizes, intermediate_size=176),
        "phi3": Phi3Config(**sizes, intermediate_size=176, pad_token_id=None),
        "gemma2": Gemma2Config(**sizes, intermediate_size=176, head_dim=16, sliding_window=20, query_pre_attn_scalar=24,
                               attn_logit_softcapping=2.0, final_logit_softcapping=5.0, pad_token_id=None),
        "stablelm_12b": StableLmConfig(**sizes, intermediate_size=176, qk_layernorm=True, use_parallel_residual=True),
    }  # fmt: skip
    found = {}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(1)
        # transformers 4.57 asks the norms of StableLM's heads for biases, which they do not have: torch's initial values there
        with mock.patch.object(StableLm, "_init_weights") if name == "stablelm_12b" else contextlib.nullcontext():
            model = AutoModelForCausalLM.from_config(config).float()
        model.save_pretrained(folder / "hf")
        weights = convert(folder / "hf", folder / "nemo")
        architecture = json.loads((weights / "architecture.json").read_text())
        found[name] = {"hf": str(folder / "hf"), "weights": str(weights), "architecture": architecture}
    return found


@pytest.fixture(scope="session")
def train(tmp_path_factory, tokenizer, corpus, models):
    """train(cases, processes) -> folder: `layouts.train` with the small models; losses(folder, case) reads one."""

    def run(cases: list[dict], processes: int, into: Path | None = None) -> Path:
        out = into or tmp_path_factory.mktemp("runs")
        layouts.train(cases, processes, out, models, tokenizer, corpus.blend())
        return out

    return run


def _texts(stdlib_docs):
    for document in stdlib_docs.documents():
        yield document[1] if isinstance(document, tuple) else document
