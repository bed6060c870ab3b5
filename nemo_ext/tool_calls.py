"""Tool calls in what a model writes.

Three ways are common: `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes, Qwen, SmolLM),
`<function=NAME>{…}</function>` (Llama 3.1), and an answer that is nothing but such objects, alone, in a list, or after
`[TOOL_CALLS]` or `<|python_tag|>` (Mistral, Llama 3).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

TAGS = ("<tool_call>", "<function=")
HEADS = ("[TOOL_CALLS]", "<|python_tag|>")
TAGGED = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|\Z)|<function=([\w.-]+)>\s*(\{.*?\})\s*(?:</function>|\Z)", re.S)


@dataclass(frozen=True)
class ToolCall:
    """A call of one function, its arguments as JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


def parse(text: str, known: Collection[str] | None) -> tuple[str, list[ToolCall]]:
    """The text around the calls, and the calls of functions that are `known` (None: of any). What is no valid call stays text."""
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


def _bare(text: str, known: Collection[str] | None) -> list[ToolCall]:
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


def _call(value: Any, known: Collection[str] | None) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or known is not None and name not in known:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    try:
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
    except RecursionError:
        return None
