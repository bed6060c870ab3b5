"""Hugging Face tokenizer files from the metadata of a GGUF file.

The metadata is the reference: ids of bos, eos, pad and unk, whether they are put around a text, the pre-tokenizer's name and
the chat template are taken from it (format: github.com/ggml-org/ggml, docs/gguf.md). Two kinds of tokenizers are read:
byte-level BPE (`tokenizer.ggml.model` = "gpt2"), whose pre-tokenizers are the regular expressions that llama.cpp uses under
the same names, and SentencePiece BPE with scores and byte fallback ("llama").

llama.cpp looks for special tokens in a text from the longest to the shortest, Hugging Face from left to right (the longest
first at each place): texts in which two of them overlap are the one known difference.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from nemo_ext.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "▁"  # SentencePiece's
SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # name -> tokenizer.ggml.*_token_id

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = _BYTES_GPT2 | {"use_regex": False}


def _split(regex: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


_DIGITS = [{"type": "Digits", "individual_digits": True}, _BYTES_GPT2]

# tokenizer.ggml.pre -> steps of the pre-tokenizer; of names that mean the same, the first is the one written
PRE_TOKENIZERS: dict[str, list[dict]] = {
    "gpt-2": [_BYTES_GPT2],
    "phi-2": [_BYTES_GPT2],
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama-bpe": [_split(_LLAMA3), _BYTES],
    "llama3": [_split(_LLAMA3), _BYTES],
    "dbrx": [_split(_LLAMA3), _BYTES],
    "qwen2": [_split(_QWEN2), _BYTES],
    "stablelm2": [_split(_QWEN2), _BYTES],
    "deepseek-r1-qwen": [_split(_QWEN2), _BYTES],
}
WHOLE_WORDS = {"llama-bpe", "llama3"}  # a piece that is a token is not merged (llama.cpp's ignore_merges); bos by default


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids the metadata gives: a part of {"bos", "eos", "pad", "unk"}."""
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_KEYS.items()}
    return {name: int(value) for name, value in found.items() if value is not None}


def adds(metadata: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether encoding puts a bos in front and an eos behind: what the metadata say, else llama.cpp's defaults."""
    bos = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    found = (metadata.get(f"tokenizer.ggml.add_{name}_token", default) for name, default in (("bos", bos), ("eos", False)))
    return tuple(map(bool, found))


def write(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    Raises UserError for a tokenizer of another kind, whose pre-tokenizer is not in PRE_TOKENIZERS, or whose scores a list of
    merges cannot express.
    """
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    model = metadata.get("tokenizer.ggml.model")
    if model not in kinds:
        raise UserError(f"the GGUF's tokenizer is of type {model!r}; only {' and '.join(map(repr, kinds))} are read")
    tokens, types = _tokens(metadata)
    ids = special_ids(metadata)
    for name, index in ids.items():
        if not 0 <= index < len(tokens):
            raise UserError(f"the GGUF's {name} id {index} lies outside its vocabulary of {len(tokens)} tokens")
    names = {f"{name}_token": tokens[index] for name, index in ids.items()}
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER_DEFINED}
        for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]  # fmt: skip
    bos, eos = (
        name if add and f"{name}_token" in names else None for add, name in zip(adds(metadata), ("bos", "eos"), strict=True)
    )
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _around(*((names[f"{name}_token"], ids[name]) if name else None for name in (bos, eos))),
        **kinds[model](metadata, tokens, types),
    }
    tokenizer["model"] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
    } | tokenizer["model"]  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
        "add_bos_token": bos is not None,
        "add_eos_token": eos is not None,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(metadata[f"{metadata['general.architecture']}.context_length"]),
        **names,
    }
    if template := _chat_template(metadata):
        config["chat_template"] = template
    for file, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / file).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The vocabulary without the rows that pad it to the embedding's size, `[PAD<id>]`."""
    for key in ("tokens", *(("merges",) if metadata["tokenizer.ggml.model"] == "gpt2" else ("scores",))):
        if f"tokenizer.ggml.{key}" not in metadata:
            raise UserError(f"the GGUF lacks tokenizer.ggml.{key}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    lengths = {len(tokens), len(types), len(metadata.get("tokenizer.ggml.scores") or tokens)}
    if len(lengths) > 1:
        raise UserError(f"the GGUF's tokens, their types and scores are of different number: {sorted(lengths)}")
    count = len(tokens)
    while count and types[count - 1] == UNUSED and tokens[count - 1] == padding(count - 1):
        count -= 1
    return tokens[:count], types[:count]


def padding(index: int) -> str:
    """What stands for an id that the tokenizer does not have but the embedding does."""
    return f"[PAD{index}]"


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"the GGUF's pre-tokenizer {pre!r} is not known; known: {', '.join(sorted(PRE_TOKENIZERS))}")
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "decoder": _BYTES_GPT2,
        "model": {
            "ignore_merges": pre in WHOLE_WORDS,
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """llama.cpp's SPM: the whole text is one word; the pair that makes the token of the highest score is merged first."""
    vocabulary = set(tokens)
    if missing := sum(byte_token(byte) not in vocabulary for byte in range(256)):
        raise UserError(f"the GGUF's tokenizer lacks {missing} of the 256 byte tokens")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    words = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    first = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    last = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [words, {"type": "ByteFallback"}, {"type": "Fuse"}, *last]},
        "model": {
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "merges": _merges(tokens, types, metadata["tokenizer.ggml.scores"]),
        },
    }


def byte_token(byte: int) -> str:
    """SentencePiece's token of a byte."""
    return f"<0x{byte:02X}>"


def splits(token: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a token in two."""
    return ((token[:i], token[i:]) for i in range(1, len(token)))


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, by its score: in this order BPE does what llama.cpp does with the scores.

    Refused is what no order of merges can say: a token that begins or ends with a character which is no token itself, and
    two tokens of equal score that compete for a part (llama.cpp then takes the left one).
    """
    index = {token: i for i, token in enumerate(tokens)}
    found: list[tuple[float, int, tuple[str, str]]] = []
    for token, i in index.items():
        for left, right in splits(token):
            if left in index and right in index:
                found.append((-scores[i], i, (left, right)))
            elif types[i] == NORMAL and " " not in token and any(
                len(part) == 1 and part not in index and other in index for part, other in ((left, right), (right, left))
            ):  # fmt: skip
                raise UserError(f"the GGUF's token {token!r} has a character that is no token: tokenizer.json cannot make it")
    found.sort(key=lambda merge: merge[:2])
    for _, merges in groupby(found, key=itemgetter(0)):
        group = [merge[1:] for merge in merges]
        makes = defaultdict(set)  # a left part -> the tokens it begins
        for i, (left, _) in group:
            makes[left].add(i)
        for i, (_, right) in group:
            if types[i] == NORMAL and (rival := next((j for j in makes[right] - {i} if types[j] == NORMAL), None)) is not None:
                raise UserError(
                    f"the GGUF's tokens {tokens[i]!r} and {tokens[rival]!r} have the same score, and either can take "
                    f"{right!r}: tokenizer.json cannot say which"
                )
    return [pair for _, _, pair in found]


def _chat_template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The template, or the list of all that transformers takes where there are several."""
    default = metadata.get("tokenizer.chat_template")
    named = [
        {"name": n, "template": metadata[f"tokenizer.chat_template.{n}"]} for n in metadata.get("tokenizer.chat_templates", [])
    ]
    if not named:
        return default
    return [*([{"name": "default", "template": default}] if default else []), *named]


def _around(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict | None:
    """The post-processor that puts the (token, id) of bos and eos around a text."""
    if bos is None and eos is None:
        return None

    def sequence(name: str, kind: int) -> list[dict]:
        before, after = ([{"SpecialToken": {"id": each[0], "type_id": kind}}] if each else [] for each in (bos, eos))
        return [*before, {"Sequence": {"id": name, "type_id": kind}}, *after]

    tokens = {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in filter(None, (bos, eos))}
    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": tokens,
    }
