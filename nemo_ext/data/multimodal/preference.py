"""Preferences: a prompt with images and sounds, and two answers of which one was chosen.

answers      {"prompt" | "question" | "instruction", "chosen", "rejected", "image" | "images" | "audio" | "audios"}: texts, or
             lists of messages
turns        {"messages" | "conversations": the prompt's turns, "chosen": a turn, "rejected": a turn, "images"}
whole        {"chosen": [messages], "rejected": [messages]}: two conversations that differ in their last turn

Prepared as conversations are (`nemo_ext.data.multimodal.store`): every preference is two samples side by side, the chosen one
first, of which the last answer counts. One that does not fit is dropped with its other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_ext.data.chat.formats import Conversation as TextConversation
from nemo_ext.data.chat.records import Place
from nemo_ext.data.chat.render import Rendered, Settings
from nemo_ext.data.chat.store import ChatCorpus
from nemo_ext.data.multimodal import formats, module, records, render, store
from nemo_ext.data.multimodal.formats import Conversation
from nemo_ext.data.multimodal.inputs import Input
from nemo_ext.data.multimodal.media import Media
from nemo_ext.data.multimodal.store import Samples
from nemo_ext.data.sources import Source
from nemo_ext.errors import UserError

PROMPTS = ("prompt", "question", "instruction", "query", "messages", "conversations")
ANSWERS = ("chosen", "rejected")
Sample = tuple[np.ndarray, np.ndarray, list[Media]]


@dataclass(frozen=True)
class Preference(Conversation):
    """The chosen conversation, and the one it was preferred to, with the same media."""

    rejected: Conversation | None = None


def sides(record: Mapping[str, Any], place: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen and the rejected conversation of a record, as records of a prompt and its completion. Raises UserError, with
    `place`, where one is missing or both are the same."""
    for name in ANSWERS:
        if not record.get(name):
            raise UserError(f'{place}: no "{name}": a preference has a prompt, "chosen" and "rejected"')
    if record["chosen"] == record["rejected"]:
        raise UserError(f"{place}: chosen and rejected are the same")
    prompt = next((record[name] for name in PROMPTS if record.get(name)), None)
    rest = {name: value for name, value in record.items() if name not in (*PROMPTS, *ANSWERS)}
    found = []
    for name in ANSWERS:
        answer = _turns(record[name])
        before = _turns(prompt)
        if isinstance(answer, list) and len(answer) > 1 and before is None:
            before, answer = answer[:-1], answer[-1:]
        if before is None:
            raise UserError(f"{place}: no prompt: one of {', '.join(PROMPTS)}, or {name} as a whole conversation")
        found.append({**rest, "prompt": before, "completion": answer})
    if found[0]["prompt"] != found[1]["prompt"]:
        raise UserError(f"{place}: chosen and rejected answer different prompts")
    return found[0], found[1]


def _turns(value: Any) -> Any:
    """Turns as messages, texts as they are."""
    if isinstance(value, Mapping):
        return [_turn(value)]
    return [_turn(turn) for turn in value] if isinstance(value, (list, tuple)) else value


def _turn(turn: Any) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    return {"role": turn["from"], "content": turn.get("value")}


class Reader(records.Reader):
    """`columns` may name prompt, chosen, rejected, and the fields of media."""

    def __post_init__(self) -> None:
        known = ("prompt", *ANSWERS, *formats.MEDIA_COLUMNS)
        if unknown := [name for name in self.columns if name not in known]:
            raise UserError(f"columns={unknown[0]}: unknown: give {', '.join(known)}")
        self.check_folder()

    def key(self, source: Source) -> list[Any]:
        return [*super().key(source), "preference"]

    def _parse(self, record: dict, place: Place, folder: Path, inline: Any) -> Preference:
        renamed = {name: record.get(field) for name, field in self.columns.items() if name not in formats.MEDIA_COLUMNS}
        media_columns = {name: field for name, field in self.columns.items() if name in formats.MEDIA_COLUMNS}
        found: dict[int, Media] = {}  # both sides name the same values

        def media(modality: str, value: Any) -> Media:
            if id(value) not in found:
                found[id(value)] = self._media(modality, value, folder, inline)
            return found[id(value)]

        chosen, rejected = (formats.parse(side, place, media_columns, media) for side in sides({**record, **renamed}, place))
        fields = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
        return Preference(**{**fields, "format": "preference"}, rejected=rejected)


class Renderer(render.Renderer):
    """Both sides of a preference, or none."""

    def render(self, conversation: TextConversation) -> Rendered:
        assert isinstance(conversation, Preference) and conversation.rejected is not None
        both = [super(Renderer, self).render(each) for each in (conversation, conversation.rejected)]
        dropped = next((each.dropped for each in both if each.dropped), "")
        return Rendered((), dropped=dropped) if dropped else Rendered(tuple(each.samples[0] for each in both))


class Pairs(Samples):
    """The preferences of one side of a source: (chosen, rejected), each (ids, weights, media)."""

    def __len__(self) -> int:
        return super().__len__() // 2

    def __reduce__(self) -> tuple:
        return Pairs, (self.prefix,)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer sample of each, int64 [pairs]."""
        return np.diff(self.starts).reshape(-1, 2).max(1)

    def __getitem__(self, number: int) -> tuple[Sample, Sample]:  # type: ignore[override]
        return super().__getitem__(2 * number), super().__getitem__(2 * number + 1)


def prepare(
    sources: Iterable[Source], tokenizer_dir: str | Path, cache_dir: str | Path, settings: Settings, inputs: Iterable[Input],
    **options: Any,
) -> ChatCorpus:  # fmt: skip
    """`multimodal.store.prepare` for preferences; what is too long is dropped, whatever `settings` say."""
    settings = dataclasses.replace(settings, train_on="last", overlong="drop")
    return store.prepare(sources, tokenizer_dir, cache_dir, settings, inputs, reader=Reader, renderer=Renderer, **options)


class PreferenceDataModule(module.MultimodalDataModule):
    """MultimodalDataModule of preferences: a micro batch of b preferences has 2 b rows, chosen and rejected in turn, unpacked."""

    samples = Pairs

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **{**named, "pack": False})

    def _rows(self, eod: int, unit: int, attention: str) -> _PairRows:
        return _PairRows(super()._rows(eod, unit, attention))

    def _collate(self) -> _PairCollate:
        return _PairCollate(self.senses)


class _PairRows:
    """A row builder of two rows at once."""

    def __init__(self, rows: module.RowBuilder) -> None:
        self.rows, self.seq_length = rows, rows.seq_length

    def row(self, documents: Sequence[tuple[Sample, Sample]], counts: bool = True) -> list[dict[str, torch.Tensor]]:
        (pair,) = documents
        return [self.rows.row([sample], counts) for sample in pair]

    def weight(self, documents: Sequence[tuple[Sample, Sample]]) -> int:
        return sum(self.rows.weight([sample]) for pair in documents for sample in pair)


class _PairCollate(module.Collate):
    def __call__(self, rows: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return super().__call__([row for pair in rows for row in pair])
