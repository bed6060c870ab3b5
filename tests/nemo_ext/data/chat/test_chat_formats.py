import pytest
from chat_samples import TOOLS, WITH_TOOLS, turns

from nemo_ext.data.chat.formats import Message, check_columns, detect, parse
from nemo_ext.errors import UserError

PLAIN = (Message("user", "2+2?"), Message("assistant", "4"))
SYSTEM = (Message("system", "Be brief."), *PLAIN)
SAME = {
    "messages": {"messages": turns("2+2?", "4"), "id": 7},
    "conversations with roles": {"conversations": turns("2+2?", "4")},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
                           {"role": "assistant", "content": "4", "tool_calls": None}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "alpaca without input": {"instruction": "2+2?", "output": "4"},
    "prompt": {"prompt": "2+2?", "completion": "4"},
    "prompts of turns": {"prompt": turns("2+2?"), "completion": [{"role": "assistant", "content": "4"}]},
    "question": {"question": "2+2?", "answer": "4", "source": "x"},
    "input": {"input": "2+2?", "output": "4"},
}  # fmt: skip
FORMATS = (
    "messages",
    "messages",
    "messages",
    "sharegpt",
    "alpaca",
    "alpaca",
    "completion",
    "completion",
    "completion",
    "completion",
)


@pytest.mark.parametrize(("name", "format_"), zip(SAME, FORMATS, strict=True))
def test_formats_become_the_same(name, format_):
    assert detect(SAME[name]) == format_
    conversation = parse(SAME[name])
    assert conversation.messages == PLAIN and conversation.format == format_ and conversation.tools == ()
    assert conversation.canonical() == parse(SAME["messages"]).canonical()


def test_system_prompts():
    for record in (
        {"messages": turns("2+2?", "4", system="Be brief.")},
        {"messages": [{"role": "developer", "content": "Be brief."}, *turns("2+2?", "4")]},
        {"system": "Be brief.", **SAME["sharegpt"]},
        {"system": "Be brief.", **SAME["alpaca"]},
        {"system_prompt": "Be brief.", **SAME["question"]},
    ):
        assert parse(record).messages == SYSTEM


def test_alpaca_with_input_and_history():
    record = {"instruction": "Add.", "input": "2, 2", "output": "4", "history": [["Hi", "Hello"], ["So?", "Yes"]]}
    expected = [("user", "Hi"), ("assistant", "Hello"), ("user", "So?"), ("assistant", "Yes"), ("user", "Add.\n\n2, 2")]
    assert [(m.role, m.content) for m in parse(record).messages] == [*expected, ("assistant", "4")]


def test_named_columns():
    record = {"q": "2+2?", "best": "4", "answer": "5", "note": "Be brief.", "why": "Two and two."}
    columns = {"prompt": "q", "completion": "best", "system": "note", "reasoning": "why"}
    assert detect(record) is None and detect(record, columns) == "completion"
    assert parse(record, "x", columns).messages == (*SYSTEM[:2], Message("assistant", "4", "Two and two."))
    assert parse({"chat": turns("2+2?", "4")}, "x", {"messages": "chat"}).messages == PLAIN
    with pytest.raises(UserError, match='f.csv, line 2: no "w", which columns=prompt:w names: the fields are q, best'):
        parse(record, "f.csv, line 2", {"prompt": "w", "completion": "best"})
    with pytest.raises(UserError, match="columns=text: unknown: give prompt, completion"):
        check_columns({"text": "x"})
    with pytest.raises(UserError, match="names prompt and completion together"):
        check_columns({"prompt": "x"})


def test_tools():
    conversation = parse({"messages": WITH_TOOLS, "tools": TOOLS})
    call, result = conversation.messages[1:3]
    assert call.calls == ({"name": "add", "arguments": {"a": 2, "b": 3}, "id": "c1"},) and call.content == ""
    assert (result.role, result.content, result.call_id, result.name) == ("tool", "5", "c1", "add")
    assert list(conversation.tools) == TOOLS
    text = [*WITH_TOOLS]  # OpenAI writes arguments as text
    text[1] = {"role": "assistant", "content": None,
               "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]}  # fmt: skip
    assert parse({"messages": text, "tools": '[{"name": "add"}]'}).messages == conversation.messages
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "2+3?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
            {"from": "observation", "value": "5"},
            {"from": "gpt", "value": "It is 5."},
        ],
        "tools": '[{"name": "add", "description": "Adds.", "parameters": {"type": "object"}}]',
    }
    other = parse(sharegpt)
    assert other.messages[1].calls == ({"name": "add", "arguments": {"a": 2, "b": 3}, "id": None},)
    assert other.messages[2:] == (Message("tool", "5"), Message("assistant", "It is 5."))
    assert other.tools == conversation.tools


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*turns("2+2?"), {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}]},
        {"messages": turns("2+2?", "<think>\nTwo and two.\n</think>\n\n4")},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "<think>Two and two.</think>4"}]},
        {"question": "2+2?", "answer": "4", "reasoning": "Two and two."},
        {"instruction": "2+2?", "output": "4", "thinking": " Two and two. "},
    ],
)
def test_reasoning(record):
    assert parse(record).messages == (PLAIN[0], Message("assistant", "4", "Two and two."))


def test_weights():
    messages = turns("a", "b", "c", "d", "e", "f")
    messages[1]["weight"], messages[3]["train"], messages[5]["train"] = 0.25, False, True
    assert [m.weight for m in parse({"messages": messages}).messages] == [None, 0.25, None, 0.0, None, 1.0]
    assert parse({"messages": messages}).canonical() == parse({"messages": turns("a", "b", "c", "d", "e", "f")}).canonical()


USER, ASSISTANT, TOOL = ({"role": role, "content": "x"} for role in ("user", "assistant", "tool"))
CALLS = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "x"}, "unknown format of conversation, with the fields text: known are messages, sharegpt, alpaca, completion"),
        ({"messages": [ASSISTANT, USER]}, "roles out of order: turn 1 is assistant at the start, where system or user belongs"),
        ({"messages": [USER, USER, ASSISTANT]}, "turn 2 is user after user, where assistant belongs"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "turn 3 is assistant after assistant, where user belongs"),
        ({"messages": [USER, ASSISTANT, TOOL]}, "turn 3 is tool after assistant"),
        ({"messages": [USER, CALLS, USER]}, "turn 3 is user after a tool call, where tool belongs"),
        ({"messages": [USER, ASSISTANT, {"role": "system", "content": "s"}]}, "turn 3 is system after assistant"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "turn 2, of the assistant, is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "turn 2, of the assistant, is empty"),
        ({"question": "x", "answer": ""}, "turn 2, of the assistant, is empty"),
        ({"messages": [USER]}, "no turn of the assistant"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": [USER, "x"]}, "a turn is a str, not an object"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"messages": [USER, {**ASSISTANT, "weight": "much"}]}, "the weight of a turn is 'much'"),
        ({"messages": [USER, {**ASSISTANT, "weight": -1}]}, "the weight of a turn is -1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, "of type image_url: only text"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments of a tool call",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, 'a tool call has no "name"'),
        ({"messages": [USER, ASSISTANT], "tools": "nope"}, "tools is not JSON"),
        ({"instruction": "x", "output": 5}, '"output" is a int, not a string'),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}]},
            "function_call is not JSON",
        ),
    ],
)
def test_bad_records_are_named(record, says):
    with pytest.raises(UserError) as error:
        parse(record, "chat.jsonl, line 3")
    assert str(error.value).startswith("chat.jsonl, line 3: ") and says in str(error.value) and "\n" not in str(error.value)
