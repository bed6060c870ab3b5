"""Records in the formats people have, as one conversation.

messages      {"messages": [{"role", "content", "tool_calls", "tool_call_id", "reasoning_content", "weight"}], "tools": [...]}
sharegpt      {"conversations": [{"from": "human" | "gpt" | "system" | "tool" | ..., "value"}], "system", "tools"}
alpaca        {"instruction", "input", "output", "system", "history": [[user, assistant], ...]}
completion    two columns, e.g. "prompt" and "completion" or "question" and "answer", texts or lists of messages

Every format may carry tools, tool calls with their results, and reasoning: a separate field, or a leading <think>...</think> in
the assistant's text. A turn's `weight` (a number) or `train` (true, false) says how much its tokens count in the loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ext.errors import UserError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
COMPLETION_COLUMNS = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "output"), ("prompt", "answer"), ("question", "answer"),
    ("question", "response"), ("question", "output"), ("query", "response"), ("query", "answer"), ("input", "output"),
    ("instruction", "response"), ("instruction", "completion"), ("instruction", "answer"), ("user", "assistant"),
)  # fmt: skip
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "chain_of_thought", "cot", "rationale")
ROLE_COLUMNS = ("prompt", "completion", "system", "reasoning", "messages", "tools")  # what `columns` may rename
LARGEST_WEIGHT = 600.0

_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """One turn. `weight` is None where the record does not say; `calls` are {"name", "arguments", "id" or None}."""

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    call_id: str | None = None
    name: str | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Conversation:
    """What all formats become. `format` names the one it came from."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    format: str = "messages"

    def canonical(self) -> str:
        """The content as text, the same whichever format it was written in; weights do not count."""
        turns = [[m.role, m.content, m.reasoning, m.calls, m.name] for m in self.messages]
        return json.dumps([turns, self.tools], sort_keys=True, ensure_ascii=False)

    def features(self) -> dict[str, int]:
        """What is counted of it."""
        return {
            "with tools": int(bool(self.tools or any(m.calls for m in self.messages))),
            "with reasoning": int(any(m.reasoning for m in self.messages)),
        }


def detect(record: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> str | None:
    """The name of a record's format, None where it is none that is known."""
    record = _renamed(record, columns)
    if columns and _present(record, "prompt") and _present(record, "completion"):
        return "completion"
    turns = next((record[name] for name in ("messages", "conversations", "conversation") if _is_list(record.get(name))), None)
    if turns is not None:
        first = turns[0] if len(turns) else None
        if isinstance(first, Mapping) and "from" in first and "value" in first:
            return "sharegpt"
        return "messages" if isinstance(first, Mapping) and "role" in first or first is None else None
    if _present(record, "instruction") and "output" in record:
        return "alpaca"
    return "completion" if _completion_columns(record) else None


def parse(record: Mapping[str, Any], place: object = "record", columns: Mapping[str, str] | None = None) -> Conversation:
    """A record as a conversation.

    `columns` names fields: {"prompt": "question", "completion": "best_answer", "system", "reasoning", "messages", "tools"}.
    Raises UserError, with `place`, for an unknown format, roles out of order, an empty turn of the assistant, and weights and
    tool calls that cannot be read.
    """
    for ours, theirs in (columns or {}).items():
        if ours in ("prompt", "completion", "messages") and theirs not in record:
            there = ", ".join(map(str, record))
            raise UserError(f'{place}: no "{theirs}", which columns={ours}:{theirs} names: the fields are {there}')
    name = detect(record, columns)
    if name is None:
        raise UserError(
            f"{place}: unknown format of conversation, with the fields {', '.join(map(str, record)) or 'none'}: known are "
            f"{', '.join(READERS)}; columns=prompt:FIELD,completion:FIELD names those of others"
        )
    record = _renamed(record, columns)
    messages = READERS[name](record, place)
    system = record.get("system") or record.get("system_prompt")
    if isinstance(system, str) and system.strip() and not (messages and messages[0].role == "system"):
        messages = [Message("system", system), *messages]
    _check(messages, place)
    return Conversation(tuple(messages), _tools(record, place), name)


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse names that `columns` does not know. Raises UserError."""
    for name in columns:
        if name not in ROLE_COLUMNS:
            raise UserError(f"columns={name}: unknown: give {', '.join(ROLE_COLUMNS)}")
    if ("prompt" in columns) != ("completion" in columns):
        raise UserError("columns= names prompt and completion together: columns=prompt:FIELD,completion:FIELD")


# The formats


def _messages(record: Mapping[str, Any], place: object) -> list[Message]:
    turns = next(record[name] for name in ("messages", "conversations", "conversation") if _is_list(record.get(name)))
    return [_message(turn, place) for turn in turns]


def _sharegpt(record: Mapping[str, Any], place: object) -> list[Message]:
    messages = []
    for turn in record.get("conversations") or record.get("conversation") or record["messages"]:
        if not isinstance(turn, Mapping):
            raise UserError(f"{place}: a turn is a {type(turn).__name__}, not an object")
        fields = {**turn, "role": turn.get("from"), "content": turn.get("value")}
        if turn.get("from") in ("function_call", "tool_call"):
            calls = _json(turn.get("value"), place, "the value of a function_call")
            fields.update(content="", tool_calls=calls if isinstance(calls, list) else [calls])
        messages.append(_message(fields, place))
    return messages


def _alpaca(record: Mapping[str, Any], place: object) -> list[Message]:
    messages = []
    for pair in record.get("history") or ():
        if not _is_list(pair) or len(pair) != 2:
            raise UserError(f"{place}: history is a list of pairs of a question and its answer")
        messages += [Message("user", str(pair[0])), _message({"role": "assistant", "content": pair[1]}, place)]
    question = "\n\n".join(text for text in (_string(record, n, place).strip() for n in ("instruction", "input")) if text)
    return [*messages, Message("user", question), _answer(record, "output", place)]


def _completion(record: Mapping[str, Any], place: object) -> list[Message]:
    prompt, completion = _completion_columns(record)  # type: ignore[misc]
    if _is_list(record[prompt]):
        question = [_message(turn, place) for turn in record[prompt]]
    else:
        question = [Message("user", _string(record, prompt, place))]
    if _is_list(record[completion]):
        return [*question, *(_message(turn, place) for turn in record[completion])]
    return [*question, _answer(record, completion, place)]


READERS: dict[str, Callable[[Mapping[str, Any], object], list[Message]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completion": _completion,
}


# Their parts


def _message(turn: Any, place: object) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"{place}: a turn is a {type(turn).__name__}, not an object")
    role = ROLES.get(str(turn.get("role")).lower())
    if role is None:
        known = "system, user, assistant, tool"
        raise UserError(f"{place}: unknown role {turn.get('role')!r}: known are {known} (and ShareGPT's human, gpt, observation)")
    content, calls = _content(turn.get("content"), place), _calls(turn.get("tool_calls"), place)
    if isinstance(call := turn.get("function_call"), Mapping):  # OpenAI's older name for a single call
        calls = (*calls, *_calls([call], place))
    reasoning = ""
    if role == "assistant":
        content, reasoning = _reasoning(turn, content)
    return Message(
        role, content, reasoning, calls, turn.get("tool_call_id") or None, turn.get("name") or None, _weight(turn, place)
    )


def _answer(record: Mapping[str, Any], name: str, place: object) -> Message:
    content, reasoning = _reasoning(record, _string(record, name, place))
    return Message("assistant", content, reasoning, weight=_weight(record, place))


def _reasoning(turn: Mapping[str, Any], content: str) -> tuple[str, str]:
    """Content and reasoning: a field of its own, or what stands between <think> and </think> at the start of the content."""
    for name in REASONING_FIELDS:
        if isinstance(turn.get(name), str) and turn[name].strip():
            return content, turn[name].strip()
    match = _THINK.match(content)
    return (content[match.end() :], match[1].strip()) if match else (content, "")


def _content(content: Any, place: object) -> str:
    """Text, also out of a list of parts {"type": "text", "text"}."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if _is_list(content):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise UserError(f"{place}: a part of a turn is of type {kind}: only text is read here")
        return "".join(part["text"] for part in content)
    return json.dumps(content, ensure_ascii=False)  # a tool's result as an object


def _calls(calls: Any, place: object) -> tuple[dict[str, Any], ...]:
    """Tool calls, from {"id", "type": "function", "function": {"name", "arguments"}} or {"name", "arguments"}."""
    if calls is None or isinstance(calls, str) and not calls.strip():
        return ()
    calls = _json(calls, place, "tool_calls") if isinstance(calls, str) else calls
    if not _is_list(calls):
        raise UserError(f"{place}: tool_calls is a {type(calls).__name__}, not a list")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f'{place}: a tool call has no "name": it is {{"function": {{"name", "arguments"}}}}')
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _json(arguments, place, "the arguments of a tool call") if isinstance(arguments, str) else arguments
        read.append({"name": function["name"], "arguments": {} if arguments is None else arguments, "id": call.get("id")})
    return tuple(read)


def _tools(record: Mapping[str, Any], place: object) -> tuple[dict[str, Any], ...]:
    tools = record.get("tools") or record.get("functions") or ()
    tools = _json(tools, place, "tools") if isinstance(tools, str) else tools
    if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{place}: tools is not a list of objects")
    return tuple(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools)


def _weight(turn: Mapping[str, Any], place: object) -> float | None:
    value = turn.get("weight", turn.get("train"))
    if value is None:
        return None
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight <= LARGEST_WEIGHT:
        raise UserError(f"{place}: the weight of a turn is {value!r}: a number from 0 to {LARGEST_WEIGHT:g}")
    return weight


def _check(messages: list[Message], place: object) -> None:
    """Roles in order: a system prompt first, then user and assistant in turn; tools answer the assistant's calls."""
    last = ""
    allowed = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
    for number, message in enumerate(messages, 1):
        may = ("tool", "assistant") if last == "tool" else ("tool",) if last == "call" else allowed[last]
        if message.role not in may:
            after = {"": "at the start", "call": "after a tool call"}.get(last, f"after {last}")
            raise UserError(f"{place}: roles out of order: turn {number} is {message.role} {after}, where {_or(may)} belongs")
        if message.role == "assistant" and not message.content.strip() and not message.calls:
            raise UserError(f"{place}: turn {number}, of the assistant, is empty")
        last = "call" if message.role == "assistant" and message.calls else message.role
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{place}: no turn of the assistant")


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(names)


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    if not columns:
        return record
    return {**record, **{ours: record[theirs] for ours, theirs in columns.items() if theirs in record}}


def _completion_columns(record: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in COMPLETION_COLUMNS if _present(record, pair[0]) and _present(record, pair[1])), None)


def _present(record: Mapping[str, Any], name: str) -> bool:
    return isinstance(record.get(name), str) or _is_list(record.get(name))


def _string(record: Mapping[str, Any], name: str, place: object) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f'{place}: "{name}" is a {type(value).__name__}, not a string')
    return value


def _json(text: Any, place: object, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {what} is not JSON: {error}") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
