"""Answers of a model to prompts, compared with references.

A record is {"prompt", "reference" or "references"}, or a conversation in any format that training reads, of which the last turn
of the assistant is the reference and what stands before it the prompt. Prompts go through the tokenizer's chat template where
it has one; without one the prompt's text is continued as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_ext.data.chat import formats, records
from nemo_ext.data.sources import Source
from nemo_ext.errors import UserError
from nemo_ext.evaluation import text_metrics
from nemo_ext.evaluation.model import Answer, Model, Progress
from nemo_ext.evaluation.results import Result

PROMPTS = ("prompt", "question", "instruction", "input", "query")
REFERENCES = ("references", "reference", "target", "ground_truth")
EXAMPLES = 5


@dataclass(frozen=True)
class Prompt:
    """`messages` end with the user's turn; `references` is empty where the record has none."""

    messages: tuple[dict[str, str], ...]
    references: tuple[str, ...]
    place: str

    @property
    def text(self) -> str:
        """The prompt for people."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def read(source: Source, limit: int | None = None, need_references: bool = True) -> list[Prompt]:
    """The prompts of a source in order. Raises UserError, with file and line, for a record that is none."""
    found: list[Prompt] = []
    for block in records.plan(source):
        for place, record in records.records(block):
            found.append(_prompt(record, str(place), need_references))
            if len(found) == limit:
                return found
    if not found:
        raise UserError(f"{source.name}: there is no prompt in it")
    return found


def answers(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    chat: bool | None = None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Answer]:
    """What the model writes. `chat` None: through the chat template if the tokenizer has one. `progress` counts prompts.

    Raises UserError for a prompt that leaves no room for `max_new_tokens`, or of several turns without a template.
    """
    if chat and not model.tokenizer.chat_template:
        raise UserError(f"chat=true: the tokenizer of {model.name} has no chat template")
    templated = bool(model.tokenizer.chat_template) if chat is None else chat
    encoded = []
    for prompt in prompts:
        ids = _encode(model, prompt, templated)
        if len(ids) + max_new_tokens > model.context:
            room = f"{len(ids)} tokens and max_new_tokens={max_new_tokens}"
            raise UserError(f"{prompt.place}: {room} are more than the {model.context} positions of {model.name}")
        encoded.append(ids)
    return model.generate(
        encoded, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop, progress=progress
    )


def score(
    prompts: Sequence[Prompt], found: Sequence[Answer], metrics: Sequence[str], about: Sequence[str]
) -> tuple[Result, list[dict[str, Any]]]:
    """The metrics of `found`, and a row a prompt with its answer and values, for people to read."""
    outputs, references = [a.text for a in found], [p.references for p in prompts]
    rows: list[dict[str, Any]] = [
        {"prompt": p.text, "references": list(p.references), "output": a.text, "complete": a.complete}
        for p, a in zip(prompts, found, strict=True)
    ]
    measured = []
    for name in metrics:
        metric, each = text_metrics.measure(name, outputs, references)
        if metric is None:
            continue
        measured.append(metric)
        for row, value in zip(rows, each, strict=True):
            row[name] = value
    if not measured:
        raise UserError("metrics=numeric: no reference has a number in it")
    unfinished = sum(not a.complete for a in found)
    cut = [f"{unfinished} of {len(found)} answers were cut off at the limit of new tokens"] if unfinished else []
    examples = [{"prompt": p.text, "reference": p.references[0], "answer": a.text} for p, a in zip(prompts, found, strict=True)]
    return Result(measured, [f"{len(prompts):,} prompts", *about, *cut], examples=examples[:EXAMPLES]), rows


def _encode(model: Model, prompt: Prompt, templated: bool) -> list[int]:
    if templated:
        try:
            return model.tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # whatever a template raises
            raise UserError(f"{prompt.place}: the chat template of {model.name} fails: {' '.join(str(error).split())}") from None
    if len(prompt.messages) > 1:
        raise UserError(f"{prompt.place}: a prompt of {len(prompt.messages)} turns needs a chat template; {model.name} has none")
    ids = model.encode(prompt.messages[0]["content"])
    return ids if model.tokenizer.bos_token_id is None and ids else [model.start_id, *ids]


def _prompt(record: dict[str, Any], place: str, need_references: bool) -> Prompt:
    given = next((record[name] for name in REFERENCES if record.get(name) is not None), None)
    if given is None and formats.detect(record) is not None and not _is_open(record):
        turns = formats.parse(record, place).messages
        if turns[-1].role != "assistant":
            raise UserError(f"{place}: the last turn is not the assistant's, so there is no reference")
        return Prompt(tuple({"role": t.role, "content": t.content} for t in turns[:-1]), (turns[-1].content,), place)
    references = () if given is None else tuple(given) if isinstance(given, (list, tuple)) else (given,)
    references = tuple(str(ref) if isinstance(ref, (int, float)) else ref for ref in references)
    if not all(isinstance(ref, str) for ref in references) or (need_references and not references):
        raise UserError(f'{place}: no "reference": the fields are {", ".join(record) or "none"}')
    if _is_open(record):
        return Prompt(tuple({"role": t["role"], "content": t["content"]} for t in record["messages"]), references, place)
    text = next((record[name] for name in PROMPTS if isinstance(record.get(name), str) and record[name].strip()), None)
    if text is None:
        raise UserError(f'{place}: no "prompt": the fields are {", ".join(record) or "none"}')
    system = record.get("system")
    before = ({"role": "system", "content": system},) if isinstance(system, str) and system.strip() else ()
    return Prompt((*before, {"role": "user", "content": text}), references, place)


def _is_open(record: dict[str, Any]) -> bool:
    """Whether these are messages that end with the user's turn."""
    turns = record.get("messages")
    if not isinstance(turns, (list, tuple)) or not turns:
        return False
    whole = all(isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns)
    return whole and turns[-1]["role"] == "user"
