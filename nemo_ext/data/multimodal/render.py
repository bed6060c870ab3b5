"""Conversations with media as token ids: each marker is one placeholder for every embedding that its image or sound gives."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemo_ext.data.chat import formats, render
from nemo_ext.data.chat.render import Rendered, Sample, Settings
from nemo_ext.data.multimodal.formats import MARKERS
from nemo_ext.data.multimodal.media import Media, to_json
from nemo_ext.errors import UserError


class Renderer(render.Renderer):
    """Renders conversations with media. `placeholders` are the senses' token ids by modality.

    The template sees the placeholder token's own text where a marker stood; after tokenising, this one token is repeated. Nothing
    that is a placeholder is ever learnt.
    """

    extras = True

    def __init__(self, folder: str | Path, settings: Settings, placeholders: dict[str, int]) -> None:
        self.placeholders = dict(placeholders)
        super().__init__(folder, settings)
        for modality, token in self.placeholders.items():
            if token not in self.tokenizer.added_tokens_decoder:
                raise UserError(f"{folder}: the placeholder of {modality}, token {token}, is not an added token of the tokenizer")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "placeholders": self.placeholders}

    @cached_property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} {sorted(self.placeholders.items())}"

    @cached_property
    def _texts(self) -> dict[str, str]:
        """The placeholder's text for each marker."""
        return {MARKERS[m]: self.tokenizer.convert_ids_to_tokens(token) for m, token in self.placeholders.items()}

    def render(self, conversation: formats.Conversation) -> Rendered:
        if not _media(conversation) or all(marker == text for marker, text in self._texts.items()):
            return super().render(conversation)
        messages = tuple(dataclasses.replace(m, content=self.marked(m.content)) for m in conversation.messages)
        return super().render(dataclasses.replace(conversation, messages=messages))

    def marked(self, text: str) -> str:
        """A text whose markers are the placeholders' own texts."""
        pattern = "|".join(map(re.escape, self._texts))
        return re.sub(pattern, lambda match: self._texts[match[0]], text)

    def _encode(self, conversation: formats.Conversation, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = super()._encode(conversation, text)
        return expand(ids, offsets, _media(conversation), self.placeholders)

    def _sample(self, conversation: formats.Conversation, *arguments: Any) -> Sample:
        sample = super()._sample(conversation, *arguments)
        places = np.isin(sample.ids, list(self.placeholders.values()))
        sample.weights[places] = 0
        media = _media(conversation)
        ends = np.cumsum([0, *(m.tokens for m in media)])
        return dataclasses.replace(sample, extra=to_json(media[: int(np.searchsorted(ends, places.sum()))]))


def expand(
    ids: np.ndarray, offsets: np.ndarray, media: Iterable[Media], placeholders: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [tokens], and rows of `offsets` with them, in which each placeholder stands once per embedding of its image or sound.

    The text may end before all `media` came. Raises UserError where it has others than these.
    """
    media = list(media)
    places = np.flatnonzero(np.isin(ids, list(placeholders.values())))
    expected = [placeholders[m.modality] for m in media[: len(places)]]
    if ids[places].tolist() != expected:
        raise UserError(f"the text has {len(places)} placeholders of images and sounds for {len(media)} of them")
    repeats = np.ones(len(ids), np.int64)
    repeats[places] = [m.tokens for m in media[: len(places)]]
    return np.repeat(ids, repeats), np.repeat(offsets, repeats, axis=0)


def _media(conversation: formats.Conversation) -> tuple[Media, ...]:
    return getattr(conversation, "media", ())
