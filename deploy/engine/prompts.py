"""Prompts as token ids: the model's chat template and tokenizer. Raises `Refused` for what they cannot say."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.engine.request import Refused
from nemo_ext.errors import UserError

if TYPE_CHECKING:
    from deploy.engine.media import Media, Medium

_PARTS = re.compile(r"""['"]type['"]|\.type\b""")  # in a chat template that takes content as parts


def load_tokenizer(folder: Path):
    """The tokenizer of a Hugging Face folder. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the library raises many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {lines[0]}") from error


def _flat(content: str | list[dict[str, str]], mark: str) -> str:
    """Parts as one text, with a line of `mark` for an image or a sound."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else f"{mark}\n" for part in content)


class Prompts:
    """Tokenises requests, in any thread."""

    def __init__(self, tokenizer, vocabulary: int, media: Media | None = None) -> None:
        """`media` of a model that sees or hears."""
        self.media = media
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()  # Rust's tokenizers are not for two threads at once

    @property
    def chat_template(self) -> str:
        """The template's text; empty where there is none."""
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    @property
    def parts_only(self) -> bool:
        """Whether the template of a model that sees or hears takes content as parts, and not as text."""
        template = self.chat_template
        return self.media is not None and bool(_PARTS.search(template)) and "is string" not in template

    def text(self, text: str) -> tuple[int, ...]:
        """Ids of a text, with the tokens that the tokenizer puts before one."""
        return self._encode(text)

    def word(self, text: str) -> tuple[tuple[int, ...], ...]:
        """Spellings of a word as ids: as it is, and after a space."""
        return tuple({self._encode(each, add_special_tokens=False): None for each in (text, f" {text}")})

    def ids(self, ids: list[int]) -> tuple[int, ...]:
        """Ids given as such."""
        return self._checked(ids)

    def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> tuple[int, ...]:
        """Ids of a conversation up to where the assistant answers, as the chat template writes it."""
        if not self.chat_template:
            raise Refused("this model has no chat template: use /v1/completions")
        if tools and "tools" not in self.chat_template:
            raise Refused("this model's chat template knows no tools", "unsupported_value")
        with self._lock:
            try:
                ids = self._tokenizer.apply_chat_template(messages, tools=tools or None, add_generation_prompt=True)
            except Exception as error:  # templates raise by their own raise_exception, and whatever Python does
                raise Refused(f"the chat template does not take these messages: {' '.join(str(error).split())[:300]}") from None
        return self._checked(ids)

    def chat_with_media(
        self, messages: list[dict[str, Any]], sources: list[tuple[str, str]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[tuple[int, ...], tuple[Medium, ...]]:
        """Ids of a conversation whose messages have content of parts, {"type": "image"} or {"type": "audio"} for each of
        `sources` in order, (the API's type of content, what it says), and the media themselves; each has as many placeholders in
        the ids as embeddings."""
        if self.media is None:
            raise Refused(f"this model reads text only: content of type {sources[0][0]} is not served", "unsupported_value")
        self.media.check([kind for kind, _ in sources])
        if not _PARTS.search(self.chat_template):
            mark = self._tokenizer.convert_ids_to_tokens(self.media.sense.token_id)
            messages = [message | {"content": _flat(message["content"], mark)} for message in messages]
        ids = self.chat(messages, tools)
        media = tuple(self.media.made(source) for _, source in sources)
        return self.media.expand(ids, media), media

    def _encode(self, text: str, **more: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused("the prompt is not Unicode: it has half of a surrogate pair") from None
        with self._lock:
            return self._checked(self._tokenizer.encode(text, verbose=False, **more))

    def _checked(self, ids) -> tuple[int, ...]:
        if not ids:
            raise Refused("the prompt is empty")
        if wrong := next((id for id in ids if not 0 <= id < self._vocabulary), None):
            raise Refused(f"token {wrong} is not in the vocabulary of {self._vocabulary}")
        return tuple(ids)
