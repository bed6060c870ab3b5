"""Calls that models write, whole and as they come; and the way through the server."""

import json
import random

import pytest

from deploy.engine.request import Refused
from deploy.openai_api import Message
from deploy.tools import ToolStream, calls_schema
from nemo_ext.tool_calls import parse

CALL = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
KNOWN = ("add", "now")
CASES = [
    (f"<tool_call>\n{CALL}\n</tool_call>", "", ["add"]),
    (
        f'Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "now", "arguments": {{}}}}',
        "Let me see.",
        ["add", "now"],
    ),
    ('<function=add>{"a": 1, "b": [2]}</function>', "", ["add"]),
    (f"[TOOL_CALLS][{CALL}]", "", ["add"]),
    ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": [2]}}', "", ["add"]),
    (CALL + "; " + CALL, "", ["add", "add"]),
    (CALL.replace("add", "unknown"), CALL.replace("add", "unknown"), []),
    ("<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", []),
    ('{"name": "add"', '{"name": "add"', []),
    ("no call < at all <tool", "no call < at all <tool", []),
    ("[" * 5000, "[" * 5000, []),
]


@pytest.mark.parametrize("text, rest, names", CASES)
def test_parse(text, rest, names):
    found, calls = parse(text, KNOWN)
    assert (found, [call.name for call in calls]) == (rest, names)
    assert all(json.loads(call.arguments) == {"a": 1, "b": [2]} for call in calls if call.name == "add")
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("text, rest, names", CASES)
def test_stream(text, rest, names):
    """Cut anywhere, nothing of a call is shown, and the rest is what `parse` leaves."""
    for seed in range(5):
        chance, stream, shown, at = random.Random(seed), ToolStream(KNOWN), "", 0
        while at < len(text):
            step = chance.randint(1, 6)
            shown += stream.push(text[at : at + step])
            at += step
        end, calls = stream.close()
        assert (shown + end).strip() == rest.strip() and [call.name for call in calls] == names


def test_tools_reach_the_template_and_calls_come_back(served, engine, monkeypatch, baseline):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    asked = []
    real = engine.prompts.chat
    monkeypatch.setattr(engine.prompts, "chat", lambda messages, tools: asked.append((messages, tools)) or real(messages, tools))
    monkeypatch.setattr("deploy.engine.text.TextStream.push", lambda self, token: ("", False))
    monkeypatch.setattr("deploy.engine.text.TextStream.flush", lambda self: f"<tool_call>{CALL}</tool_call>")
    choice = served.chat(tools=tools, max_tokens=3, ignore_eos=True).json()["choices"][0]
    assert asked[0][1] == tools and choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    call = choice["message"]["tool_calls"][0]
    assert call["type"] == "function" and json.loads(call["function"]["arguments"]) == {"a": 1, "b": [2]}
    stream = served.chat(tools=tools, max_tokens=3, ignore_eos=True, stream=True).text
    parts = [json.loads(line[6:])["choices"][0] for line in stream.split("\n\n") if line.startswith("data: {")]
    assert parts[-1]["finish_reason"] == "tool_calls" and parts[-2]["delta"]["tool_calls"][0]["function"]["name"] == "add"
    assert served.chat(tools=tools, tool_choice="none", max_tokens=3).json()["choices"][0]["finish_reason"] != "tool_calls"
    assert asked[-1][1] == []


def test_messages_as_templates_read_them():
    message = Message.model_validate(
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        }
    )
    written = message.for_template()
    assert written["content"] == "ab" and written["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert Message(role="developer", content="x").for_template()["role"] == "system"


DAY = {"enum": ["mon", "sun"]}
FORCED = [
    {"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/small"}}, "required": ["a"], "additionalProperties": False,
        "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 9}}}}},
    {"type": "function", "function": {"name": "plan", "parameters": {
        "properties": {"day": DAY}, "required": ["day"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip


def calls_of(choice: dict) -> list[tuple[str, dict]]:
    calls = choice.get("message", choice.get("delta"))["tool_calls"]
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def right(name: str, arguments: dict) -> bool:
    """Whether it is a call that the tools allow."""
    return {
        "add": list(arguments) == ["a"] and arguments["a"] in range(10),
        "plan": list(arguments) == ["day"] and arguments["day"] in DAY["enum"],
        "now": arguments == {},
    }[name]


@pytest.fixture
def short(engine, monkeypatch) -> None:
    """The tools' schemas are longer than the small model's context."""
    chat = engine.prompts.chat
    monkeypatch.setattr(engine.prompts, "chat", lambda messages, tools: chat(messages))


@pytest.mark.parametrize("name", ["add", "plan", "now"])
def test_a_named_function_is_called(served, name, short, baseline):
    """A model that knows nothing of tools calls the one it is told to, as its schema says."""
    forced = {"type": "function", "function": {"name": name}}
    choice = served.chat(tools=FORCED, tool_choice=forced, max_tokens=80, seed=1).json()["choices"][0]
    ((called, arguments),) = calls_of(choice)
    assert called == name and right(called, arguments)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None


def test_some_function_is_called(served, short, baseline):
    names = set()
    for seed in range(6):
        one = served.chat(tools=FORCED, tool_choice="required", parallel_tool_calls=False, max_tokens=80, seed=seed).json()
        ((name, arguments),) = calls_of(one["choices"][0])
        assert right(name, arguments)
        names.add(name)
    assert len(names) > 1
    several = served.chat(tools=FORCED, tool_choice="required", max_tokens=190, seed=2, n=3).json()["choices"]
    finished = [choice for choice in several if choice["finish_reason"] == "tool_calls"]
    assert all(right(*call) for choice in finished for call in calls_of(choice))
    stream = served.chat(tools=FORCED, tool_choice="required", parallel_tool_calls=False, max_tokens=80, seed=3, stream=True).text
    parts = [json.loads(line[6:])["choices"][0] for line in stream.split("\n\n") if line.startswith("data: {")]
    assert [right(*call) for part in parts if "tool_calls" in part["delta"] for call in calls_of(part)] == [True]
    assert not any(part["delta"].get("content") for part in parts)


def test_schemas_of_calls():
    from jsonschema import Draft202012Validator

    schema = calls_schema(FORCED, None, True)
    Draft202012Validator.check_schema(schema)
    valid = Draft202012Validator(schema).is_valid
    add, now = {"name": "add", "arguments": {"a": 3}}, {"name": "now", "arguments": {}}
    assert valid([add]) and valid([now, add]) and not valid([]) and not valid(add)
    for wrong in (
        {**add, "arguments": {"a": 10}},
        {"name": "add"},
        {**now, "arguments": {"x": 1}},
        {"name": "rm", "arguments": {}},
    ):
        assert not valid([wrong])
    assert Draft202012Validator(calls_schema(FORCED, "now", True)).is_valid(now)
    other = {"type": "function", "function": {"name": "b", "parameters": {"$defs": {"small": {"type": "string"}}}}}
    with pytest.raises(Refused, match="define small differently"):
        calls_schema([*FORCED, other], None, True)
    with pytest.raises(Refused, match="are no object"):
        calls_schema([{"type": "function", "function": {"name": "b", "parameters": {"type": "array"}}}], None, True)
