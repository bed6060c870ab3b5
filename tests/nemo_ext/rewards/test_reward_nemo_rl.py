"""The NeMo-RL environment against the interface as it was read from NeMo-RL's source (interface.json). Ray and NeMo-RL are
absent: modules made from that data stand in for them."""

import importlib
import inspect
import json
import sys
import types
from abc import ABC, abstractmethod
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from nemo_ext import platform, rewards
from nemo_ext.errors import UserError
from nemo_ext.rewards import nemo_rl_environment

INTERFACE = json.loads(Path(rewards.__file__).with_name("interface.json").read_text())["versions"]
METHODS = ("step", "global_post_process_and_metrics")


@pytest.fixture(params=list(INTERFACE))
def actor(request, monkeypatch):
    """The actor class under a version's interface, and that interface."""
    interface = INTERFACE[request.param]
    body = {name: abstractmethod(lambda self, *arguments: None) for name in METHODS}
    made = types.ModuleType("nemo_rl.environments.interfaces")
    made.EnvironmentInterface = type("EnvironmentInterface", (ABC,), body)
    made.EnvironmentReturn = namedtuple("EnvironmentReturn", interface["fields"])
    ray = types.ModuleType("ray")
    ray.remote = lambda **options: lambda cls: types.SimpleNamespace(actor=cls, options=options)
    for name, module in (("ray", ray), ("nemo_rl", types.ModuleType("nemo_rl")), (made.__name__, made),
                         ("nemo_rl.environments", types.ModuleType("nemo_rl.environments"))):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    nemo_rl_environment.actor_class.cache_clear()
    yield importlib.import_module("nemo_ext.rewards.nemo_rl_environment").RewardEnvironment.actor, interface
    nemo_rl_environment.actor_class.cache_clear()


def test_methods_and_fields_are_the_interfaces(actor):
    cls, interface = actor
    assert not inspect.isabstract(cls)
    for name in METHODS:
        assert list(inspect.signature(getattr(cls, name)).parameters) == interface[name]


def test_step_scores_a_batch(actor):
    cls, interface = actor
    settings = {"settings": {"length_scale": 10}, "turns": 1, "tools": None}
    environment = cls({"reward": "numeric:1.0,format:0.5", "timeout": 5.0, **settings})
    logs = [[{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": said}]
            for said in ("<think>so</think><answer>2</answer>", "it is 2", "3")]  # fmt: skip
    metadata = [{"question": "1+1?", "answer": "2"}, {"ground_truth": "2"}, {"answer": "2"}]
    found = environment.step(logs, metadata)
    assert found.rewards.tolist() == [1.5, 1.0, 0.0] and found.rewards.dtype == torch.float32
    assert found.terminateds.tolist() == [1.0, 1.0, 1.0]
    assert found.observations[0] == {"role": "environment", "content": "Environment: reward 1.5"}
    assert found.metadata == metadata and found.next_stop_strings == [None] * 3 and found.answers is None
    assert metadata[1] == {"ground_truth": "2"}
    batch = {"total_reward": found.rewards}
    same, metrics = environment.global_post_process_and_metrics(batch)
    assert same is batch
    assert metrics == {"reward/numeric": pytest.approx(2 / 3), "reward/format": pytest.approx(1 / 3), "reward_failures": 0.0}
    assert environment.global_post_process_and_metrics(batch)[1] == {"reward_failures": 0.0}
    environment.shutdown()


def test_the_same_values_as_without_nemo_rl(actor):
    cls, _ = actor
    environment = cls({"reward": "exact", "timeout": 5.0})
    answers, rows = ["a", "b"], [{"answer": "a"}] * 2
    logs = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
    with rewards.build("exact") as reward:
        assert environment.step(logs, rows).rewards.tolist() == reward(answers, rows)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer; transformers is there before anything stands in for Ray."""
    sys.path.append(str(Path(__file__).parents[1] / "grpo"))
    from grpo_models import write_tokenizer

    platform.activate()
    importlib.import_module("transformers")
    write_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"))
    return folder


def test_calls_of_tools_are_answered_until_the_last_turn(tokenizer, actor, tmp_path):
    """Turns that call tools get the template's text with the results and no reward; the others end, and so does the last."""
    (tmp_path / "mine.py").write_text(
        "def add(a: int, b: int) -> int:\n    'Adds.'\n    return a + b\n"
        "def heard(answers, rows):\n    return [len(row['messages']) for row in rows]\n"
    )
    told = {"tools": f"{tmp_path}/mine.py:add", "turns": 2, "tool_timeout": 5.0, "memory": 128,
            "tokenizer": str(tokenizer), "template": "chatml"}  # fmt: skip
    environment = actor[0]({"reward": f"exact,{tmp_path}/mine.py:heard:0.1", "timeout": 5.0, **told})
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": %s}}</tool_call>'
    logs = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
            for said in (f"so {call % 1}", "2", call % '"x"')]  # fmt: skip
    found = environment.step(logs, [{"answer": "2"}] * 3)
    assert found.terminateds.tolist() == [0.0, 1.0, 0.0]
    assert found.rewards.tolist() == pytest.approx([0.0, 1.1, 0.0])
    assert found.observations[0]["content"] == "\n<|im_start|>tool\n2<|end|>\n<|im_start|>assistant\n"
    assert "error: TypeError" in found.observations[2]["content"]
    for log, observation, said in zip(logs, found.observations, (call % 2, "", "2"), strict=True):
        log += [observation, {"role": "assistant", "content": said}]
    again = environment.step([logs[0], logs[2]], [found.metadata[0], found.metadata[2]])
    assert again.terminateds.tolist() == [1.0, 1.0]
    assert again.rewards.tolist() == pytest.approx([0.3, 1.3])  # a call is no answer; three messages each
    metrics = environment.global_post_process_and_metrics({})[1]
    assert (metrics["tool_calls"], metrics["tool_failures"]) == (2.0, 1.0)
    environment.shutdown()


def test_without_nemo_rl_one_line():
    try:
        importlib.import_module("nemo_rl")
    except ImportError:
        with pytest.raises(UserError, match="needs the NeMo-RL container"):
            nemo_rl_environment.RewardEnvironment  # noqa: B018
