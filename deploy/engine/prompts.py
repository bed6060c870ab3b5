"""Prompts as token ids: the model's chat template and tokenizer. Raises `Refused` for what they cannot say."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from deploy.engine.request import Refused
from nemo_ext.errors import UserError


def load_tokenizer(folder: Path):
    """The tokenizer of a Hugging Face folder. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the library raises many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {lines[0]}") from error


class Prompts:
    """Tokenises requests, in any thread."""

    def __init__(self, tokenizer, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()  # Rust's tokenizers are not for two threads at once

    @property
    def chat_template(self) -> str:
        """The template's text; empty where there is none."""
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    def text(self, text: str) -> tuple[int, ...]:
        """Ids of a text, with the tokens that the tokenizer puts before one."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused("the prompt is not Unicode: it has half of a surrogate pair") from None
        with self._lock:
            return self._checked(self._tokenizer.encode(text, verbose=False))

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

    def _checked(self, ids) -> tuple[int, ...]:
        if not ids:
            raise Refused("the prompt is empty")
        if wrong := next((id for id in ids if not 0 <= id < self._vocabulary), None):
            raise Refused(f"token {wrong} is not in the vocabulary of {self._vocabulary}")
        return tuple(ids)
