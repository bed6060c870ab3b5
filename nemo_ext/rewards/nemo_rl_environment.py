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
    """What the actor does, without Ray: scores the answer that ends each conversation, which ends the episode.

    `cfg` holds `reward` (as reward= takes it), `timeout` in seconds, and `settings`, fields of registry.Settings. The metadata of
    a sample is its data record; where that has no `answer`, its `ground_truth`, as NeMo-RL's own processors name it, is taken.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        if cfg.get("turns", 1) != 1 or cfg.get("tools"):
            raise UserError(f"turns={cfg.get('turns')}: the rewards' NeMo-RL environment has one turn and no tools")
        settings = dict(cfg.get("settings") or {})
        self._reward = registry.build(cfg["reward"], timeout=cfg.get("timeout", registry.Settings.timeout), **settings)
        self._sums: dict[str, float] = {}
        self._answers = 0
        self._failures = 0
        self._message: str | None = None

    def scores(self, message_log_batch: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Row]) -> registry.Scores:
        """The scores of a batch of conversations, added to what `metrics` reports."""
        answers = [answer_of(messages) for messages in message_log_batch]
        rows = [row_of(messages, each) for messages, each in zip(message_log_batch, metadata, strict=True)]
        scores = self._reward.score(answers, rows)
        for name, values in scores.parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + sum(values)
        self._answers += len(answers)
        self._failures += scores.failures
        self._message = self._message or scores.message
        return scores

    def metrics(self) -> dict[str, float]:
        """Means of the parts and the failures since the last call."""
        found = {f"reward/{name}": total / self._answers for name, total in self._sums.items() if self._answers}
        found["reward_failures"] = float(self._failures)
        if self._message:
            print(f"{self._failures} values are 0 because the reward itself failed, first: {self._message}", flush=True)
        self._sums, self._answers, self._failures, self._message = {}, 0, 0, None
        return found

    def close(self) -> None:
        """End the rewards' processes."""
        self._reward.close()


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
            """Rewards (float32, [b]) of the conversations, all of which end."""
            total = self._environment.scores(message_log_batch, metadata).total
            return EnvironmentReturn(
                observations=[{"role": ROLE, "content": f"Environment: reward {value:g}"} for value in total],
                metadata=metadata,
                next_stop_strings=[None] * len(total),
                rewards=torch.tensor(total, dtype=torch.float32),
                terminateds=torch.ones(len(total), dtype=torch.float32),
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
