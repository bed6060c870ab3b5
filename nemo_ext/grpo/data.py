"""Problems: records with a question and an answer, as prompts that a model can answer.

A record becomes a row: the record's own fields, with `question` (the text of the last user's turn) and `answer` under those
names, `prompt` (the chat messages) and `ids` (the messages through the chat template, ready to be continued).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_ext.data import sources
from nemo_ext.data.chat import records
from nemo_ext.data.chat.formats import Conversation, Message
from nemo_ext.data.chat.render import Renderer, Settings
from nemo_ext.data.split import Split
from nemo_ext.errors import UserError
from nemo_ext.grpo.conversation import check_template
from nemo_ext.grpo.tools import Tools

GYM = "reasoning-gym"
GYM_SIZE = 1000  # problems of a reasoning-gym task where `size` is not given
ROLES = ("system", "user", "assistant")
PLACE = "{question}"  # in a prompt file, where the problem goes

Row = dict[str, Any]


@dataclass
class Problems:
    """The rows to train on and those held out, and what was left out: {what: how many}."""

    train: list[Row]
    heldout: list[Row]
    left_out: dict[str, int] = field(default_factory=dict)
    template: str | None = None  # the chat template, where it is not the tokenizer's own

    def report(self) -> list[str]:
        """Lines for people."""
        lines = [f"{len(self.train):,} problems to train on, {len(self.heldout):,} held out"]
        return lines + [f"left out: {count:,} {what}" for what, count in self.left_out.items() if count]


def load(
    data: Any,
    tokenizer: str | Path,
    *,
    question_key: str = "question",
    answer_key: str = "answer",
    system: str | None = None,
    prompt: str | None = None,
    template: str | None = None,
    heldout: float = 0.1,
    max_prompt: int = 256,
    seed: int = 0,
    tools: Tools | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Problems:
    """Read `data=`, write the prompts, and hold a share out.

    `system` is text, or a file of it; `prompt` a file with {question} in it. Which problems are held out is decided by a hash
    of each prompt, so that a problem that occurs twice is never on both sides. The same problem with the same answer is taken
    once. The template shows `tools`, if there are any. Raises UserError, naming the place, for a record without the columns, and
    where no prompt fits into `max_prompt` tokens or nothing is left to train on.
    """
    renderer = Renderer(tokenizer, Settings(max_prompt, template))
    shown: tuple[dict[str, Any], ...] = ()
    if tools is not None:
        check_template(renderer, tools)
        shown = tuple(tools.schemas)
    wrap, before = _wrapper(prompt), _system(system)
    blend = [(source, _rows(source, question_key, answer_key, seed)) for source in sources.parse(data, sources.PROBLEMS)]
    split = Split(seed, round(heldout * 2**64))
    seen: set[int] = set()
    left_out = {"that occur twice": 0, f"with a prompt of more than {max_prompt} tokens": 0}
    done, total = 0, sum(len(rows) for _, rows in blend)
    sides: tuple[list, list] = ([], [])  # (source, hash, row) of training and held-out
    if progress:
        progress(0, total)
    for number, (_, rows) in enumerate(blend):
        for place, row in rows:
            done += 1
            if progress:
                progress(done, total)
            messages = [*before, *row["prompt"]] if row["prompt"][0]["role"] != "system" else row["prompt"]
            messages = [*messages[:-1], {"role": "user", "content": wrap(messages[-1]["content"])}]
            text = _text(renderer, messages, shown, place)
            if (whole := split.hash(f"{text}\0{row['answer']}")) in seen:
                left_out["that occur twice"] += 1
                continue
            seen.add(whole)
            ids = renderer.tokenizer.encode(text, add_special_tokens=False, verbose=False)
            if len(ids) > max_prompt:
                left_out[f"with a prompt of more than {max_prompt} tokens"] += 1
                continue
            key = split.hash(text)
            sides[key < split.below].append((number, key, {**row, "prompt": messages, "ids": ids}))
    train, held = sides
    if not train and not held:
        if total:
            raise UserError(f"data={data}: no prompt fits into max_prompt={max_prompt} tokens: give a larger one")
        raise UserError(f"data={data}: there is no problem in it")
    if heldout and not held:
        smallest = min(train, key=lambda item: item[1])[1]  # of small data: the problem whose hash is the smallest
        train, held = [i for i in train if i[1] != smallest], [i for i in train if i[1] == smallest]
    if not train:
        raise UserError(f"data={data}: nothing is left to train on: give more problems, or heldout=0")
    weights = [source.weight for source, _ in blend]
    train = _blended(train, weights) if None not in weights else train
    held = sorted(held, key=lambda item: item[1])  # an evaluation takes the first ones: any of them, not those of one source
    own = renderer.settings.template is None and renderer.tokenizer.chat_template
    return Problems(
        [row for *_, row in train], [row for *_, row in held], left_out, None if own else next(iter(renderer.template.values()))
    )


def _rows(source: sources.Source, question_key: str, answer_key: str, seed: int) -> list[tuple[str, Row]]:
    """The records of a source as rows, each with its place; `prompt` is the question as messages."""
    if source.kind == GYM:
        given = [(f"{source.name}, problem {i}", record) for i, record in enumerate(_gym(source.name, seed))]
        question_key, answer_key = "question", "answer"
    else:
        given = [(place, record) for block in records.plan(source) for place, record in records.records(block)]
    return [(place, _row(record, place, question_key, answer_key)) for place, record in given]


def _row(record: Mapping[str, Any], place: Any, question_key: str, answer_key: str) -> Row:
    for key, name in ((question_key, "question"), (answer_key, "answer")):
        if record.get(key) is None:
            there = ", ".join(map(str, record)) or "none"
            raise UserError(f'{place}: no "{key}": the fields are {there}; name the {name} with {name}_key=')
    messages = _messages(record[question_key], place, question_key)
    answer = record[answer_key]
    return {**record, "question": messages[-1]["content"], "answer": answer if isinstance(answer, str) else str(answer),
            "prompt": messages}  # fmt: skip


def _messages(question: Any, place: Any, key: str) -> list[dict[str, str]]:
    """A question, as text or as chat messages that end with the user's, as messages."""
    if isinstance(question, str):
        if not question.strip():
            raise UserError(f'{place}: "{key}" is empty')
        return [{"role": "user", "content": question}]
    turns = list(question) if isinstance(question, Sequence) else []
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise UserError(f'{place}: "{key}" has a turn that is not {{"role": "user", "content": "..."}}')
    if not turns or turns[-1]["role"] != "user":
        raise UserError(f'{place}: "{key}" is neither text nor chat messages that end with the user\'s')
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _text(renderer: Renderer, messages: list[dict[str, str]], tools: tuple[dict[str, Any], ...], place: Any) -> str:
    try:
        return renderer.text(Conversation(tuple(Message(m["role"], m["content"]) for m in messages), tools), prompt=True)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _gym(name: str, seed: int) -> list[Row]:
    """The problems of reasoning-gym:TASK:setting=value:..., drawn from `seed`."""
    from nemo_ext.rewards import reasoning_gym

    _, task, *settings = name.split(":")
    config: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise UserError(f"data={name}: {setting!r} is not setting=value, as in {GYM}:chain_sum:max_terms=2")
        try:
            config[key] = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
        except (ValueError, SyntaxError):
            config[key] = value
    size = config.pop("size", GYM_SIZE)
    if type(size) is not int or size < 1:
        raise UserError(f"data={name}: size={size} must be a whole number above 0")
    return reasoning_gym.problems(task, size, seed, **config)


def _blended(items: list, weights: Sequence[float]) -> list:
    """The largest blend of the sources in which none repeats a problem: the first of each by hash, back in reading order."""
    counts = [sum(number == source for number, *_ in items) for source in range(len(weights))]
    whole = min(count / weight for count, weight in zip(counts, weights, strict=True))
    kept: set[tuple[int, int]] = set()
    for source, weight in enumerate(weights):
        keys = sorted(key for number, key, _ in items if number == source)
        kept |= {(source, key) for key in keys[: max(1, round(whole * weight))]}
    return [item for item in items if item[:2] in kept]


def _system(system: str | None) -> list[dict[str, str]]:
    """The system turn, if there is one, from text or the file that it names."""
    if not system:
        return []
    text = _file(system, "system") if len(system) < 256 and Path(system).expanduser().is_file() else system
    return [{"role": "system", "content": text.strip()}]


def _wrapper(prompt: str | None) -> Callable[[str], str]:
    """What writes a question into the prompt file's text."""
    if not prompt:
        return lambda question: question
    text = _file(prompt, "prompt").strip()
    if PLACE not in text:
        raise UserError(f"prompt={prompt}: the file has no {PLACE}, where the problem goes")
    return lambda question: text.replace(PLACE, question)


def _file(name: str, key: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
