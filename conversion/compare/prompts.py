"""What a comparison feeds to both models: text where there is a tokenizer, else random ids of a fixed seed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoint import Checkpoint
from conversion.compare import media
from conversion.compare.media import Media
from nemo_ext.errors import UserError

TEXTS = (
    "The Silk Road was not one road but many, and more ideas than bales of silk were carried along it.",
    "भारत की नदियाँ हिमालय से निकलकर मैदानों को सींचती हैं और समुद्र में मिल जाती हैं।",
    "ಕರ್ನಾಟಕದ ಪಶ್ಚಿಮ ಘಟ್ಟಗಳಲ್ಲಿ ಮಳೆಗಾಲದಲ್ಲಿ ಸಾವಿರಾರು ಜಲಪಾತಗಳು ಧುಮ್ಮಿಕ್ಕುತ್ತವೆ.",
    "def gcd(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return a\n",
    "17 + 25 = 42; 3.14159265358979; 1,048,576 bytes; 2026-11-22T15:04:05Z; 0x7fff",
)
RANDOM_LENGTHS = (64, 33, 7)
WINDOW_MARGIN = 16  # positions beyond a sliding window, so that its edge is in the prompt
LONGEST_WINDOW = 1024  # a longer one would need more memory for attention than the check of everything else


@dataclass(frozen=True)
class Prompt:
    """Token ids `[s]`, what the model sees or hears with them, and how people know them."""

    label: str
    ids: torch.Tensor
    media: Media | None = None  # that stands at the placeholders among the ids


@dataclass(frozen=True)
class Prompts:
    """What both models are given, and what the tokenizers say of each other."""

    prompts: list[Prompt]
    tokenizers: str  # what was compared
    failure: str | None = None  # how the tokenizers differ, in one line
    notes: tuple[str, ...] = ()


def choose(a: Checkpoint, b: Checkpoint, file: Path | None, max_tokens: int) -> Prompts:
    """The prompts for two checkpoints: the lines of `file`, the default texts, or random ids; at most `max_tokens` tokens each.

    Where both have a tokenizer, ids, special tokens and chat template of the two are compared. A sliding window up to
    `LONGEST_WINDOW` gets a prompt longer than it, and a sense one with random inputs. Raises UserError for a file that cannot be
    read or is empty, or texts without a tokenizer.
    """
    texts = _read(file) if file else list(TEXTS)
    vocabulary, longest = min(a.vocab_size, b.vocab_size), min(max_tokens, a.max_positions, b.max_positions)
    tokenizers = [_load(folder) for checkpoint in (a, b) if (folder := checkpoint.tokenizer)]
    failure, notes = None, []
    if tokenizers:
        ids = [[_ids(tokenizer, text) for text in texts] for tokenizer in tokenizers]
        prompts = [Prompt(text, torch.tensor(one[:longest])) for text, one in zip(texts, ids[0], strict=True) if one]
        if len(tokenizers) == 2:
            failure = _difference(*tokenizers, texts, *ids)
            said = "the tokenizers give the same ids, special tokens and chat template" if not failure else failure
        else:
            said = f"only {a if a.tokenizer else b} has a tokenizer"
        if beyond := [prompt for prompt in prompts if prompt.ids.max() >= vocabulary]:
            largest = int(beyond[0].ids.max())
            raise UserError(f"the tokenizer gives id {largest}, the models have {vocabulary}: they do not belong together")
    elif file:
        raise UserError(f"prompts={file} needs a tokenizer, and neither {a} nor {b} has one")
    else:
        said = "no tokenizer: random ids"
        prompts = [_random(seed, min(length, longest), vocabulary) for seed, length in enumerate(RANDOM_LENGTHS)]
    for window in sorted(_windows(a) | _windows(b)):
        enough = window + WINDOW_MARGIN
        if enough > max(len(prompt.ids) for prompt in prompts):
            if window <= LONGEST_WINDOW and enough <= min(a.max_positions, b.max_positions):
                prompts.append(_random(len(prompts), enough, vocabulary))
            else:
                notes.append(f"the sliding window of {window} tokens is longer than every prompt: its edge was not compared")
    if (senses := a.senses or b.senses) and a.senses == b.senses:
        prompts.append(Prompt(*media.prompt(senses, vocabulary)))
    elif senses:
        failure = failure or "only one has senses, or they are described differently: compared as text models"
    return Prompts(prompts, said, failure, tuple(notes))


def _read(file: Path) -> list[str]:
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise UserError(f"prompts={file} has no lines: write one prompt a line")
    return lines


def _random(seed: int, length: int, vocabulary: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(f"random ids, seed {seed}", torch.randint(vocabulary, (length,), generator=generator))


def _windows(checkpoint: Checkpoint) -> set[int]:
    try:
        window = checkpoint.architecture.sliding_window
    except UserError:  # a family without a table
        window = None
    return {window.size} if window else set()


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a broken file makes of it
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}") from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def _difference(a: Any, b: Any, texts: list[str], ids_a: list[list[int]], ids_b: list[list[int]]) -> str | None:
    for text, one, other in zip(texts, ids_a, ids_b, strict=True):
        if one != other:
            same = len(os.path.commonprefix([one, other]))
            parts = f"{one[same : same + 3]}, {other[same : same + 3]}"
            return f"the tokenizers differ: {text[:30]!r} has other ids from token {same} on ({parts})"
    if a.special_tokens_map != b.special_tokens_map:
        return f"the tokenizers' special tokens differ: {a.special_tokens_map}, {b.special_tokens_map}"
    if a.chat_template != b.chat_template:
        return "the tokenizers' chat templates differ"
    return None
