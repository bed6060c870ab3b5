"""How the server and the router listen: the socket, slow clients and too many, the end. Nothing else sets up uvicorn."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.limits import Limits
from nemo_ext.errors import UserError

LINGER = 5.0  # seconds that a closed connection gets to take the rest of its answer
RESERVE = 128  # connections beyond the limit that are still answered: /health, or a 503
FILES = 256  # open files of a process besides its clients' connections
POLL = 0.05  # seconds


class Served(Protocol):
    """What runs behind the application."""

    limits: Limits
    draining: bool
    open: int  # requests that have not been answered whole


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the port is taken or the address is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"host={host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"host={host} port={port}: {error.strerror}: another port=, or stop what listens there") from None
    return listener


def allow_files(connections: int) -> None:
    """Raise the process's own limit of open files as far as `connections` need. Raises UserError where it may not be."""
    needed = connections + RESERVE + FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(f"connections={connections} needs {needed} open files, and `ulimit -Hn` is {hard}: fewer, or raise it")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Server(uvicorn.Server):
    """uvicorn, whose first SIGTERM or SIGINT lets running requests end (at most `drain_seconds`), and whose second stops it."""

    def __init__(self, app, served: Served, lifespan: str = "off") -> None:
        """`lifespan`: on, if the application has one."""

        def connection(**given: Any) -> Connection:
            return Connection(served.limits, **given)

        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                ws="none",
                log_level="error",  # not what clients do wrong
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan=lifespan,
                timeout_graceful_shutdown=1,
            )
        )
        self._served = served
        self._drain: asyncio.Task | None = None

    def handle_exit(self, sig: int, frame: object) -> None:
        """Begin to drain, or stop at once if that has begun."""
        if self._served.draining:
            self.should_exit = self.force_exit = True
        self._served.draining = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's loop: whether to stop."""
        if self._served.draining and self._drain is None:
            self._drain = asyncio.create_task(self._wait())
        return await super().on_tick(counter)

    async def _wait(self) -> None:
        end = time.monotonic() + self._served.limits.drain_seconds
        while self._served.open and time.monotonic() < end:
            await asyncio.sleep(POLL)
        self.should_exit = True


class Connection(H11Protocol):
    """A client's connection, closed when a request's head takes longer than `body_seconds`, or when its answer is not read.

    Requests see how many connections there are in their scope's state; those far beyond the limit are closed unread.
    """

    def __init__(self, limits: Limits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._late: asyncio.TimerHandle | None = None
        self.app_state = {**self.app_state, "connections": self.connections}

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client is there; it has yet to say what it wants."""
        super().connection_made(Patient(transport, self.loop))
        if len(self.connections) > self._limits.connections + RESERVE:
            transport.abort()
        else:
            self._expect()

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        super().data_received(data)
        if self._late is None and self._idle():
            self._expect()
        elif self._late is not None and not self._idle():
            self._stop_waiting()

    def connection_lost(self, problem: Exception | None) -> None:
        """The client is gone."""
        self._stop_waiting()
        super().connection_lost(problem)
        self.transport.lost()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect(self) -> None:
        self._late = self.loop.call_later(self._limits.body_seconds, self._too_late)

    def _too_late(self) -> None:
        self._late = None
        if self._idle():
            self.transport.abort()

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Patient:
    """A transport whose `close` does not wait for ever until the client has read everything."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._end: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Close when all is sent, at the latest after LINGER."""
        if self._end is None:
            self._end = self._loop.call_later(LINGER, self._transport.abort)
        self._transport.close()

    def lost(self) -> None:
        """The connection has ended."""
        if self._end is not None:
            self._end.cancel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
