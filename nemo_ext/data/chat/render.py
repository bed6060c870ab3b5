"""Conversations as token ids with a loss weight each, by the tokenizer's own chat template.

The text that counts is found by rendering, not by searching: the assistant's turn k begins where the text of the messages before
it ends, rendered with the template's generation prompt, and ends where the text of the messages up to it ends. A turn is trained
through the special token that ends it, not through the line break that may follow. The conversation is tokenised once, as a
whole, and a token counts if any of its characters does. Templates that mark the assistant's text with {% generation %} are taken
at their word.

Some templates write the same turn differently once more turns follow: they remove earlier reasoning, or move the tools. Then the
text up to a turn is not the beginning of the text up to the next one, and the conversation becomes several samples: each trains
the turns whose text is what the model sees when it has to write them.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nemo_ext.data.chat import templates
from nemo_ext.data.chat.formats import Conversation, Message
from nemo_ext.errors import UserError

UNIT = 100  # weights are stored in hundredths
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\u27e6where the turn begins\u27e7"  # stands for an assistant's text where a template's prompt does not lead to it


@dataclass(frozen=True)
class Settings:
    """How conversations become samples; all of it is part of the cache's key.

    `template`: None for the tokenizer's own (or chatml where it has none), a name of `templates.TEMPLATES`, or a file.
    `train_on`: which turns count: the assistant's, all text, or the assistant's last turn. `overlong`: what happens to samples of
    more than `seq_length` + 1 tokens. `reasoning`: keep or drop. `values` are handed to the template, e.g. enable_thinking.
    """

    seq_length: int
    template: str | None = None
    train_on: Literal["assistant", "all", "last"] = "assistant"
    overlong: Literal["truncate", "drop"] = "truncate"
    reasoning: Literal["keep", "drop"] = "keep"
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = {"train_on": ("assistant", "all", "last"), "overlong": ("truncate", "drop"), "reasoning": ("keep", "drop")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise UserError(f"{name}={getattr(self, name)}: choose {', '.join(values)}")


@dataclass(frozen=True)
class Sample:
    """One sequence to train on. `ids`, and of the same length `weights` in hundredths: what the loss on each token counts.
    `extra` is what else belongs to it, as stored."""

    text: str
    ids: np.ndarray  # int64 [tokens]
    weights: np.ndarray  # uint16 [tokens]
    extra: bytes = b""


@dataclass(frozen=True)
class Rendered:
    """The samples of a conversation, and what was done to it: `split` into several as its template rewrites history, `truncated`
    by turns, or, without samples, `dropped` because it is "overlong" or "masked" (no token counts)."""

    samples: tuple[Sample, ...]
    split: bool = False
    truncated: bool = False
    dropped: Literal["", "overlong", "masked"] = ""


class Renderer:
    """Renders conversations with the tokenizer of a folder. Pickled to worker processes without the tokenizer."""

    extras = False  # whether samples have an `extra`

    def __init__(self, folder: str | Path, settings: Settings) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self.name, self.template = self._choose()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("folder", "settings", "name", "template")}

    @cached_property
    def tokenizer(self):
        """transformers' tokenizer of the folder."""
        from transformers import AutoTokenizer

        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder: a tokenizer is a folder with tokenizer.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, use_fast=True)
        except Exception as error:  # the library raises many kinds
            raise UserError(f"{self.folder}: the tokenizer cannot be read: {str(error).splitlines()[0]}") from None
        if not tokenizer.is_fast:
            raise UserError(f"{self.folder}: the tokenizer does not say where tokens stand in a text: it needs a tokenizer.json")
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return tokenizer

    def _choose(self) -> tuple[str, dict[str, str]]:
        """The template's name for people and its text, by the names "default" and perhaps "tool_use"."""
        wanted, own = self.settings.template, self.tokenizer.chat_template
        if wanted is None and own:
            return "the tokenizer's own", own if isinstance(own, dict) else {"default": own}
        name = wanted or templates.DEFAULT
        if name in templates.TEMPLATES:
            return name, {"default": self._named(name)}
        if Path(name).is_file():
            return name, {"default": Path(name).read_text(encoding="utf-8")}
        raise UserError(f"template={name}: neither a file nor one of {', '.join(templates.TEMPLATES)}")

    def _named(self, name: str) -> str:
        tokenizer = self.tokenizer
        if tokenizer.eos_token is None:
            raise UserError(f"{self.folder}: tokenizer_config.json names no eos_token, which ends a turn")
        begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return templates.named(
            name, bos=tokenizer.bos_token if begins else None, eos=tokenizer.eos_token, vocabulary=tokenizer.get_vocab()
        )

    @cached_property
    def fingerprint(self) -> str:
        """Changes with whatever changes ids or weights of a conversation."""
        settings = {**self.settings.__dict__, "template": self.template}
        content = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.special_tokens_map, settings]
        return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

    @cached_property
    def _special(self) -> frozenset[int]:
        """Ids of tokens that are no ordinary text: those that templates end turns with are among them."""
        return frozenset(self.tokenizer.added_tokens_decoder)

    @cached_property
    def _reasoning_field(self) -> str | None:
        """The field of a message from which the template takes reasoning, None where it knows none."""
        text = "".join(self.template.values())
        return next((n for n in ("reasoning_content", "thinking") if re.search(rf"""(\.|['"]){n}\b""", text)), None)

    @cached_property
    def _values(self) -> dict[str, Any]:
        """What templates may name beside the conversation: special tokens, and the settings' values."""
        return {**self.tokenizer.special_tokens_map, **self.settings.values}

    # Text

    def text(self, conversation: Conversation, count: int | None = None, prompt: bool = False) -> str:
        """The first `count` messages (all by default) as the template writes them, with its generation prompt if asked for.

        Raises UserError where the template refuses them.
        """
        return self._render(conversation, conversation.messages[:count], prompt)[0]

    def _render(
        self, conversation: Conversation, messages: Sequence[Message], prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Text, and the character ranges of {% generation %} blocks where the template has them."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.template.get("tool_use") if conversation.tools else None
        template = template or self.template.get("default") or next(iter(self.template.values()))
        marked = _GENERATION.search(template) is not None
        try:
            texts, ranges = render_jinja_template(
                [[self._as_dict(message) for message in messages]],
                tools=list(conversation.tools) or None,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self._values,
            )
        except TemplateError as error:
            raise UserError(f"the chat template ({self.name}) refuses the conversation: {str(error).splitlines()[0]}") from None
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"the chat template ({self.name}) fails: {type(error).__name__}: {error}") from None
        return texts[0], ranges[0] if marked else None

    def _as_dict(self, message: Message) -> dict[str, Any]:
        """A message as templates take it."""
        result: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning and self.settings.reasoning == "keep":
            if self._reasoning_field:
                result[self._reasoning_field] = message.reasoning
            else:
                result["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"
        if message.calls:
            result["tool_calls"] = [
                {"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
                | ({"id": c["id"]} if c["id"] else {})
                for c in message.calls
            ]
        if message.call_id:
            result["tool_call_id"] = message.call_id
        if message.name:
            result["name"] = message.name
        return result

    # Samples

    def render(self, conversation: Conversation) -> Rendered:
        """The samples of a conversation. Raises UserError where the template refuses it or leaves a turn's text out."""
        turns = [k for k, message in enumerate(conversation.messages) if message.role == "assistant"]
        if self.settings.train_on == "last":
            trained = [turns[-1]] if _weight(conversation.messages[turns[-1]]) else []
        else:
            trained = [k for k in turns if _weight(conversation.messages[k])]
        if self.settings.train_on == "all":
            groups = [[len(conversation.messages) - 1]]
        elif trained:
            groups = self._groups(conversation, trained)
        else:
            return Rendered((), dropped="masked")
        samples, truncated = [], False
        for group in groups:
            sample, shorter = self._fitting(conversation, group, turns)
            truncated |= shorter
            if sample is not None:
                samples.append(sample)
        if not samples or truncated and self.settings.overlong == "drop":
            return Rendered((), dropped="overlong")
        samples = [sample for sample in samples if sample.weights[1:].any()]  # nothing predicts the first token
        if not samples:
            return Rendered((), dropped="masked")
        return Rendered(tuple(samples), split=len(groups) > 1, truncated=truncated)

    def _groups(self, conversation: Conversation, trained: list[int]) -> list[list[int]]:
        """The trained turns in groups whose texts continue one another: one group, unless the template rewrites history."""
        groups = [[trained[0]]]
        before = self.text(conversation, trained[0] + 1)
        for turn in trained[1:]:
            text = self.text(conversation, turn + 1)
            if text.startswith(_without_trailing_space(before)):
                groups[-1].append(turn)
            else:
                groups.append([turn])
            before = text
        return groups

    def _fitting(self, conversation: Conversation, group: list[int], turns: list[int]) -> tuple[Sample | None, bool]:
        """The sample of a group, and whether turns at its end had to go to make it fit."""
        limit = self.settings.seq_length + 1  # the last token is only predicted

        def tokenised(group: list[int]) -> tuple:
            text, marked = self._render(conversation, conversation.messages[: group[-1] + 1])
            return text, marked, *self._encode(conversation, text)

        whole = tokenised(group)
        if len(whole[-1]) <= limit:
            return self._sample(conversation, group, *whole), False
        if self.settings.overlong == "drop":
            return None, True
        if self.settings.train_on == "all":  # end on an assistant's turn, trained or not
            shorter = [[turn] for turn in turns if turn < group[-1]]
        else:
            shorter = [group[:count] for count in range(1, len(group))]
        fitting = bisect.bisect_left(shorter, True, key=lambda each: len(tokenised(each)[-1]) > limit)
        if not fitting:
            return None, True
        group = shorter[fitting - 1]
        return self._sample(conversation, group, *tokenised(group)), True

    def _encode(self, conversation: Conversation, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a text that begins the conversation: ids int64 [tokens], and their characters int64 [tokens, 2]."""
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def _sample(
        self, conversation: Conversation, group: list[int], text: str, marked: list | None, ids: np.ndarray, offsets: np.ndarray
    ) -> Sample:
        """The text up to the group's last turn and its tokens, with the weights of its turns."""
        messages = conversation.messages[: group[-1] + 1]
        if self.settings.train_on == "all":
            weights = np.full(len(ids), UNIT, np.uint16)
            group = [k for k, message in enumerate(messages) if message.role == "assistant" and message.weight is not None]
        else:
            weights = np.zeros(len(ids), np.uint16)
        for turn in group:
            start, end = self._span(conversation, turn, text)
            counts = (offsets[:, 0] < end) & (offsets[:, 1] > start)
            if marked is not None:
                inside = [(offsets[:, 0] < b) & (offsets[:, 1] > a) for a, b in marked]
                counts &= np.any(inside, axis=0) if inside else False
            else:
                counts &= _through_last_special(text, ids, offsets, counts, self._special)
            weights[counts] = round(_weight(messages[turn]) * UNIT)
        return Sample(text, ids, weights)

    def _span(self, conversation: Conversation, turn: int, text: str) -> tuple[int, int]:
        """The characters [start, end) of an assistant's turn in `text`, which begins with the messages up to it."""
        upto = text if turn == len(conversation.messages) - 1 else self.text(conversation, turn + 1)
        if not text.startswith(_without_trailing_space(upto)):
            upto = text  # rewritten by what follows: only train_on=all asks for such turns
        prompt = self.text(conversation, turn, prompt=True)
        if not text.startswith(prompt):
            message = conversation.messages[turn]
            probe = Message("assistant", _PROBE, calls=message.calls)
            probed, _ = self._render(conversation, [*conversation.messages[:turn], probe])
            prompt = probed.partition(_PROBE)[0]
            if _PROBE not in probed or not text.startswith(prompt):
                raise UserError(
                    f"the chat template ({self.name}) does not show where turn {turn + 1}, of the assistant, begins: its text "
                    "does not continue the text before it; choose another with template="
                )
        self._check_reasoning(conversation.messages[turn], upto[len(prompt) :])
        return len(prompt), min(len(upto), len(text))

    def _check_reasoning(self, message: Message, text: str) -> None:
        if message.reasoning and self.settings.reasoning == "keep" and message.reasoning.strip() not in text:
            raise UserError(
                f"the chat template ({self.name}) leaves out the reasoning of the turn it is to train: choose another with "
                "template=, or reasoning=drop"
            )


def _through_last_special(
    text: str, ids: np.ndarray, offsets: np.ndarray, counts: np.ndarray, special: frozenset[int]
) -> np.ndarray:
    """Tokens up to the last special one that counts, if nothing but white space follows it in the turn: what ends the turn."""
    inside = np.flatnonzero(counts)
    for token in reversed(inside):
        if int(ids[token]) in special:
            return np.arange(len(ids)) <= token
        if text[offsets[token, 0] : offsets[token, 1]].strip():
            break
    return np.ones(len(ids), bool)


def _without_trailing_space(text: str) -> str:
    """A turn's text ends in white space or not depending on whether another follows."""
    return text.rstrip()


def _weight(message: Message) -> float:
    return 1.0 if message.weight is None else message.weight
