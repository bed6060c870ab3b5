"""Tool calls in what a model writes.

Three ways are common: `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes, Qwen, SmolLM),
`<function=NAME>{…}</function>` (Llama 3.1), and an answer that is nothing but such objects, alone, in a list, or after
`[TOOL_CALLS]` or `<|python_tag|>` (Mistral, Llama 3).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.engine.request import Refused

DEFINITIONS = ("$defs", "definitions")
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as templates write JSON; no padding
TAGS = ("<tool_call>", "<function=")
HEADS = ("[TOOL_CALLS]", "<|python_tag|>")
TAGGED = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|\Z)|<function=([\w.-]+)>\s*(\{.*?\})\s*(?:</function>|\Z)", re.S)


@dataclass(frozen=True)
class ToolCall:
    """A call of one function, its arguments as JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


def parse(text: str, known: Collection[str]) -> tuple[str, list[ToolCall]]:
    """The text around the calls, and the calls of functions that are `known`. What is no valid call stays text."""
    stripped = text.strip()
    for head in HEADS:
        stripped = stripped.removeprefix(head).lstrip()
    if stripped.startswith(("{", "[")) and (calls := _bare(stripped, known)):
        return "", calls
    calls = []

    def take(match: re.Match) -> str:
        call = _call({"name": match[2], "arguments": _json(match[3])} if match[2] else _json(match[1]), known)
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    rest = TAGGED.sub(take, text)
    return (rest.strip(), calls) if calls else (text, [])


def calls_schema(tools: Sequence[dict[str, Any]], name: str | None, parallel: bool) -> dict[str, Any]:
    """The JSON schema of an answer that is nothing but calls of `tools`: of the one named `name`, else of any, several in a list
    if `parallel`. Raises Refused for a function that is not there, or whose parameters have no such schema."""
    chosen = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    if not chosen:
        raise Refused(f"tool_choice names {name}, which is none of the tools")
    shared: dict[str, dict[str, Any]] = {}
    calls = [_call_schema(function, shared) for function in chosen]
    schema: dict[str, Any] = {"anyOf": calls} if len(calls) > 1 else calls[0]
    if parallel and name is None:
        schema = {"type": "array", "items": schema, "minItems": 1}
    return {**schema, **shared, "x-guidance": SPACED}


class ToolStream:
    """Text as it comes, without what may be a call: `push` returns what is certainly none, `close` the rest and the calls."""

    def __init__(self, known: Collection[str]) -> None:
        self._known = known
        self._held = ""
        self._sent = False

    def push(self, text: str) -> str:
        """Text that can be shown."""
        self._held += text
        if not self._sent and self._may_be_bare():
            return ""
        cut = min((at for tag in TAGS if (at := self._held.find(tag)) >= 0), default=None)
        if cut is None:
            hold = max((n for tag in TAGS for n in range(1, len(tag)) if self._held.endswith(tag[:n])), default=0)
            cut = len(self._held) - hold
        shown, self._held = self._held[:cut], self._held[cut:]
        self._sent = self._sent or bool(shown)
        return shown

    def close(self) -> tuple[str, list[ToolCall]]:
        """What was held back: text, and calls."""
        return parse(self._held, self._known)

    def _may_be_bare(self) -> bool:
        start = self._held.lstrip()
        return not start or start[0] in "{[" or any(head.startswith(start) or start.startswith(head) for head in HEADS)


def _call_schema(function: dict[str, Any], shared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One call's; definitions that it refers to go where references look for them, at the top."""
    parameters = {"type": "object", **(function.get("parameters") or {"additionalProperties": False})}
    if parameters["type"] != "object":
        raise Refused(f"the parameters of {function['name']} are no object", "unsupported_value")
    for word in DEFINITIONS:
        for key, value in parameters.pop(word, {}).items():
            if shared.setdefault(word, {}).setdefault(key, value) != value:
                raise Refused(f"two functions define {key} differently: no call can be forced", "unsupported_value")
    properties = {"name": {"const": function["name"]}, "arguments": parameters}
    return {"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False}


def _bare(text: str, known: Collection[str]) -> list[ToolCall]:
    decoder, calls = json.JSONDecoder(), []
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return []
        for each in value if isinstance(value, list) else [value]:
            call = _call(each, known)
            if call is None:
                return []
            calls.append(call)
        text = text[end:].lstrip("; \n\t")
    return calls


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, known: Collection[str]) -> ToolCall | None:
    if not isinstance(value, dict) or value.get("name") not in known:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
