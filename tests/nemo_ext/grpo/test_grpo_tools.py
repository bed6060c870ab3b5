"""Tools: what they give, what hostile ones cost; answers of several turns, which of their tokens are learnt, and a run."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch
from grpo_models import prepare, write_model
from test_grpo_trainer import by_hand, rollout, trainer_of, with_noise

from nemo_ext import run_folder
from nemo_ext.data.chat.formats import Conversation, Message
from nemo_ext.data.chat.render import Renderer, Settings
from nemo_ext.errors import UserError
from nemo_ext.grpo import data, difficulty, embedded
from nemo_ext.grpo.conversation import Conversations, check_template
from nemo_ext.grpo.tools import SHOWN, Tools
from nemo_ext.tool_calls import ToolCall

FILE = '''
import time

def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first,
            a whole one.
        b: The second.
    """
    return a + b

def slow(seconds: float) -> str:
    """Waits."""
    time.sleep(seconds)
    return "done"

def huge(count: int = 1) -> str:
    """Says much."""
    return "x" * count

def wrong() -> str:
    """Raises."""
    raise ValueError("never")

def _hidden():
    pass
'''
END = 0
# The conversation on one line, tools by name, calls as JSON: short, for models of single characters.
TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'system' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ADD = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


def call(tool: str, **arguments) -> ToolCall:
    return ToolCall(tool, json.dumps(arguments))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "mine.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def tools(file):
    with Tools(f"python,calculator,{file}", 3.0, 128, workers=2) as found:  # enough on a machine that is busy
        yield found


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A tiny model whose template shows tools."""
    from nemo_ext import platform

    platform.activate()
    folder = write_model(tmp_path_factory.mktemp("talking") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_what_tools_give(tools):
    turns = [
        [call("add", a=1, b=2), call("python", code="x = 3\nprint('so')\nx * 2"), call("calculator", expression="2^3 + sqrt(4)")],
        [call("python", code="x = 1")],
        [call("huge", count=5)],
    ]
    found = tools.call(turns)
    assert [[result.text for result in each] for each in found] == [["3", "so\n6", "10.0"], ["(it printed nothing)"], ["xxxxx"]]
    assert not any(result.failed for each in found for result in each)


def test_what_a_model_is_shown(tools):
    assert [schema["function"]["name"] for schema in tools.schemas] == ["python", "calculator", "add", "slow", "huge", "wrong"]
    integer = {"type": "integer"}
    parameters = {"a": integer | {"description": "The first, a whole one."}, "b": integer | {"description": "The second."}}
    assert tools.schemas[2]["function"] == {
        "name": "add", "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": parameters, "required": ["a", "b"]},
    }  # fmt: skip
    assert tools.schemas[4]["function"]["parameters"]["required"] == []


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([call("slow", seconds=60), call("add", a=1, b=2)], ["no result after 3 seconds", "no time is left"]),
        ([call("wrong")], ["ValueError: never"]),
        ([call("add", a=1)], ["missing 1 required positional argument: 'b'"]),
        ([call("nothing")], ["there is no tool nothing: known are python, calculator, add"]),
        ([call("_hidden")], ["there is no tool _hidden"]),
        ([call("python", program="1")], ["python takes one argument, code, a text"]),
        ([call("python", code="while True: pass")], ["no result after 3 seconds"]),
        ([call("python", code="9**9**9")], ["no result after 3 seconds"]),
        ([call("python", code="x = 'a' * 10**9")], ["MemoryError"]),
        ([call("python", code="import os\nos.fork()")], ["PermissionError"]),
        ([call("python", code="open('/etc/passwd')")], ["Error"]),
        ([call("calculator", expression="__import__('os')")], ["NameError"]),
        ([ToolCall("huge", '{{"count": {}1{}}}'.format("[" * 500, "]" * 500))], ["TypeError"]),
        ([call("huge", count=1)] * 10, [None] * 8 + ["not called: at most 8 calls at once"] * 2),
    ],
)  # fmt: skip
def test_hostile_calls_cost_bounded_time_and_are_failures(tools, calls, words):
    started = time.monotonic()
    (found,) = tools.call([calls])
    assert time.monotonic() - started < 30
    for result, word in zip(found, words, strict=True):
        assert result.failed == (word is not None) and (word or "x") in result.text
    assert tools.call([[call("add", a=2, b=2)]])[0][0].text == "4"  # it still works


def test_a_huge_result_is_cut(tools):
    text = tools.call([[call("huge", count=10**7)]])[0][0].text
    assert text.startswith("x" * SHOWN + " ... (") and len(text) < SHOWN + 50


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pyton", "there is no tool pyton, did you mean python"),
        ("none.py", "there is no file none.py"),
        ("{0}/bare.py", "bare has no docstring"),
        ("{0}/hint.py", "hint has no type hint for its argument a"),
        ("{0}/empty.py", "it defines no function"),
        ("{0}/broken.py", "ZeroDivisionError"),
        ("{0}/one.py:two", "it has no function two"),
        ("{0}/two.py,{0}/two.py:one", "bare has no docstring"),  # the whole file, whatever else is named of it
        ("{0}/two.py:one,{0}/two.py", "bare has no docstring"),
        ("python,{0}/python.py", "there is another tool python"),
    ],
)
def test_tools_that_are_none_are_refused(tmp_path, spec, words):
    texts = {
        "bare": "def bare():\n    pass", "hint": "def hint(a):\n    'Does.'", "empty": "", "broken": "1 / 0",
        "one": "def one():\n    'Does.'", "two": "def one():\n    'Does.'\ndef bare():\n    pass",
        "python": "def python():\n    'Does.'",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(UserError, match="tools=") as raised, Tools(spec.format(tmp_path), 1.0, 128, workers=1):
        pass
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr"])
def test_what_follows_a_call_is_what_the_template_writes(name, tools, talking, tmp_path):
    """Prompt, call, results and answer are the tokens of the whole conversation."""
    renderer = Renderer(talking, Settings(1, name))
    check_template(renderer, tools)
    calls = [call("add", a=1, b=2), call("add", a=3, b=4)]
    asked = tuple({"name": c.name, "arguments": json.loads(c.arguments), "id": None} for c in calls)
    told = tuple(Message("tool", text, name="add") for text in ("3", "7"))
    talk = (Message("user", "?"), Message("assistant", "So: ", calls=asked), *told, Message("assistant", "37"))
    whole = renderer.text(Conversation(talk, tuple(tools.schemas)))
    prompt = renderer.text(Conversation(talk[:1], tuple(tools.schemas)), prompt=True)
    said = [whole[len(prompt) :].partition("<|end|>")[0] + "<|end|>", "37<|end|>"]
    turns = iter(said)

    def generate(prompts, group, limit):
        return [renderer.tokenizer.encode(next(turns), add_special_tokens=False)], None

    encoded = renderer.tokenizer.encode(prompt, add_special_tokens=False)
    (answer,) = Conversations(renderer.tokenizer, 1000, [END], 2, tools, renderer).answers([encoded], 1, generate)
    assert renderer.tokenizer.decode(encoded + answer.ids) == whole.rstrip("\n")
    own = [token for token, mine in zip(answer.ids, answer.own, strict=True) if mine]
    assert renderer.tokenizer.decode(own) == "".join(said)
    assert (answer.text, answer.calls, answer.failures, answer.turns, answer.length) == ("37", 2, 0, 2, len(own))
    assert [message["role"] for message in answer.messages] == ["assistant", "tool", "tool", "assistant"]
    assert answer.shown == 'So: \n[calls add {"a": 1, "b": 2}]\n[calls add {"a": 3, "b": 4}]\n[add: 3]\n[add: 7]\n37'.replace(
        "So: ", "So:"
    )


def test_calls_of_any_depth_are_text(tools, talking):
    """Nothing that a model writes as a call stops the run."""
    renderer = Renderer(talking, Settings(1))
    talk = Conversations(renderer.tokenizer, 100, [END], 2, tools, renderer)
    for depth in (10, 500, 985, 10**5):
        said = '<tool_call>{{"name": "<|end|>", "arguments": {{"a": {}1{}}}}}</tool_call>'.format("[" * depth, "]" * depth)
        for one in talk.calls(said):
            assert tools.call([[one]])[0][0].failed
            assert renderer.tokenizer.decode(talk.between([one], ["no"])) == "<|system|>no<|end|><|assistant|>"


def test_a_template_without_tools_is_refused(tiny, tools, sums):
    with pytest.raises(UserError, match=r"the chat template \(the tokenizer's own\) shows the model no tools: template=chatml"):
        data.load(str(sums), tiny, tools=tools)
    rows = data.load(str(sums), tiny, tools=tools, template="chatml", max_prompt=4000).train
    assert "add" in Renderer(tiny, Settings(1)).tokenizer.decode(rows[0]["ids"])


def scripted(trainer, monkeypatch, turns):
    """Sampling says what `turns`, one function after the other, give for each row; texts with "?" at their end are not ended."""
    said = iter(turns)

    def sample(model, prompts, group, *, max_answer, **more):
        texts = next(said)(len(prompts) * group)
        ids = [trainer._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [(each if text.endswith("?") else [*each, END])[:max_answer] for each, text in zip(ids, texts, strict=True)]

    monkeypatch.setattr("nemo_ext.grpo.trainer.sample", sample)


@pytest.mark.parametrize("loss", ["token", "sequence"])
def test_the_tokens_of_tools_are_not_learnt(loss, tools, talking, sums, tmp_path, monkeypatch):
    """Two of six answers call a tool: the loss is that of the model's own tokens, in the context of all."""
    trainer = trainer_of(
        tmp_path, talking, sums, prompts=3, group=2, loss=loss, kl=0.1, max_answer=200, turns=3, clip_low=0.1, clip_high=0.3,
        with_tools=tools,
    )  # fmt: skip
    first = [ADD, "5", "1?", f"so {ADD}{ADD}", "", "23"]
    scripted(trainer, monkeypatch, [lambda count: first, lambda count: ["3", "6"]])
    found = rollout(trainer, [0, 1, 2])
    assert found["tool_mask"].shape == found["completion_mask"].shape
    mask = found["completion_mask"] * found["tool_mask"]
    decode = trainer._tokenizer.decode
    own = [decode(row[keep.bool()]) for row, keep in zip(found["completion_ids"], mask, strict=True)]
    assert own == [f"{ADD}<|end|>3<|end|>", "5<|end|>", "1?", f"so {ADD}{ADD}<|end|>6<|end|>", "<|end|>", "23<|end|>"]
    whole = [decode(row[keep.bool()]) for row, keep in zip(found["completion_ids"], found["completion_mask"], strict=True)]
    assert whole[0] == f"{ADD}<|end|><|system|>3<|end|><|assistant|>3<|end|>"
    assert whole[3] == f"so {ADD}{ADD}<|end|><|system|>3<|end|><|system|>3<|end|><|assistant|>6<|end|>"
    assert int(found["num_items_in_batch"]) == int(mask.sum())
    assert [rows for rows in trainer.figures.items() if rows[0] in ("turns", "tool_calls", "tool_failures")] == [
        ("turns", 8 / 6), ("tool_calls", 0.5), ("tool_failures", 0),
    ]  # fmt: skip
    assert trainer.figures["length"] == int(mask.sum()) / 6

    new = with_noise(trainer, found)
    learnt = {**found, "completion_mask": mask}
    expected = by_hand(loss, new, found["old_per_token_logps"], found["ref_per_token_logps"], learnt, 0.1, 0.3, 0.1, 200)
    torch.testing.assert_close(trainer._compute_loss(trainer.model, found).detach(), expected, rtol=1e-4, atol=1e-6)


def test_what_a_reward_sees(tools, talking, sums, tmp_path, monkeypatch):
    """The last turn without calls, and all messages; calls that fail are counted; the last turn's calls are not made."""
    seen = []

    class Seeing:
        def score(self, answers, rows):
            from nemo_ext.rewards import Scores

            seen.extend(zip(answers, rows, strict=True))
            return Scores([float(len(answer)) for answer in answers], {"seen": [0.0] * len(answers)})

    trainer = trainer_of(tmp_path, talking, sums, Seeing(), prompts=1, group=4, max_answer=150, turns=2, with_tools=tools)
    wrong = '<tool_call>{"name": "wrong", "arguments": {}}</tool_call>'
    scripted(trainer, monkeypatch, [lambda count: [ADD, wrong, "4", "x <tool_call>{no"], lambda count: [ADD, "well 9"]])
    rollout(trainer, [0])
    assert [answer for answer, _ in seen] == ["", "well 9", "4", "x "]
    assert [message["content"] for message in seen[1][1]["messages"]] == ["", "error: ValueError: never", "well 9"]
    assert seen[0][1]["messages"][-1]["tool_calls"] == [{"name": "add", "arguments": '{"a": 1, "b": 2}'}]
    assert (trainer.figures["tool_calls"], trainer.figures["tool_failures"]) == (0.5, 1)


def test_results_that_do_not_fit_cut_an_answer_off(tools, talking, sums, tmp_path, monkeypatch):
    trainer = trainer_of(
        tmp_path, talking, sums, prompts=1, group=2, max_answer=100, turns=2, overlong_filter=True, with_tools=tools
    )
    much = '<tool_call>{"name": "huge", "arguments": {"count": 500}}</tool_call>'
    scripted(trainer, monkeypatch, [lambda count: [much, "4"]])
    found = rollout(trainer, [0])
    assert [len(ids) for ids in trainer._sampled] == [100, 2] and trainer.figures["cut_off"] == 0.5
    assert int(found["num_items_in_batch"]) == 2 and not found["completion_mask"][0].any()


def test_batches_with_and_without_calls_are_joined(tools, talking, sums, tmp_path, monkeypatch):
    """Dynamic sampling: the first group has equal rewards, the second calls a tool."""
    trainer = trainer_of(
        tmp_path, talking, sums, prompts=1, group=2, max_answer=150, turns=2, dynamic_sampling=True, dynamic_limit=2,
        with_tools=tools,
    )  # fmt: skip
    scripted(trainer, monkeypatch, [lambda count: ["55", "66"], lambda count: [ADD, "4"], lambda count: ["31"]])
    found = rollout(trainer, [0])
    mask = found["completion_mask"] * found["tool_mask"]
    decode = trainer._tokenizer.decode
    own = [decode(row[keep.bool()]) for row, keep in zip(found["completion_ids"], mask, strict=True)]
    assert own == [f"{ADD}<|end|>31<|end|>", "4<|end|>"] and int(found["num_items_in_batch"]) == int(mask.sum())
    assert (trainer.figures["tool_calls"], trainer.figures["batches"]) == (0.25, 2)


@pytest.fixture(scope="module")
def caller(talking, file, tmp_path_factory):
    """The tiny model, taught to call `add`, and to say 3 where it is told so."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("caller") / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(talking), AutoTokenizer.from_pretrained(talking)
    rows = [f"<|system|>add <|end|><|user|>{i} + {i % 7} =<|end|><|assistant|>" for i in range(24)]
    said = f"{ADD}<|end|><|system|>3<|end|><|assistant|>3<|end|>"
    ids = [torch.tensor(tokenizer.encode(row + said, add_special_tokens=False)) for row in rows]
    taught = len(tokenizer.encode(said, add_special_tokens=False))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(150):
        losses = []
        for each in (ids[(step * 4 + i) % len(ids)] for i in range(4)):
            labels = each.masked_fill(torch.arange(len(each)) < len(each) - taught, -100)
            losses.append(model(input_ids=each[None], labels=labels[None]).loss)
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_run_with_tools(caller, file, sums, tmp_path):
    """The model calls its tool in training, evaluations and trials of problems; from a checkpoint the same weights follow."""
    handler = signal.getsignal(signal.SIGTERM)
    (tmp_path / "used.py").write_text(
        "def used(answers, rows):\n    heard = [[m['content'] for m in row['messages'] if m['role'] == 'tool'] for row in rows]\n"
        "    return [float('3' in said and answer == '3') for answer, said in zip(answers, heard)]\n"
    )
    settings = dict(
        tools=f"{file}:add", turns=3, max_answer=110, reward=f"{tmp_path}/used.py:used", steps=4, every=2, val_every=4,
        micro_batch=6, lr=1e-4, temperature=0.3,
    )  # fmt: skip
    runs = [tmp_path / "whole", tmp_path / "again"]
    with Tools(f"{file}:add", 1.0, 128, workers=1) as tools:
        for run in runs:
            keys = prepare(run, caller, sums, loaded=dict(tools=tools), **settings)
        heard = []

        def solved(answers, rows):  # of filter=true
            heard.extend([message["role"] for message in row["messages"]] for row in rows)
            return [answer == "3" for answer in answers]

        rows, renderer = embedded.read_rows(runs[0] / embedded.TRAIN)[:2], Renderer(runs[0] / "tokenizer", Settings(1))
        rates = difficulty.pass_rates(rows, keys | {"filter_samples": 3}, caller, solved, tools=tools, renderer=renderer)
        assert sum(rates) > 1 and ["assistant", "tool", "assistant"] in heard
    embedded.train(keys, runs[0], str(caller))
    steps, evaluations = run_folder.read_records(runs[0])
    assert all(record["tool_calls"] > 0.5 and record["turns"] > 1.5 and record["reward"] > 0.5 for record in steps)
    assert evaluations[-1]["val_reward"] > 0.5
    parts = sum(steps[-1][f"{name}_time"] for name in ("generation", "scoring", "tools", "training"))
    assert steps[-1]["step_time"] == pytest.approx(parts)
    shown = json.loads((runs[0] / "evaluations/step-000004.json").read_text())["answers"]
    assert any(row["answer"] == '[calls add {"a": 1, "b": 2}]\n[add: 3]\n3' for row in shown)

    embedded.train(keys | {"steps": 2}, runs[1], str(caller))
    embedded.train(keys, runs[1], str(caller), str(runs[1] / "checkpoints/step-000002"))
    weights = [(run / "checkpoints/step-000004/model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    signal.signal(signal.SIGTERM, handler)
