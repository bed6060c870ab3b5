"""The rewards as an environment of NeMo-RL: a Ray actor that implements its EnvironmentInterface. Never run here, where neither
Ray nor NeMo-RL is installed.

NeMo-RL starts `RewardEnvironment` by its name in this module (`actor_class_fqn` of its registry). Ray and NeMo-RL are imported
when that name is asked for. interface.json beside this file says what the interface is in each version and where it was read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ext.errors import UserError
from nemo_ext.rewards import registry
from nemo_ext.rewards.parts import Row

ROLE = "environment"


class Environment:
    """What the actor does, without Ray: answers a turn's calls of tools, and scores an answer without any, or of the last turn,
    which ends the episode.

    `cfg` holds `reward` (as reward= takes it), `timeout` in seconds, and `settings`, fields of registry.Settings. The metadata of
    a sample is its data record; where that has no `answer`, its `ground_truth`, as NeMo-RL's own processors name it, is taken.
    With `tools`, also `turns`, `tool_timeout`, `memory` (MiB), and the folder `tokenizer` and file `template` that show results.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        settings = dict(cfg.get("settings") or {})
        self._reward = registry.build(cfg["reward"], timeout=cfg.get("timeout", registry.Settings.timeout), **settings)
        self._sums: dict[str, float] = {}
        self._answers = 0
        self._failures = 0
        self._message: str | None = None
        self._turns = cfg.get("turns", 1) if cfg.get("tools") else 1
        self._talk = _conversations(cfg) if cfg.get("tools") else None
        self._calls = {"tool_calls": 0, "tool_failures": 0}

    def replies(
        self, message_log_batch: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Row]
    ) -> list[tuple[str, Row] | None]:
        """For each conversation whose last turn calls tools and is not the last one allowed, what the template writes behind it,
        and its record with all messages so far; None for the others."""
        if self._talk is None:
            return [None] * len(metadata)
        from nemo_ext.grpo.conversation import spoken, told, without_calls

        found: list[tuple[str, Row] | None] = []
        calls = []
        for messages in message_log_batch:
            turns = [str(message["content"]) for message in messages if message["role"] == "assistant"]
            calls.append(self._talk.calls(turns[-1]) if len(turns) < self._turns else [])
        results = iter(self._talk.tools.call([each for each in calls if each]))
        for messages, row, each in zip(message_log_batch, metadata, calls, strict=True):
            if not each:
                found.append(None)
                continue
            given = next(results)
            self._calls["tool_calls"] += len(each)
            self._calls["tool_failures"] += sum(result.failed for result in given)
            text = without_calls(str(messages[-1]["content"]), each)
            said = [*(row or {}).get("messages", ()), spoken(text, each), *told(each, given)]
            found.append((self._talk.text_between(each, [result.text for result in given]), {**(row or {}), "messages": said}))
        return found

    def scores(self, message_log_batch: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Row]) -> registry.Scores:
        """The scores of a batch of conversations, added to what `metrics` reports."""
        answers = [self._answer(messages) for messages in message_log_batch]
        rows = [row_of(messages, each) for messages, each in zip(message_log_batch, metadata, strict=True)]
        if self._talk is not None:
            rows = [{**row, "messages": [*row.get("messages", ()), {"role": "assistant", "content": answer}]}
                    for row, answer in zip(rows, answers, strict=True)]  # fmt: skip
        scores = self._reward.score(answers, rows)
        for name, values in scores.parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + sum(values)
        self._answers += len(answers)
        self._failures += scores.failures
        self._message = self._message or scores.message
        return scores

    def _answer(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if self._talk is None:
            return answer_of(messages)
        from nemo_ext.grpo.conversation import without_calls

        last = next((str(message["content"]) for message in reversed(messages) if message["role"] == "assistant"), "")
        return without_calls(last, self._talk.calls(last))

    def metrics(self) -> dict[str, float]:
        """Means of the parts and the failures since the last call."""
        found = {f"reward/{name}": total / self._answers for name, total in self._sums.items() if self._answers}
        found["reward_failures"] = float(self._failures)
        if self._talk is not None:
            found |= {name: float(count) for name, count in self._calls.items()}
            self._calls = dict.fromkeys(self._calls, 0)
        if self._message:
            print(f"{self._failures} values are 0 because the reward itself failed, first: {self._message}", flush=True)
        self._sums, self._answers, self._failures, self._message = {}, 0, 0, None
        return found

    def close(self) -> None:
        """End the rewards' and the tools' processes."""
        self._reward.close()
        if self._talk is not None:
            self._talk.tools.close()


def _conversations(cfg: Mapping[str, Any]) -> Any:
    """The tools, started, with the template that shows their results."""
    from nemo_ext.data.chat.render import Renderer, Settings
    from nemo_ext.grpo.conversation import Conversations
    from nemo_ext.grpo.tools import Tools

    tools = Tools(cfg["tools"], cfg["tool_timeout"], cfg["memory"])
    tools.start()
    renderer = Renderer(cfg["tokenizer"], Settings(1, cfg.get("template")))
    return Conversations(renderer.tokenizer, 0, (), cfg["turns"], tools, renderer)


def answer_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the model said in a conversation."""
    return "".join(str(message["content"]) for message in messages if message["role"] == "assistant")


def row_of(messages: Sequence[Mapping[str, Any]], metadata: Row | None) -> Row:
    """The data record of a sample."""
    row = dict(metadata or {})
    if "answer" not in row and "ground_truth" in row:
        row["answer"] = row["ground_truth"]
    if "question" not in row:
        row["question"] = "".join(str(message["content"]) for message in messages if message["role"] == "user")
    return row


@functools.cache
def actor_class() -> Any:
    """The Ray actor class. Raises UserError where Ray or NeMo-RL is missing."""
    try:
        import ray
        import torch
        from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
    except ImportError as error:
        raise UserError(f"the NeMo-RL environment needs the NeMo-RL container ({error})") from None

    class RewardEnvironment(EnvironmentInterface):
        """nemo_ext.rewards in NeMo-RL."""

        def __init__(self, cfg: Mapping[str, Any]) -> None:
            self._environment = Environment(cfg)

        def step(self, message_log_batch: list[Any], metadata: list[Any]) -> Any:
            """Rewards (float32, [b]) of the conversations that end; the others have none yet, and the results of their calls."""
            replies = self._environment.replies(message_log_batch, metadata)
            ending = [place for place, reply in enumerate(replies) if reply is None]
            scores = self._environment.scores([message_log_batch[i] for i in ending], [metadata[i] for i in ending])
            total = [0.0] * len(replies)
            for place, value in zip(ending, scores.total, strict=True):
                total[place] = value
            said = [f"Environment: reward {value:g}" if reply is None else reply[0]
                    for reply, value in zip(replies, total, strict=True)]  # fmt: skip
            known = [row if reply is None else reply[1] for reply, row in zip(replies, metadata, strict=True)]
            return EnvironmentReturn(
                observations=[{"role": ROLE, "content": text} for text in said],
                metadata=known,
                next_stop_strings=[None] * len(total),
                rewards=torch.tensor(total, dtype=torch.float32),
                terminateds=torch.tensor([float(reply is None) for reply in replies]),
                answers=None,
            )

        def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
            """The batch as it is, and the means of the parts since the last call."""
            return batch, self._environment.metrics()

        def shutdown(self) -> None:
            """End the rewards' processes."""
            self._environment.close()

    return ray.remote(max_restarts=-1, max_task_retries=-1)(RewardEnvironment)


def __getattr__(name: str) -> Any:
    if name == "RewardEnvironment":
        return actor_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
