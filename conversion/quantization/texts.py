"""The text that calibrates and the text that measures: windows of token ids out of the same source, never the same document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nemo_ext.data import readers, sources, split, stdlib_docs
from nemo_ext.data.chat import formats as chat_formats
from nemo_ext.data.chat import records
from nemo_ext.errors import UserError

HELD_OUT = 4  # every so many documents by their hash
LONGEST_DOCUMENT = 200_000  # characters tokenised of one document


@dataclass(frozen=True)
class Texts:
    """Token ids `[windows, seq]`, int64: `calibration` and `heldout`."""

    calibration: torch.Tensor
    heldout: torch.Tensor


def windows(
    tokenizer: Any, calibration: str, heldout: str | None, *, samples: int, heldout_samples: int, seq: int, batch: int
) -> Texts:
    """Windows of `seq` tokens: documents in the order of their hashes, one after the other, with the tokenizer's end of text
    between.

    `calibration` and `heldout` are what `data=` understands: python-docs, text, JSONL of texts or of conversations (written with
    the tokenizer's chat template). Without `heldout`, every fourth document by its hash is held out. Raises UserError for a
    source that is missing or unreadable, or has less text than one batch of windows to calibrate and one window to measure.
    """
    parts: dict[bool, list[str]] = {False: [], True: []}
    chooser = split.Split(seed=0, below=2**64 // HELD_OUT)
    for hashed, text in sorted({(chooser.hash(text), text) for text in _texts(calibration, tokenizer)}):
        parts[heldout is None and hashed < chooser.below].append(text)
    if heldout is not None:
        measured = sorted({(chooser.hash(text), text) for text in _texts(heldout, tokenizer)})
        same = set(parts[False])
        parts[True] = [text for _, text in measured if text not in same]
        if not parts[True]:
            raise UserError(
                f"heldout={heldout}: every document of it is in calibration={calibration}: give other text to measure on"
            )
    calibrating = _cut(tokenizer, parts[False], samples, seq)
    if len(calibrating) < min(samples, batch):
        raise UserError(
            f"calibration={calibration} gives {len(calibrating)} windows of {seq} tokens, a batch has {min(samples, batch)}: "
            "give more text, or a smaller seq= or batch="
        )
    measuring = _cut(tokenizer, parts[True], heldout_samples, seq)
    if not len(measuring):
        raise UserError(
            f"heldout={heldout or calibration} holds out less than {seq} tokens: give more documents, heldout= or a smaller seq="
        )
    return Texts(calibrating, measuring)


def _cut(tokenizer: Any, texts: Iterable[str], count: int, seq: int) -> torch.Tensor:
    """The first `count` windows of the texts, `[n, seq]`; fewer where the text ends."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text[:LONGEST_DOCUMENT], add_special_tokens=False)["input_ids"] + end
        if len(ids) >= count * seq:
            break
    found = min(len(ids) // seq, count)
    return torch.tensor(ids[: found * seq], dtype=torch.int64).view(found, seq)


def _texts(data: str, tokenizer: Any) -> Iterator[str]:
    if data == "python-docs":
        yield from (text for _, text in stdlib_docs.documents())
        return
    for source in sources.parse(data):
        if _is_chat(source):
            yield from _conversations(source, tokenizer)
        else:
            for block in readers.plan(source, "text"):
                for batch in readers.batches(block, "text"):
                    yield from batch


def _is_chat(source: sources.Source) -> bool:
    """Whether the first record of a source of JSONL files is a conversation."""
    if not source.files or sources.file_kind(Path(source.files[0])) != "lines":
        return False
    for block in records.plan(source):
        for _, record in islice(records.records(block), 1):
            return isinstance(record, dict) and "text" not in record and chat_formats.detect(record) is not None
    return False


def _conversations(source: sources.Source, tokenizer: Any) -> Iterator[str]:
    if not tokenizer.chat_template:
        raise UserError(f"{source.name} holds conversations and the model has no chat template: give texts")
    for block in records.plan(source):
        for place, record in records.records(block):
            turns = [
                {"role": turn.role, "content": turn.content}
                for turn in chat_formats.parse(record, place).messages
                if turn.content and turn.role in ("system", "user", "assistant")
            ]
            yield tokenizer.apply_chat_template(turns, tokenize=False)
