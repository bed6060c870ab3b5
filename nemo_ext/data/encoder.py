"""Text to token ids: the ids of Hugging Face's `tokenizers`, produced faster where that is proven to be exact.

`fastokens` (Rust, reads the same tokenizer.json) is several times faster than `tokenizers` and hands over one flat buffer
instead of an object a document. It is used only if it gives the same ids on a probe of many scripts, and a sample of every
batch is encoded by both; the first difference raises `IdsDiffer`, upon which the caller starts again with the reference.
`Encoder.engine` says what is used, and why.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np

from nemo_ext.data.indexed import token_dtype
from nemo_ext.errors import UserError

REFERENCE = "tokenizers"
FAST = "fastokens"
SAMPLE_CHARACTERS = 1000  # of every batch (about a million), compared with the reference

# GPT-2's pattern, which the ByteLevel pre-tokenizer applies when use_regex is set.
_BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class IdsDiffer(Exception):
    """The fast engine gave other ids than the reference."""


class Encoder:
    """The encoder of a tokenizer folder: the fast engine where it is exact, the reference else or when `engine` asks for it."""

    def __init__(self, folder: str | Path, engine: str | None = None) -> None:
        self.folder = Path(folder)
        self.json = _tokenizer_json(self.folder)
        self._asked = engine

    @cached_property
    def _choice(self) -> tuple[str | None, str]:
        """The tokenizer.json for the fast engine, or None with the reason. Proven when first needed, in about a second."""
        return (None, "asked for") if self._asked == REFERENCE else self._prove_fast()

    @property
    def engine(self) -> str:
        """What encodes: "fastokens", or "tokenizers" with the reason."""
        return FAST if self._choice[0] is not None else f"{REFERENCE} ({self._choice[1]})"

    def use_reference(self, reason: str) -> None:
        """Give up the fast engine."""
        self._choice = (None, reason)

    def __getstate__(self) -> dict:
        """Pickled to worker processes without the engines, which are read again there (and not proven again)."""
        return {"folder": self.folder, "json": self.json, "_choice": self._choice}

    @cached_property
    def _fast(self):
        from fastokens._native import Tokenizer

        return Tokenizer.from_json_str(self._choice[0])

    @cached_property
    def reference(self):
        """The `tokenizers.Tokenizer`, without truncation and padding."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.reference.get_vocab(with_added_tokens=True).values())

    @cached_property
    def eod(self) -> int:
        """The id that ends a document: the tokenizer's eos. Raises UserError where the folder names none."""
        token = _eos_token(self.folder)
        if token is None:
            raise UserError(f"{self.folder}: tokenizer_config.json names no eos_token, which ends the documents")
        eod = self.reference.token_to_id(token)
        if eod is None:
            raise UserError(f"{self.folder}: the eos_token {token!r} of tokenizer_config.json is not in the vocabulary")
        return eod

    @cached_property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with whatever changes ids. Not with the engine, as the ids are the same."""
        return hashlib.blake2b(self.json.encode() + b"\0%d" % self.eod, digest_size=16).hexdigest()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after another (uint32 [tokens]) and the number of ids of each (int64 [texts]).

        No special tokens are added; those written in the text are recognised, as Hugging Face does. Raises IdsDiffer.
        """
        if self._choice[0] is None:
            return self._encode_reference(texts)
        try:
            ids, lengths = self._encode_fast(texts)
        except ValueError:  # a byte that the vocabulary cannot express, which the reference drops
            if len(texts) == 1:
                return self._encode_reference(texts)
            parts = [self.encode([text]) for text in texts]
            return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        sample = [text[:SAMPLE_CHARACTERS] for text in texts[len(texts) // 2 :][:1]]
        if not np.array_equal(self._encode_fast(sample)[0], self._encode_reference(sample)[0]):
            raise IdsDiffer(f"{FAST} differs from {REFERENCE} on the text that begins {sample[0][:40]!r}")
        return ids, lengths

    def _encode_fast(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._fast.encode_batch_flat(texts)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))

    def _encode_reference(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        lists = [encoding.ids for encoding in self.reference.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.concatenate([np.array(ids, np.uint32) for ids in lists]) if lists else np.empty(0, np.uint32)
        return ids, lengths

    def _prove_fast(self) -> tuple[str | None, str]:
        """The tokenizer.json that the fast engine is exact with, or None with the reason."""
        try:
            from fastokens._native import Tokenizer
        except ImportError:
            return None, f"{FAST} is not installed"
        texts = probe()
        expected = [encoding.ids for encoding in self.reference.encode_batch_fast(texts, add_special_tokens=False)]
        reason = ""
        for candidate in dict.fromkeys((_split_by_pattern(self.json), self.json)):
            try:
                fast = Tokenizer.from_json_str(candidate)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                reason = f"{FAST} cannot read this tokenizer: {str(error).splitlines()[0]}"
                continue
            different = [text for text, ids in zip(texts, expected, strict=True) if _ids_or_none(fast, text) not in (ids, None)]
            if not different:
                return candidate, ""
            reason = f"{FAST} differs from {REFERENCE} on {different[0][:40]!r}"
        return None, reason


def probe() -> list[str]:
    """Texts of many scripts, numbers, spaces and contractions that tell two encoders apart."""
    ranges = [
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x300, 0x370),
        (0x370, 0x530),
        (0x590, 0x700),
        (0x900, 0xDFF),
        (0xE00, 0xF00),
        (0x1100, 0x1120),
        (0x1E00, 0x2070),
        (0x20A0, 0x2190),
        (0x2460, 0x2500),
        (0x3000, 0x3100),
        (0x4E00, 0x4E80),
        (0xAC00, 0xAC80),
        (0xFE00, 0xFE70),
        (0xFF00, 0xFFF0),
        (0x1D400, 0x1D440),
        (0x1F300, 0x1F680),
        (0x1F900, 0x1FA00),
    ]
    texts = ["".join(map(chr, range(a, b))) for low, high in ranges for a in range(low, high, 32) for b in (min(a + 32, high),)]
    texts += [" ".join(text) for text in texts]
    spaces = ["", " ", "  ", "   ", "\t", "\n", "\n\n", " \n ", "\r\n", "\t\n ", "\u00a0", "\u3000", "\u2028", "\u200d"]
    words = [
        "",
        "word",
        "Über",
        "हिन्दी",
        "ಕನ್ನಡ",
        "漢字",
        "👩‍👩‍👧🏽",
        "12345",
        "٣٤",
        "½Ⅷ",
        "'s",
        "'LL",
        "don't",
        "x=1;",
        "...",
        "a\u0301",
    ]
    texts += [w + s + v + s for w in words for s in spaces for v in words]
    return texts + [
        "if x:\n    return  [1, 2.5]\n\n\n\tdef f(a,b):\n\t\tpass  # note\n" * 3,
        "ab" * 500,
        " " * 500 + "x",
        "\n" * 500,
    ]


def _ids_or_none(fast, text: str) -> list[int] | None:
    try:
        return np.frombuffer(fast.encode_batch_flat([text])[0], np.uint32).tolist()
    except ValueError:
        return None  # refused aloud: `encode` gives such a text to the reference


def _split_by_pattern(tokenizer_json: str) -> str:
    """The same tokenizer with the pattern inside ByteLevel written out as the Split it stands for, which fastokens compiles."""
    tokenizer = json.loads(tokenizer_json)
    stage = tokenizer.get("pre_tokenizer") or {}
    stages = stage.get("pretokenizers", []) if stage.get("type") == "Sequence" else []
    last = stages[-1] if stages else {}
    if last.get("type") != "ByteLevel" or not last.get("use_regex", True) or last.get("add_prefix_space", True):
        return tokenizer_json
    split = {"type": "Split", "pattern": {"Regex": _BYTE_LEVEL_PATTERN}, "behavior": "Isolated", "invert": False}
    stage["pretokenizers"] = [*stages[:-1], split, {**last, "use_regex": False}]
    return json.dumps(tokenizer)


def _tokenizer_json(folder: Path) -> str:
    """tokenizer.json of a folder; for a folder with another format, what transformers converts it to."""
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            from tokenizers import Tokenizer

            Tokenizer.from_str(text)
            return text
        if folder.is_dir():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer.to_str()
    except Exception as error:  # the libraries raise many kinds, plain Exception among them
        raise UserError(f"{folder}: the tokenizer cannot be read: {str(error).splitlines()[0]}") from None
    raise UserError(f"{folder}: no such folder: a tokenizer is a folder with tokenizer.json")


def _eos_token(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.is_file():
            try:
                token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
            except ValueError as error:
                raise UserError(f"{file}: not JSON: {error}") from None
            if token is not None:
                return token["content"] if isinstance(token, dict) else token
    return None
