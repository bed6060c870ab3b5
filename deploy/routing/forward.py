"""A request on its way: to a server of the version that is its turn, to another one if that fails before its answer begins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from deploy.openai_api import error
from deploy.routing.health import Backend, Rules
from deploy.routing.metrics import NOBODY, RouterMetrics
from deploy.routing.table import Version

HELD = 8 << 20  # bytes of an answer that is no stream, kept until its end so that a server's death before it costs nothing
CLOSED = 499  # the client left: nginx's status, for the metrics only
GRACE = 5.0  # seconds for a client that is told that its time is up
CUT = "cut"  # the server died within a stream, for the metrics only
AGAIN = (502, 503)  # the server, or what stands before it, did not begin
HEADER = "x-model-version"
# RFC 9110, 7.6.1: what belongs to one connection. The client writes content-length and host anew.
ONE_HOP = {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
           b"transfer-encoding", b"upgrade", b"expect", b"host", b"content-length"}  # fmt: skip
FROM_SERVER = ONE_HOP - {b"content-length"} | {b"date", b"server", HEADER.encode()}

Headers = list[tuple[bytes, bytes]]


class NotJson(ValueError):
    """The body is no JSON object."""


@dataclass
class Asked:
    """A request as the client sent it."""

    path: str  # with its query, as it was written
    headers: Headers
    raw: bytes
    body: dict[str, Any]
    key: str  # decides whose turn it is
    arrived: float = field(default_factory=time.monotonic)

    @property
    def model(self) -> str | None:
        """What the client calls the model."""
        return model if isinstance(model := self.body.get("model"), str) else None

    def to(self, url: str, version: Version, names: Mapping[str, Any]) -> httpx.Request:
        """The request for a server of `version`. If its model is one of `names`, it is replaced by the version's."""
        content = self.raw
        if self.model in names and self.model != version.model:
            content = json.dumps(self.body | {"model": version.model}).encode()
        headers = self.headers
        if version.api_key is not None:
            headers = [pair for pair in headers if pair[0] != b"authorization"]
            headers = [*headers, (b"authorization", f"Bearer {version.api_key}".encode())]
        return httpx.Request("POST", url + self.path, headers=headers, content=content)


def read(scope: Scope, raw: bytes, user_header: str, number: int) -> Asked:
    """The request of a scope with its body. Requests of one user have one key, others their `number`. Raises NotJson."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise NotJson("the body is not JSON") from None
    if not isinstance(body, dict):
        raise NotJson("the body is no JSON object")
    headers = [(name.lower(), value) for name, value in scope["headers"]]
    one_hop = ONE_HOP | {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    user = dict(headers).get(user_header.lower().encode(), b"").decode("latin-1") or body.get("user")
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    return Asked(
        path=((scope.get("raw_path") or scope["path"].encode()) + query).decode("latin-1"),
        headers=[(name, value) for name, value in headers if name not in one_hop],
        raw=raw,
        body=body,
        key=f"user {user}" if isinstance(user, str) and user else f"request {number}",
    )


def timeouts(connect: float, silence: float | None = None) -> dict[str, dict[str, float | None]]:
    """httpx's timeouts of a request (s). A model may think for long: only connecting is bounded here, unless `silence` is too."""
    return {"timeout": {"connect": connect, "read": silence, "write": silence, "pool": None}}


class Again(Exception):
    """A server did not begin to answer. `response`: what it said instead, if anything."""

    def __init__(self, reason: str, response: Response | None = None) -> None:
        super().__init__(reason)
        self.reason, self.response = reason, response


@dataclass
class Begun:
    """The beginning of an answer that can no longer fail as a whole, and the rest."""

    status: int
    headers: Headers
    stream: bool  # server-sent events
    first: bytes
    rest: AsyncIterator[bytes] | None  # None: `first` is all of it
    response: httpx.Response


class Forward:
    """Passes one request on. An ASGI application of its own.

    `pick(asked, tried)` says which server is next, or None; it is asked before each attempt, so that a reload counts at once.
    `names`: the names of the model that stand for all versions or one of them.
    """

    def __init__(
        self,
        asked: Asked,
        pick: Callable[[Asked, set[Backend]], tuple[Version, Backend] | None],
        first_choice: str,
        names: Mapping[str, Any],
        client: httpx.AsyncClient,
        metrics: RouterMetrics,
        rules: Rules,
        connect_seconds: float,
        seconds: float,
    ) -> None:
        self.asked, self.pick, self.first_choice, self.names = asked, pick, first_choice, names
        self.client, self.metrics, self.rules = client, metrics, rules
        self.connect_seconds, self.seconds = connect_seconds, seconds
        self.answered_by = NOBODY
        self._begun = self._stream = False  # whether anything was sent to the client, and events
        self._ended = self._late = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until the answer's end, the client leaves, or the time is up."""
        status: int | str = CLOSED

        async def watched(message: Message) -> None:
            self._ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        answer, gone = asyncio.create_task(self._answer(scope, receive, watched)), asyncio.create_task(left(receive))
        try:
            done, _ = await asyncio.wait((answer, gone), timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if answer in done or (done and self._ended):  # an answer's end looks like a client that leaves
                status = await answer
            elif not done:
                status, self._late = 504, True
                answer.cancel()
                await asyncio.wait((answer,))
                message = error(f"no whole answer within {self.seconds:g} s", "timeout_error", "timeout")
                with contextlib.suppress(TimeoutError):  # a client that does not read
                    async with asyncio.timeout(GRACE):
                        await self._fail(scope, receive, send, message, 504)
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
            self.metrics.requests.labels(self.answered_by, status).inc()
            self.metrics.duration.labels(self.answered_by).observe(time.monotonic() - self.asked.arrived)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int | str:
        tried: set[Backend] = set()
        # A connection that was closed as we wrote says little of its server: asked again, once. None: that was done.
        reset: set[Backend] | None = set()
        refusal: Response | None = None
        while True:
            chosen = self.pick(self.asked, tried)
            if chosen is None and reset:
                tried, reset = tried - reset, None
                chosen = self.pick(self.asked, tried)
            if chosen is None:
                return await self._nobody(refusal, scope, receive, send)
            version, backend = chosen
            backend.open += 1
            backend.circuit.take()
            begun: Begun | None = None
            try:
                begun = await self._unless_silent(self._begin(version, backend), backend, tried)
                self.answered_by = version.name
                return await self._pass_on(begun, version, backend, scope, receive, send)
            except Again as again:
                self.metrics.retries.labels(version.name, again.reason).inc()
                tried.add(backend)
                if again.reason == "reset" and reset is not None:
                    reset.add(backend)
                refusal = again.response or refusal
            except asyncio.CancelledError:
                if self._late and begun is None:
                    backend.circuit.failed(time.monotonic(), self.rules)
                raise
            finally:
                backend.open -= 1
                backend.circuit.left()
                if begun is not None:
                    await begun.response.aclose()

    async def _begin(self, version: Version, backend: Backend) -> Begun:
        """Ask a server, and read the first bytes of events, or all of another answer. Raises Again."""
        request = self.asked.to(backend.url, version, self.names)
        request.extensions = timeouts(self.connect_seconds)
        response: httpx.Response | None = None
        try:
            response = await self.client.send(request, stream=True)
            begun = await self._head(response)
            if begun.status in AGAIN and begun.rest is None:
                refusal = Response(begun.first, begun.status)
                refusal.raw_headers = begun.headers
                raise Again(str(begun.status), refusal)
            return begun
        except BaseException as problem:
            if response is not None:
                await response.aclose()
            if isinstance(problem, (httpx.ConnectError, httpx.ConnectTimeout)):
                backend.ready = False  # until the next probe says otherwise
                raise Again("connect") from None
            if isinstance(problem, (httpx.TransportError, Again)):
                backend.circuit.failed(time.monotonic(), self.rules)
            if isinstance(problem, httpx.TransportError):
                raise Again("reset") from None
            raise

    async def _head(self, response: httpx.Response) -> Begun:
        headers = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in FROM_SERVER]
        stream = response.is_success and response.headers.get("content-type", "").startswith("text/event-stream")
        chunks, first = response.aiter_raw(), bytearray()
        async for chunk in chunks:
            first += chunk
            if chunk and (stream or len(first) > HELD):
                return Begun(response.status_code, headers, stream, bytes(first), chunks, response)
        return Begun(response.status_code, headers, stream, bytes(first), None, response)

    async def _unless_silent(self, work: Coroutine[Any, Any, Begun], backend: Backend, tried: set[Backend]) -> Begun:
        """What `work` returns. If probes find the server silent first, and another one can be asked: Again."""
        task, silent = asyncio.create_task(work), asyncio.create_task(backend.silent.wait())
        try:
            await asyncio.wait((task, silent), return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and self.pick(self.asked, tried | {backend}) is not None:
                raise Again("silent")
            return await task
        except BaseException:
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled() and task.exception() is None:
                await task.result().response.aclose()
            raise
        finally:
            silent.cancel()

    async def _pass_on(
        self, begun: Begun, version: Version, backend: Backend, scope: Scope, receive: Receive, send: Send
    ) -> int | str:
        """Give the answer to the client as it comes. The status for the metrics."""
        if begun.status >= 500:
            backend.circuit.failed(time.monotonic(), self.rules)
        else:
            backend.circuit.succeeded()
        if version.name != self.first_choice:
            self.metrics.fallbacks.labels(self.first_choice, version.name).inc()
        self.metrics.first_byte.labels(version.name).observe(time.monotonic() - self.asked.arrived)
        self._begun, self._stream = True, begun.stream
        headers = [*begun.headers, (HEADER.encode(), version.name.encode())]
        await send({"type": "http.response.start", "status": begun.status, "headers": headers})
        await send({"type": "http.response.body", "body": begun.first, "more_body": begun.rest is not None})
        if begun.rest is None:
            return begun.status
        try:
            async for chunk in begun.rest:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.TransportError:
            backend.circuit.failed(time.monotonic(), self.rules)
            message = error(f"the server of {version.name} ended within the answer", "server_error", "cut")
            await self._fail(scope, receive, send, message, 502)
            return CUT
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return begun.status

    async def _nobody(self, refusal: Response | None, scope: Scope, receive: Receive, send: Send) -> int:
        if refusal is None:
            wait = {"Retry-After": str(max(1, round(self.rules.every)))}
            refusal = JSONResponse(error("no server can answer now", "overloaded_error", "unavailable"), 503, wait)
        await refusal(scope, receive, send)
        return refusal.status_code

    async def _fail(self, scope: Scope, receive: Receive, send: Send, body: dict[str, Any], status: int) -> None:
        """Say that the answer fails: with a status if nothing was sent, as an event within a stream, else by closing."""
        if not self._begun:
            await JSONResponse(body, status)(scope, receive, send)
        elif self._stream and not self._ended:  # else the application ends without the answer's end, and the connection is closed
            event = b"\n\ndata: " + json.dumps(body).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})


async def left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
