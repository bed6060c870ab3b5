"""The reward `math`: the final answer equals the row's, numerically or symbolically."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_ext.errors import UserError
from nemo_ext.rewards import equality, sandbox
from nemo_ext.rewards.parts import Failures, Row, need
from nemo_ext.rewards.pool import Pool
from nemo_ext.rewards.worker import Job

LOOKED_AT = 32  # references that `check` reads


class Maths:
    """Scores in confined worker processes where this machine can confine them; nothing of an answer is run as code anyway."""

    def __init__(self, timeout: float, workers: int, mode: str) -> None:
        self._timeout = timeout
        try:
            means = sandbox.means(mode)
        except UserError:
            if mode != "auto":
                raise
            means = None
        job = Job("nemo_ext.rewards.equality:scorer", (), equality.PRELOAD, means, tuple(sandbox.readable()))
        self._pool = Pool(job, workers)

    def check(self, rows: Sequence[Row]) -> None:
        """Every row has an answer, and of the first ones at least one can be read. Starts the workers."""
        need("math", rows, "answer")
        self._pool.start()
        texts = [str(row["answer"]) for row in rows[:LOOKED_AT]]
        found = self._pool.map([([text], [{}]) for text in texts], self._timeout)
        if texts and not any(outcome.values and outcome.values[0] for outcome in found):
            raise UserError(
                f"reward=math: none of the first {len(texts)} answers is mathematics, such as {texts[0][:60]!r}: use "
                "reward=exact or reward=choice, or name another column with answer_key="
            )

    def score(self, answers: Sequence[str], rows: Sequence[Row], failures: Failures) -> list[float]:
        """1 for each answer that is right. Equal pairs of answer and reference are compared once."""
        pairs = [(answer, str(row["answer"])) for answer, row in zip(answers, rows, strict=True)]
        different = list(dict.fromkeys(pairs))
        outcomes = self._pool.map([([answer], [{"answer": truth}]) for answer, truth in different], self._timeout)
        by_pair = dict(zip(different, outcomes, strict=True))
        return [failures.outcome(by_pair[pair]) for pair in pairs]

    def close(self) -> None:
        """End the workers."""
        self._pool.close()
