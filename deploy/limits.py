"""What a request must pass before it is read: how many there are, the API key, the body's size and the time it may take. Pure
ASGI; and the keys of the commands that listen."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.openai_api import error
from nemo_ext.command_line import key
from nemo_ext.errors import UserError

GUARDED = "/v1/"
MIB = 1 << 20
AT_START = ("host", "port", "api_keys", "max_body", "body_timeout", "timeout", "drain", "connections")  # ListeningKeys' names
LIMITS = AT_START[AT_START.index("max_body") :]


@dataclass
class ListeningKeys:
    """What the server's and the router's commands have in common."""

    host: str = key("127.0.0.1", "the address to listen on; 0.0.0.0 is all of them", group="network")
    port: int = key(8000, "the port; 0 takes a free one")
    api_keys: str | None = key(None, "a file with a key a line; clients send one as bearer", auto="everybody is let in")
    max_body: float = key(2.0, "size of a request", unit="MiB", group="limits")
    body_timeout: float = key(30.0, "for a client to send its request", unit="s")
    timeout: float = key(600.0, "for a request, from its arrival to its last token", unit="s")
    drain: float = key(60.0, "that running requests get after SIGTERM", unit="s")
    connections: int = key(1024, "open connections; requests of more are answered 503")

    def check_listening(self) -> None:
        """Raises UserError for values that nobody can listen with."""
        if self.connections < 1:
            raise UserError(f"connections={self.connections} must be 1 or more")
        for name in ("max_body", "body_timeout", "timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.drain < float("inf"):
            raise UserError(f"drain={self.drain} must be 0 or more")
        if not 0 <= self.port < 65536:
            raise UserError(f"port={self.port} must be 0 to 65535")

    def limits(self, **more: int) -> Limits:
        """The limits that they say, and `more`."""
        return Limits(
            body_bytes=int(self.max_body * MIB),
            body_seconds=self.body_timeout,
            request_seconds=self.timeout,
            drain_seconds=self.drain,
            connections=self.connections,
            **more,
        )

    def keys(self) -> Keys | None:
        """Who may use what is guarded; None: everybody. Raises UserError."""
        return Keys(read_keys(Path(self.api_keys))) if self.api_keys else None


@dataclass(frozen=True)
class Limits:
    """What a server allows."""

    body_bytes: int = 2 << 20
    body_seconds: float = 30.0  # for a client to send a request's head, and its body
    request_seconds: float = 600.0  # from a request's arrival to its last token
    max_tokens: int = 4096  # new tokens of an answer
    drain_seconds: float = 60.0  # that running requests get when the server is told to stop
    connections: int = 1024  # that may be open: requests of more are answered 503, but for what is not guarded


class Keys:
    """API keys, compared in a time that tells nothing about them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def accept(self, header: str) -> bool:
        """Whether an Authorization header holds one of the keys. All are compared, whatever the first ones say."""
        kind, _, given = header.partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found and kind.lower() == "bearer"


def read_keys(file: Path) -> list[str]:
    """The keys of a file, one a line; empty lines and those that begin with # are none. Raises UserError."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"api_keys={file} cannot be read: {getattr(problem, 'strerror', None) or 'not text'}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UserError(f"api_keys={file} holds no key: one a line")
    return keys


class Gate:
    """ASGI middleware that reads the body of each request to /v1/ whole, within the limits, before the application runs."""

    def __init__(self, app: ASGIApp, limits: Limits, keys: Keys | None) -> None:
        self.app, self.limits, self.keys = app, limits, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 408, 413 or 503, or let the application answer."""
        if scope["type"] != "http" or not scope["path"].startswith(GUARDED):
            await self.app(scope, receive, send)
            return
        if len(scope.get("state", {}).get("connections", ())) > self.limits.connections:  # see listening.Connection
            refusal = error(f"more than {self.limits.connections:,} connections", "overloaded_error", "busy")
            await JSONResponse(refusal, 503, {"Retry-After": "1", "Connection": "close"})(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.keys is not None and not self.keys.accept(headers.get("authorization", "")):
            refusal = error("a valid API key is needed: Authorization: Bearer KEY", "authentication_error", "invalid_api_key")
            await JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer", "Connection": "close"})(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.limits.body_bytes:
            await self._too_large(scope, receive, send)
            return
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    if len(body) > self.limits.body_bytes:
                        await self._too_large(scope, receive, send)
                        return
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            late = error(f"the body did not arrive within {self.limits.body_seconds:g} s", code="request_timeout")
            await JSONResponse(late, 408, {"Connection": "close"})(scope, receive, send)
            return
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = error(f"the body is larger than {self.limits.body_bytes:,} bytes", code="body_too_large")
        await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, send)
