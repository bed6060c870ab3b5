"""Hugging Face tokenizer files from the metadata of a GGUF file.

The metadata is the reference: ids of bos, eos, pad and unk, whether a bos is put in front, the pre-tokenizer's name and the
chat template are taken from it (format: github.com/ggml-org/ggml, docs/gguf.md). Byte-level BPE tokenizers
(`tokenizer.ggml.model` = "gpt2") are read; their pre-tokenizers are the regular expressions that llama.cpp uses under the
same names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_ext.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = _BYTES_GPT2 | {"use_regex": False}


def _split(regex: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


_DIGITS = [{"type": "Digits", "individual_digits": True}, _BYTES_GPT2]

# tokenizer.ggml.pre -> steps of the pre-tokenizer
PRE_TOKENIZERS: dict[str, list[dict]] = {
    "gpt-2": [_BYTES_GPT2],
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama-bpe": [_split(_LLAMA3), _BYTES],
    "llama3": [_split(_LLAMA3), _BYTES],
    "qwen2": [_split(_QWEN2), _BYTES],
    "deepseek-r1-qwen": [_split(_QWEN2), _BYTES],
}
_WHOLE_WORDS = {"llama-bpe", "llama3"}  # a piece that is a token is not merged (llama.cpp's ignore_merges); bos by default


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids the metadata gives: a part of {"bos", "eos", "pad", "unk"}."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: int(value) for name, value in found.items() if value is not None}


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether encoding puts a bos in front: what the metadata says, else llama.cpp's default for the pre-tokenizer."""
    return bool(metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS))


def write(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    Raises UserError for a tokenizer that is not byte-level BPE, or whose pre-tokenizer is not in PRE_TOKENIZERS.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2":
        raise UserError(f"the GGUF's tokenizer is of type {model!r}; only byte-level BPE ('gpt2') is read")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"the GGUF's pre-tokenizer {pre!r} is not known; known: {', '.join(sorted(PRE_TOKENIZERS))}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    ids = special_ids(metadata)
    for name, index in ids.items():
        if not 0 <= index < len(tokens):
            raise UserError(f"the GGUF's {name} id {index} lies outside its vocabulary of {len(tokens)} tokens")
    names = {f"{name}_token": tokens[index] for name, index in ids.items()}

    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == CONTROL}
        for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    bos = adds_bos(metadata) and "bos_token" in names
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": _bos_in_front(names["bos_token"], ids["bos"]) if bos else None,
        "decoder": _BYTES_GPT2,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
        "add_bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(metadata[f"{metadata['general.architecture']}.context_length"]),
        **names,
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    for file, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / file).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _bos_in_front(token: str, index: int) -> dict:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special | {"SpecialToken": {"id": token, "type_id": 1}}, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
