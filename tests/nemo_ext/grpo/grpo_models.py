"""A model that samples and trains in milliseconds, with a tokenizer of digits and letters and problems for both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from recipes.grpo import GrpoKeys

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def write_tokenizer(folder: Path) -> None:
    """One token a character of printable ASCII, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: number for number, token in enumerate(SPECIAL + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "?"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))


def write_model(folder: Path, family: str = "llama") -> Path:
    """A model of random weights with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

    write_tokenizer(folder)
    small = dict(
        vocab_size=len(SPECIAL) + 96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, eos_token_id=0, pad_token_id=1, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "gemma3": Gemma3TextConfig, "qwen3": Qwen3Config}
    more = {
        "mistral": dict(sliding_window=6),
        "gemma3": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(classes[family](**small, **more.get(family, {})))
    for parameter in model.parameters():  # of the size of trained ones, so that answers differ
        parameter.data.mul_(3.0)
    model.save_pretrained(folder)
    return folder


def keys(**given: Any) -> dict[str, Any]:
    """Keys of the embedded engine with every choice made, of a run of moments."""
    chosen = {field.name: field.default for field in dataclasses.fields(GrpoKeys)}
    chosen |= dict(
        device="cpu", precision="fp32", backend="transformers", gpus=1, recompute=False, tensorboard=False, steps=6, every=2,
        val_every=3, prompts=3, group=4, max_answer=6, max_prompt=64, lr=1e-3, val_samples=4, reward="length:100", heldout=0.2,
    )  # fmt: skip
    chosen |= given
    chosen["min_lr"] = chosen["lr"] if chosen["min_lr"] is None else chosen["min_lr"]
    chosen["micro_batch"] = chosen["micro_batch"] or chosen["prompts"] * chosen["group"]
    return chosen


def write_problems(file: Path, count: int = 24) -> Path:
    """Sums as JSON lines."""
    rows = [{"question": f"{i} + {i % 7} =", "answer": str(i + i % 7), "level": i % 3} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepare(run_dir: Path, model: Path, problems: Path, loaded: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """What the launcher puts into a run's folder before `embedded.train`; the keys. `loaded` goes to `data.load`."""
    import shutil

    from nemo_ext.grpo import data
    from nemo_ext.grpo.embedded import HELDOUT, TRAIN

    chosen = keys(**given)
    sizes = dict(heldout=chosen["heldout"], max_prompt=chosen["max_prompt"], seed=chosen["seed"])
    found = data.load(str(problems), model, **sizes, **(loaded or {}))
    for file, rows in ((TRAIN, found.train), (HELDOUT, found.heldout)):
        (run_dir / file).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(model, run_dir / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return chosen
