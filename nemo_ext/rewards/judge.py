"""The reward `judge`: how well a language model behind an OpenAI-compatible endpoint thinks of an answer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_ext.errors import UserError
from nemo_ext.evaluation import judging
from nemo_ext.evaluation.generation import Prompt
from nemo_ext.evaluation.judge import Endpoint
from nemo_ext.evaluation.judge import Judge as Client
from nemo_ext.rewards.model import question
from nemo_ext.rewards.parts import Failures, Row, need

RETRIES = 2
WORKERS = 8


class Judge:
    """Asks for a rating from 1 to 10 by the rubric, and takes (rating - 1) / 9. An answer without a reply after RETRIES more
    attempts, without a rating in it, or beyond the time of the batch gets 0 and is counted."""

    def __init__(
        self, url: str | None, model: str | None, key_env: str | None, rubric: str | None, replies: Path | None, timeout: float
    ) -> None:
        if not url or not model:
            raise UserError("reward=judge needs judge_url=http(s)://HOST[:PORT]/v1 and judge_model=NAME")
        self._rubric = rubric or judging.RUBRIC
        endpoint = Endpoint(url, model, key_env, timeout=timeout, retries=RETRIES, workers=WORKERS)
        self._client = Client(endpoint, replies)
        waits = sum(endpoint.first_wait * 2**attempt for attempt in range(RETRIES))
        self._limit = (RETRIES + 1) * timeout + waits  # seconds that one answer may take

    def check(self, rows: Sequence[Row]) -> None:
        """Every row has a question, and the endpoint answers. Raises UserError or RunError where it does not."""
        need("judge", rows, "question")
        self._client.ask([{"role": "user", "content": "Answer with the word ready."}])

    def score(self, answers: Sequence[str], rows: Sequence[Row], failures: Failures) -> list[float]:
        """The ratings on [0, 1]. Takes at most the limit of one answer for every WORKERS of them."""
        work: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, str | None, str]] = queue.SimpleQueue()
        asked = [self._messages(answer, row) for answer, row in zip(answers, rows, strict=True)]
        for place in range(len(asked)):
            work.put(place)

        def ask() -> None:
            while True:
                try:
                    place = work.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((place, self._client.ask(asked[place]), ""))
                except Exception as error:
                    done.put((place, None, f"{type(error).__name__}: {error}"))

        for _ in range(min(WORKERS, len(asked))):  # daemons: an endpoint that drips bytes for ever cannot hold up the end
            threading.Thread(target=ask, daemon=True).start()
        deadline = time.monotonic() + self._limit * -(-len(asked) // WORKERS)
        found: dict[int, tuple[str | None, str]] = {}
        while len(found) < len(asked):
            try:
                place, reply, error = done.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            found[place] = reply, error
        while not work.empty():
            work.get_nowait()
        return [self._value(*found.get(place, (None, "no reply in time")), failures) for place in range(len(asked))]

    def close(self) -> None:
        """Nothing is left running."""

    def _messages(self, answer: str, row: Row) -> list[dict[str, str]]:
        reference = row.get("answer")
        references = (str(reference),) if reference not in (None, "") else ()
        return judging.rating_messages(Prompt(tuple(question(row)), references, ""), answer, self._rubric)

    def _value(self, reply: str | None, error: str, failures: Failures) -> float:
        if reply is None:
            return failures.add(error)
        rating = judging.parse_rating(reply)
        if rating is None:
            return failures.add(f"no line Rating: N in the reply {' '.join(reply.split())[:80]!r}")
        return (rating - judging.LOWEST) / (judging.HIGHEST - judging.LOWEST)
