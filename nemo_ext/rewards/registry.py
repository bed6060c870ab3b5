"""Rewards by name, their settings, and weighted sums of them."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nemo_ext.errors import UserError
from nemo_ext.rewards.parts import Failures, Part, Row, Rule
from nemo_ext.rewards.sandbox import MEMORY


@dataclass(frozen=True)
class Settings:
    """What rewards are told. `timeout` seconds are the most that one answer may take, `workers` the processes that score at a
    time, `length_scale` the characters that cost a whole unit of `length`; `sandbox` is a mode of sandbox.means, and
    `sandbox_memory` what a program in it may use, in MiB above an idle interpreter."""

    timeout: float = 10.0
    workers: int = field(default_factory=lambda: max(1, min(8, os.cpu_count() or 1)))
    sandbox: str = "auto"
    sandbox_memory: int = MEMORY >> 20
    length_scale: int = 1000
    judge_url: str | None = None
    judge_model: str | None = None
    judge_key_env: str | None = None
    judge_rubric: str | None = None
    judge_replies: Path | None = None
    reward_model: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise UserError(f"reward_timeout={self.timeout} must be more than 0")
        if self.workers < 1 or self.length_scale < 1:
            raise UserError("the workers and the length_scale of rewards must be at least 1")


@dataclass(frozen=True)
class Scores:
    """Values of a batch of answers: the sums, the parts by name before weighting, how many values are 0 for a failure of the
    reward itself, and the first message about one."""

    total: list[float]
    parts: dict[str, list[float]]
    failures: int = 0
    message: str | None = None


class Reward:
    """A weighted sum of rewards; for one of weight 1, that reward. Also a context manager, which ends its processes."""

    def __init__(self, parts: dict[str, tuple[float, Part]]) -> None:
        self._parts = parts

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each part."""
        return {name: weight for name, (weight, _) in self._parts.items()}

    def check(self, rows: Sequence[Row]) -> None:
        """To be called before training: raises UserError where rows lack what a part needs, or a part cannot work; starts what
        takes time to start."""
        for _, part in self._parts.values():
            part.check(rows)

    def score(self, answers: Sequence[str], rows: Sequence[Row]) -> Scores:
        """The values of `answers`, answer i to the problem of rows[i]. Never raises for what an answer or a reward does."""
        if len(answers) != len(rows):
            raise ValueError(f"{len(answers)} answers to {len(rows)} rows")
        failures = Failures()
        found: dict[str, list[float]] = {}
        for name, (_, part) in self._parts.items():
            of_part = Failures()
            found[name] = part.score(answers, rows, of_part) if answers else []
            failures.count += of_part.count
            failures.message = failures.message or (f"{name}: {of_part.message}" if of_part.message else None)
        total = [math.fsum(self._parts[name][0] * found[name][place] for name in found) for place in range(len(answers))]
        return Scores(total, found, failures.count, failures.message)

    def __call__(self, answers: list[str], rows: list[Row]) -> list[float]:
        """The sums alone."""
        return self.score(answers, rows).total

    def close(self) -> None:
        """End all processes."""
        for _, part in self._parts.values():
            part.close()

    def __enter__(self) -> Reward:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Kind:
    line: str
    make: Callable[[Settings, str | None], Part]


def _exact(settings: Settings, argument: str | None) -> Part:
    from nemo_ext.rewards import text

    return Rule("exact", text.exact, ("answer",))


def _numeric(settings: Settings, argument: str | None) -> Part:
    from nemo_ext.rewards import text

    def fault(row: Row) -> str | None:
        return None if text.reference_number(row) is not None else f"the answer {str(row['answer'])[:60]!r} is no number"

    return Rule("numeric", text.numeric, ("answer",), fault)


def _choice(settings: Settings, argument: str | None) -> Part:
    from nemo_ext.rewards import text

    def fault(row: Row) -> str | None:
        shown = f"the answer {str(row['answer'])[:60]!r} is neither a letter nor one of the row's `choices`"
        return None if text.reference_letter(row) is not None else shown

    return Rule("choice", text.choice, ("answer",), fault)


def _format(settings: Settings, argument: str | None) -> Part:
    from nemo_ext.rewards import text

    return Rule("format", text.layout)


def _length(settings: Settings, argument: str | None) -> Part:
    return Rule("length", lambda answer, row: min(1.0, len(answer) / settings.length_scale))


def _math(settings: Settings, argument: str | None) -> Part:
    from nemo_ext.rewards.maths import Maths

    return Maths(settings.timeout, settings.workers, settings.sandbox)


def _code(settings: Settings, argument: str | None) -> Part:
    from nemo_ext.rewards.code import Code

    return Code(settings.timeout, settings.workers, settings.sandbox, settings.sandbox_memory << 20)


def _reasoning_gym(settings: Settings, argument: str | None) -> Part:
    from nemo_ext.rewards.reasoning_gym import ReasoningGym

    return ReasoningGym(argument, settings.timeout, settings.workers, settings.sandbox)


def _model(settings: Settings, argument: str | None) -> Part:
    from nemo_ext.rewards.model import Model

    return Model(settings.reward_model)


def _judge(settings: Settings, argument: str | None) -> Part:
    from nemo_ext.rewards.judge import Judge

    s = settings
    return Judge(s.judge_url, s.judge_model, s.judge_key_env, s.judge_rubric, s.judge_replies, s.timeout)


_KINDS = {
    "math": _Kind("the final answer equals `answer`, as a number or as an expression", _math),
    "numeric": _Kind("the final number equals the number in `answer`", _numeric),
    "exact": _Kind("the final answer is the text of `answer`", _exact),
    "choice": _Kind("the letter picked is that of `answer`, a letter, a place in `choices`, or a choice's text", _choice),
    "format": _Kind("<think>...</think> and then <answer>...</answer>, each once", _format),
    "length": _Kind("characters / length_scale, at most 1: give it a weight below 0", _length),
    "code": _Kind("the program passes `tests`: assertions, or inputs and outputs", _code),
    "reasoning_gym": _Kind(
        "the verifier of a reasoning-gym task, as reasoning_gym:TASK or by the row's metadata", _reasoning_gym
    ),
    "model": _Kind("the score of a sequence classifier (reward_model=), not limited to [0, 1]", _model),
    "judge": _Kind("the rating by a language model behind an OpenAI-compatible endpoint (judge_url=, judge_model=)", _judge),
}


def names() -> dict[str, str]:
    """Every reward by name with a line about it."""
    return {name: kind.line for name, kind in _KINDS.items()} | {"FILE.py:FUNCTION": "a function of your own"}


def build(spec: str, *, timeout: float = 10.0, **settings: Any) -> Reward:
    """The reward that `spec` names: NAME, NAME:WEIGHT, or several with commas; settings are the fields of Settings.

    Nothing is started before the reward's first use or `check`. Raises UserError for unknown names, weights that are no numbers,
    settings that a reward needs and lacks, and isolation that cannot be had.
    """
    unknown = set(settings) - {each.name for each in fields(Settings)}
    if unknown:
        raise TypeError(f"rewards have no setting {sorted(unknown)[0]}")
    chosen = Settings(timeout=timeout, **{name: value for name, value in settings.items() if value is not None})
    parts: dict[str, tuple[float, Part]] = {}
    for text in spec.split(","):
        name, argument, weight = _read(text.strip(), spec)
        shown = name if argument is None else f"{name}:{argument}"
        if shown in parts:
            raise UserError(f"reward={spec}: {shown} is named twice")
        if name in _KINDS:
            parts[shown] = weight, _KINDS[name].make(chosen, argument)
        else:
            from nemo_ext.rewards.user import User

            parts[shown] = weight, User(name, argument, chosen.timeout, chosen.workers)
    return Reward(parts)


def _read(text: str, spec: str) -> tuple[str, str | None, float]:
    """Name, argument and weight of one part."""
    name, *rest = text.split(":")
    name = name if name.endswith(".py") else name.replace("-", "_")
    weight = 1.0
    if rest and _is_number(rest[-1]):
        weight = float(rest.pop())
        if not math.isfinite(weight) or weight == 0:
            raise UserError(f"reward={spec}: the weight of {name} must be a number other than 0")
    if name.endswith(".py"):
        if len(rest) != 1 or not rest[0].isidentifier():
            raise UserError(f"reward={spec}: a function of your own is named as {name}:FUNCTION or {name}:FUNCTION:WEIGHT")
        return name, rest[0], weight
    if name not in _KINDS:
        near = difflib.get_close_matches(name, list(_KINDS), n=1, cutoff=0.4)
        raise UserError(
            f"reward={spec}: there is no reward {name or 'without a name'}"
            + (f", did you mean {near[0]}?" if near else f": {', '.join(_KINDS)}, or FILE.py:FUNCTION")
        )
    if len(rest) > 1 or rest and name != "reasoning_gym":
        raise UserError(f"reward={spec}: {rest[0]!r} behind {name}: is no weight")
    return name, (rest[0] if rest else None), weight


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
