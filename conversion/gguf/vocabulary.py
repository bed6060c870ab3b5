"""A Hugging Face tokenizer as GGUF metadata: the inverse of `gguf_tokenizer`.

What the tokenizer does is read from the tokenizer that transformers loads, not guessed from names: its pre-tokenizer must be
one that llama.cpp has under a name, and a SentencePiece tokenizer's merges must be those that scores give.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    SPECIAL_KEYS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
    byte_token,
    padding,
    splits,
)
from nemo_ext.errors import UserError

ADDED_SCORE = -1000.0  # what llama.cpp's converter gives tokens that are looked for before any merge


def read(hf_dir: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """{"tokenizer.*": value} of the tokenizer in `hf_dir` for the model of `config`, and where llama.cpp will differ from it.

    `config` (config.json's text part) gives the size of the vocabulary and the special ids that the tokenizer leaves out.
    Raises UserError where there is no tokenizer, or one of a kind that llama.cpp does not have.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{hf_dir} has no tokenizer that transformers loads: {line[:200]}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{hf_dir} has no tokenizer.json: write one with AutoTokenizer.from_pretrained(...).save_pretrained(...)")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise UserError(f"{hf_dir}: the tokenizer is of type {model['type']}; only BPE is written as GGUF")
    notes = [
        f"llama.cpp does not take the spaces around {token['content']} away, as the tokenizer does"
        for token in state["added_tokens"] if token["lstrip"] or token["rstrip"]
    ]  # fmt: skip
    size = config["vocab_size"]
    kind = _sentencepiece if model["byte_fallback"] else _byte_level
    metadata = kind(hf_dir, state, size, notes) | _special(tokenizer, config, hf_dir)
    if outside := [token["content"] for token in state["added_tokens"] if token["id"] >= size]:
        notes.append(f"left out, the model has no embedding for them: {', '.join(outside)}")
    return metadata, notes


def _byte_level(hf_dir: Path, state: dict, size: int, notes: list[str]) -> dict[str, Any]:
    normalizer, model = state["normalizer"], state["model"]
    if normalizer is not None:
        if normalizer["type"] != "NFC":
            raise UserError(f"{hf_dir}: the tokenizer's normalizer {normalizer['type']} is not one that llama.cpp has")
        notes.append("llama.cpp does not bring text into Unicode's composed form (NFC), as the tokenizer does")
    steps = _steps(state["pre_tokenizer"])
    alike = [name for name, known in PRE_TOKENIZERS.items() if steps == [_plain(step) for step in known]]
    pre = next((name for name in alike if (name in WHOLE_WORDS) == bool(model.get("ignore_merges"))), None)
    if pre is None:
        what = json.dumps(state["pre_tokenizer"], ensure_ascii=False)
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f"{hf_dir}: the tokenizer's pre-tokenizer is none of llama.cpp's that are known ({known}): {what}")
    tokens, types = _tokens(hf_dir, state, size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in _merges(model)],
        "tokenizer.ggml.add_space_prefix": False,
    }


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    if pre_tokenizer is None:
        return []
    nested = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return [_plain(step) for step in nested]


def _plain(step: dict) -> dict:
    """A pre-tokenizer's step without what does not change ids."""
    step = {key: value for key, value in step.items() if key != "trim_offsets"}
    if step["type"] == "Split" and step["behavior"] == "Removed" and step["invert"]:  # keeps what matches, and all text does
        step |= {"behavior": "Isolated", "invert": False}
    return step


def _sentencepiece(hf_dir: Path, state: dict, size: int, notes: list[str]) -> dict[str, Any]:
    tokens, types = _tokens(hf_dir, state, size)
    prefix = _space_prefix(hf_dir, state, notes)
    scores = _scores(hf_dir, state)
    unknown = state["model"].get("unk_token")
    for i, token in enumerate(tokens):
        if token == unknown:
            types[i] = UNKNOWN
        elif types[i] == USER_DEFINED:  # looked for in the text, which has spaces
            tokens[i] = token.replace(SPACE, " ")
    known = {byte_token(byte) for byte in range(256)}
    kinds = list(zip(tokens, types, strict=True))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [scores.get(token, 0.0) if kind == NORMAL else ADDED_SCORE for token, kind in kinds],
        "tokenizer.ggml.token_type": [BYTE if token in known else kind for token, kind in kinds],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _space_prefix(hf_dir: Path, state: dict, notes: list[str]) -> bool:
    """Whether a space is put in front of a text; refuses what llama.cpp does not do with spaces."""
    outer, pre = state["normalizer"], state["pre_tokenizer"]
    steps = [] if outer is None else outer["normalizers"] if outer["type"] == "Sequence" else [outer]
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    nothing_to_split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if steps in ([replace], [prepend, replace]) and pre in (None, nothing_to_split):
        return len(steps) == 2
    metaspace = pre if pre and pre["type"] == "Metaspace" else {}
    if not steps and metaspace.get("replacement") == SPACE and not metaspace.get("split", True):
        scheme = metaspace["prepend_scheme"]
        if scheme != "never":
            notes.append("llama.cpp puts a space also after every special token, and in front of a text that begins with one")
        return scheme != "never"
    found = json.dumps([outer, pre], ensure_ascii=False)
    raise UserError(f"{hf_dir}: llama.cpp does not treat spaces as the tokenizer does: {found}")


def _scores(hf_dir: Path, state: dict) -> dict[str, float]:
    """{token: score} that make llama.cpp merge in the order of the merges: 0, -1, -2 ... as they are first made.

    Refuses merges that scores cannot give: every pair of tokens that makes a token is merged, wherever it comes from, and all
    pairs of a token have the same rank.
    """
    added = {token["content"] for token in state["added_tokens"]}
    merges = [tuple(merge) for merge in _merges(state["model"])]
    scores: dict[str, float] = {}
    latest = None
    for left, right in merges:
        token = left + right
        if token in added:
            continue
        if token != latest and token in scores:
            raise UserError(f"{hf_dir}: the tokenizer merges {token!r} at two ranks, which scores cannot say")
        scores.setdefault(token, -float(len(scores)))
        latest = token
    known, vocabulary = set(merges), state["model"]["vocab"].keys() - added
    for token in vocabulary:
        for pair in splits(token):
            if pair not in known and pair[0] in vocabulary and pair[1] in vocabulary:
                raise UserError(f"{hf_dir}: the tokenizer does not merge {pair[0]!r} and {pair[1]!r}, llama.cpp would")
    return scores


def _merges(model: dict) -> list[Sequence[str]]:
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]


def _tokens(hf_dir: Path, state: dict, size: int) -> tuple[list[str], list[int]]:
    """Tokens and types of `size` ids; those that the tokenizer does not have are padding."""
    vocabulary: dict[str, int] = state["model"]["vocab"]
    if vocabulary and (highest := max(vocabulary.values())) >= size:
        raise UserError(f"{hf_dir}: the tokenizer has ids up to {highest}, the model embeds {size}")
    tokens, types = [padding(i) for i in range(size)], [UNUSED] * size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for token in state["added_tokens"]:
        if token["id"] < size:
            tokens[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return tokens, types


def _special(tokenizer: Any, config: Mapping[str, Any], hf_dir: Path) -> dict[str, Any]:
    """Ids of the special tokens, whether they are put around a text, and the chat templates."""
    metadata: dict[str, Any] = {}
    ids: dict[str, int] = {}
    for name, key in SPECIAL_KEYS.items():
        index = getattr(tokenizer, f"{name}_token_id")
        index = config.get(f"{name}_token_id") if index is None else index
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < config["vocab_size"]:
            ids[name] = metadata[f"tokenizer.ggml.{key}_token_id"] = index
    if (turn := _end_of_turn(hf_dir, ids)) is not None:
        metadata["tokenizer.ggml.eot_token_id"] = turn
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    before, after = (whole[:start], whole[start + len(plain) :]) if start is not None else (whole, [])
    if before not in ([], [ids.get("bos")]) or after not in ([], [ids.get("eos")]):
        raise UserError(f"{hf_dir}: the tokenizer puts {before} before a text and {after} behind; llama.cpp puts bos and eos")
    metadata |= {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}
    templates = tokenizer.chat_template
    templates = {"default": templates} if isinstance(templates, str) else dict(templates or {})
    if default := templates.pop("default", None):
        metadata["tokenizer.chat_template"] = default
    if templates:
        metadata["tokenizer.chat_templates"] = list(templates)
        metadata |= {f"tokenizer.chat_template.{name}": template for name, template in templates.items()}
    return metadata


def _end_of_turn(hf_dir: Path, ids: Mapping[str, int]) -> int | None:
    """The second of two ids at which generation_config.json stops, beside eos."""
    file = hf_dir / "generation_config.json"
    stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    others = [index for index in stops if index != ids.get("eos")] if isinstance(stops, list) else []
    return others[0] if len(others) == 1 else None
