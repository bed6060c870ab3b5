"""Answers of several turns: the model calls tools, their results follow in the chat template's form, and it goes on.

The model's own tokens are kept as it sampled them. What comes between two of its turns is what the template writes behind a turn
that calls these tools: their results, and the beginning of the next turn. Those tokens are read, but not learnt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nemo_ext.data.chat.formats import Conversation, Message
from nemo_ext.data.chat.render import Renderer
from nemo_ext.errors import UserError
from nemo_ext.grpo.tools import Result, Tools
from nemo_ext.tool_calls import TAGS, ToolCall, parse

Generate = Callable[[list[list[int]], int, int], tuple[list[list[int]], list[list[float]] | None]]


@dataclass
class Answer:
    """All that follows a prompt. `own` is 1 at the model's tokens and 0 at those of tools; `log_probs` of the sampler, where it
    gives them. `text` is what the model said last, without calls; `messages` are its turns and the tools', as chat messages."""

    ids: list[int]
    own: list[int]
    text: str
    log_probs: list[float] | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: int = 1
    calls: int = 0
    failures: int = 0
    failure: str | None = None  # the first

    @property
    def length(self) -> int:
        """Tokens of the model."""
        return sum(self.own)

    @property
    def shown(self) -> str:
        """For people: the text, or all turns with their calls and results."""
        if len(self.messages) < 2:
            return self.text
        lines = []
        for message in self.messages:
            lines += [f"[{message['name']}: {message['content']}]"] if message["role"] == "tool" else [message["content"]]
            lines += [f"[calls {call['name']} {call['arguments']}]" for call in message.get("tool_calls", ())]
        return "\n".join(filter(None, lines))


class Conversations:
    """Samples answers of at most `max_answer` tokens, which end with one of `ends`; with `tools`, of at most `turns` turns and so
    many tokens together, those of the tools included, in the chat template of `renderer`. `calling` is entered while tools
    work."""

    def __init__(
        self,
        tokenizer: Any,
        max_answer: int,
        ends: Sequence[int],
        turns: int = 1,
        tools: Tools | None = None,
        renderer: Renderer | None = None,
        calling: Callable[[], Any] = contextlib.nullcontext,
    ) -> None:
        self.tokenizer, self.max_answer, self.ends = tokenizer, max_answer, set(ends)
        self.turns, self.tools, self.renderer, self.calling = turns, tools, renderer, calling

    def answers(self, prompts: Sequence[list[int]], group: int, generate: Generate) -> list[Answer]:
        """An answer to each of `prompts` (token ids), of which `group` in a row are the same.

        `generate(prompts, group, limit)` samples a turn of at most `limit` tokens for each: ids, and log-probabilities or None.
        """
        ids, log_probs = generate(list(prompts), group, self.max_answer)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers = [Answer(each, [1] * len(each), text) for each, text in zip(ids, texts, strict=True)]
        for answer, each in zip(answers, log_probs or [], strict=False):
            answer.log_probs = each
        if self.tools is None:
            return answers
        said = self._said(answers, ids)
        for turn in range(2, self.turns + 1):
            going = [place for place, calls in enumerate(said) if calls]
            if not going:
                break
            with self.calling():
                results = self.tools.call([said[place] for place in going])
            going = [place for place, found in zip(going, results, strict=True) if self._hear(answers[place], said[place], found)]
            said = [[] for _ in answers]
            if not going:
                break
            rooms = [self.max_answer - len(answers[place].ids) for place in going]
            ids, log_probs = generate([prompts[place] + answers[place].ids for place in going], 1, max(rooms))
            ids = [each[:room] for each, room in zip(ids, rooms, strict=True)]
            for place, each, probs in zip(going, ids, log_probs or [None] * len(ids), strict=True):
                answer = answers[place]
                answer.ids, answer.own, answer.turns = answer.ids + each, answer.own + [1] * len(each), turn
                if probs is not None:
                    answer.log_probs = answer.log_probs + probs[: len(each)]
            for place, calls in zip(going, self._said([answers[place] for place in going], ids), strict=True):
                said[place] = calls
        return answers

    def _said(self, answers: Sequence[Answer], ids: Sequence[list[int]]) -> list[list[ToolCall]]:
        """Add the turns `ids` to `answers`; the calls in each that ended."""
        calls = []
        for answer, each in zip(answers, ids, strict=True):
            found: list[ToolCall] = []
            if each[-1] in self.ends:
                found = self.calls(self.tokenizer.decode(each[:-1]))
            answer.text = without_calls(self.tokenizer.decode(each, skip_special_tokens=True), found)
            answer.messages.append(spoken(answer.text, found))
            calls.append(found)
        return calls

    def calls(self, said: str) -> list[ToolCall]:
        """The calls of a turn that has ended: all that are marked as calls, or unmarked ones of tools that there are."""
        return parse(said, None if any(tag in said for tag in TAGS) else self._known)[1]

    def _hear(self, answer: Answer, calls: Sequence[ToolCall], results: Sequence[Result]) -> bool:
        """Add the results of its calls to an answer; False where they leave no room for a further turn: it is cut off."""
        answer.calls += len(calls)
        answer.failures += sum(result.failed for result in results)
        answer.failure = answer.failure or next((result.text for result in results if result.failed), None)
        answer.messages += told(calls, results)
        ids = self.between(calls, [result.text for result in results])
        room = self.max_answer - len(answer.ids)
        if full := len(ids) >= room:
            ids = ids[:room]
            while ids and ids[-1] in self.ends:  # it did not end by itself
                ids.pop()
        answer.ids, answer.own = answer.ids + ids, answer.own + [0] * len(ids)
        if answer.log_probs is not None:
            answer.log_probs = answer.log_probs + [0.0] * len(ids)
        return not full

    def between(self, calls: Sequence[ToolCall], results: Sequence[str]) -> list[int]:
        """Token ids of `text_between`."""
        return self.tokenizer.encode(self.text_between(calls, results), add_special_tokens=False)

    def text_between(self, calls: Sequence[ToolCall], results: Sequence[str]) -> str:
        """What the template writes between a turn with `calls` and the next: behind the token that ends the turn, the results,
        and the beginning of the assistant's turn. Raises UserError for a template that has no such place."""
        names = [call.name if call.name in self._known else "unknown" for call in calls]  # arguments are behind us anyway
        asked = tuple({"name": name, "arguments": {}, "id": f"call{place:05d}"} for place, name in enumerate(names))
        answered = [
            Message("tool", text, call_id=call["id"], name=call["name"]) for call, text in zip(asked, results, strict=True)
        ]
        talk = Conversation((Message("user", "?"), Message("assistant", "", calls=asked), *answered), tuple(self.tools.schemas))
        before, after = self.renderer.text(talk, 2), self.renderer.text(talk, prompt=True)
        before = before.rstrip()
        if not before.endswith(self._special) or not after.startswith(before):
            raise UserError(
                f"tools: the chat template ({self.renderer.name}) does not end a turn that calls tools with a special token, or "
                "rewrites it once its results follow: choose another with template=, such as template=chatml"
            )
        return after[len(before) :]

    @cached_property
    def _known(self) -> tuple[str, ...]:
        """The tools' names."""
        return tuple(schema["function"]["name"] for schema in self.tools.schemas)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """Special tokens as text."""
        return tuple(token.content for token in self.tokenizer.added_tokens_decoder.values())


def with_turns(rows: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """`rows` as rewards read them: with all turns of an answer as `messages`, where there are tools."""
    return [{**row, "messages": answer.messages} if answer.messages else row for row, answer in zip(rows, answers, strict=True)]


def without_calls(said: str, calls: Sequence[ToolCall]) -> str:
    """What a turn says beside its `calls`, and beside the beginning of a call that is none."""
    text = parse(said, {call.name for call in calls})[0] if calls else said
    for tag in TAGS:
        text = text.partition(tag)[0]
    return text


def spoken(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """A turn of the model as a chat message; the arguments of its calls are JSON text."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return message


def told(calls: Sequence[ToolCall], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as chat messages."""
    return [{"role": "tool", "name": call.name, "content": result.text} for call, result in zip(calls, results, strict=True)]


def check_template(renderer: Renderer, tools: Tools) -> None:
    """Refuse a template that shows the model no tools, or no results. Raises UserError."""
    schemas, talk = tools.schemas, (Message("user", "?"),)
    if renderer.text(Conversation(talk, tuple(schemas)), prompt=True) == renderer.text(Conversation(talk), prompt=True):
        raise UserError(f"tools: the chat template ({renderer.name}) shows the model no tools: template=chatml does")
    call = ToolCall(schemas[0]["function"]["name"], "{}")
    conversations = Conversations(renderer.tokenizer, 1, (), 2, tools, renderer)
    if conversations.between([call], ["one"]) == conversations.between([call], ["two"]):
        raise UserError(f"tools: the chat template ({renderer.name}) shows the model no results: template=chatml does")
