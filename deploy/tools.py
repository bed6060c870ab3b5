"""Tool calls of an answer that a server sends: schemas that enforce them, and text as it comes without them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from deploy.engine.request import Refused
from nemo_ext.tool_calls import HEADS, TAGS, ToolCall, parse

DEFINITIONS = ("$defs", "definitions")
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as templates write JSON; no padding


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
