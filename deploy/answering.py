"""From an HTTP request to the engine and back: submits, waits without blocking the loop, cancels when nobody listens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from deploy.engine.request import Logprob, Output, Request
from deploy.metrics import Metrics, Watch
from deploy.openai_api import Answer, error
from deploy.tools import ToolStream
from nemo_ext.tool_calls import ToolCall, parse


@dataclass(frozen=True)
class Asked:
    """What a body asks for: one engine request for each prompt, and how to write the answers."""

    requests: list[Request]
    answer: Answer
    stream: bool = False
    include_usage: bool = False
    tools: tuple[str, ...] = ()  # names of the functions that may be called

    @property
    def logprobs(self) -> bool:
        """Whether they are wanted."""
        return self.requests[0].logprobs is not None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests)


class Failure(Exception):
    """An answer that the engine could not finish. `status` is HTTP's, `body` the error's JSON."""

    def __init__(self, output: Output) -> None:
        super().__init__(output.message)
        self.status = {"timeout": 504, "cancelled": 503}.get(output.finish or "", 500)
        kind = "timeout_error" if self.status == 504 else "server_error"
        self.body = error(output.message or "the request was ended", kind, output.finish)


class Running:
    """Submitted requests and their outputs. `close` cancels what has not ended."""

    def __init__(self, engine, asked: Asked, metrics: Metrics, arrived: float) -> None:
        self._engine, self._asked, self._metrics = engine, asked, metrics
        self._watch, self._arrived = Watch(metrics, arrived), arrived
        self._queue: asyncio.Queue[tuple[float, Output]] = asyncio.Queue()
        self._numbers: list[int] = []
        self._open = sum(request.n for request in asked.requests)

    async def submit(self) -> None:
        """Queue all requests, or none. Raises Refused or Busy."""
        loop, offset = asyncio.get_running_loop(), 0
        try:
            for request in self._asked.requests:
                deliver = self._listener(loop, offset)
                self._numbers.append(await asyncio.to_thread(self._engine.submit, request, deliver))
                offset += request.n
        except BaseException:
            self.close()
            raise

    async def outputs(self) -> AsyncIterator[Output]:
        """Every output, until all answers have ended; its index counts through all prompts. Raises Failure."""
        while self._open:
            at, output = await self._queue.get()
            finished = output.finish is not None
            self._open -= finished
            self._watch.output(output.index, len(output.ids), at, finished)
            if output.finish in ("timeout", "cancelled", "error"):
                raise Failure(output)
            yield output
        self._watch.done(time.monotonic())

    def close(self) -> None:
        """Nobody listens any more."""
        if self._open:
            for number in self._numbers:
                self._engine.cancel(number)

    def _listener(self, loop: asyncio.AbstractEventLoop, offset: int) -> Callable[[Output], None]:
        def deliver(output: Output) -> None:
            moved = output if not offset else Output(
                output.index + offset, output.text, output.ids, output.logprobs, output.finish, output.message
            )  # fmt: skip
            loop.call_soon_threadsafe(self._queue.put_nowait, (time.monotonic(), moved))

        return deliver


async def whole(asked: Asked, running: Running) -> dict[str, Any]:
    """The JSON of a response that is not streamed. Raises Failure."""
    count = sum(request.n for request in asked.requests)
    texts: list[list[str]] = [[] for _ in range(count)]
    logprobs: list[list[Logprob]] = [[] for _ in range(count)]
    finish, generated = ["stop"] * count, 0
    async for output in running.outputs():
        texts[output.index].append(output.text)
        logprobs[output.index] += output.logprobs
        generated += len(output.ids)
        if output.finish:
            finish[output.index] = output.finish
    choices = []
    for index in range(count):
        text, calls = "".join(texts[index]), []
        if asked.tools:
            text, calls = parse(text, asked.tools)
        ended = "tool_calls" if calls else finish[index]
        choices.append(asked.answer.choice(index, text, logprobs[index] if asked.logprobs else None, ended, calls))
    return asked.answer.whole(choices, asked.prompt_tokens, generated)


async def chunks(asked: Asked, running: Running) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event of a stream; after a failure its error is the last one, unless nothing was said before. Raises
    Failure then."""
    generated, seen = 0, set()
    held = {}
    try:
        async for output in running.outputs():
            generated += len(output.ids)
            text, calls = output.text, []
            if asked.tools:
                text, calls = _tools(held.setdefault(output.index, ToolStream(asked.tools)), output)
            logprobs = output.logprobs if asked.logprobs else None
            first = output.index not in seen
            if text or logprobs or calls or first or output.finish:
                seen.add(output.index)
                ended = "tool_calls" if calls else output.finish
                if ended and (text or calls or logprobs or first):
                    yield asked.answer.chunk(output.index, text, logprobs, None, first, calls)
                    text, logprobs, first, calls = "", None, False, []
                yield asked.answer.chunk(output.index, text, logprobs, ended, first, calls)
    except Failure as failure:
        if not seen:
            raise
        yield failure.body
        return
    if asked.include_usage:
        yield asked.answer.usage_chunk(asked.prompt_tokens, generated)


def _tools(stream: ToolStream, output: Output) -> tuple[str, list[ToolCall]]:
    text, calls = stream.push(output.text), []
    if output.finish:
        rest, calls = stream.close()
        text += rest
    return text, calls
