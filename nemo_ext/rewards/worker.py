"""A process that scores answers, kept in hand by another that imports everything once and forks it anew when it hangs.

`main` is the keeper: it reads requests on standard input and answers on standard output. It never touches an answer itself, so
nothing that an answer does can hold it up. Messages: 8 bytes of length and 8 of seconds (little-endian integer and double),
then the body; requests are pickled by the parent, replies are JSON, so that a scoring process cannot hand objects to its parent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import pickle
import resource
import select
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nemo_ext.rewards import jail

HEAD = struct.Struct("<Qd")
LOADING = 120.0  # seconds that a scoring process may take to get ready, imports of a user's file included
LOOK = 2.0  # seconds between looks at whether the parent lives


@dataclass(frozen=True)
class Job:
    """What a worker does: `make`, as module:function, called with `arguments` in the scoring process, gives the function that
    takes (answers, rows) and gives values: numbers, or texts where `text` says so. `preload`, modules or functions as
    module:function, is imported and called once by the keeper. `means` are those of jail.confine; None: not confined."""

    make: str
    arguments: tuple[Any, ...] = ()
    preload: tuple[str, ...] = ()
    means: tuple[str, ...] | None = None
    readable: tuple[str, ...] = ()
    memory: int = 2 << 30  # bytes above what an idle process has, where it is confined
    settings: dict[str, str] = field(default_factory=dict)  # environment
    text: bool = False


def main() -> None:
    """Serve the parent until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what a reward prints is no reply
    _, body = receive(requests, math.inf)
    job: Job = pickle.loads(body)
    for each in job.preload:
        module, _, name = each.partition(":")
        loaded = importlib.import_module(module)
        if name:
            getattr(loaded, name)()
    child = _Child(job)
    send(replies, json.dumps(child.ready()).encode())
    while True:
        while not select.select([requests], [], [], LOOK)[0]:
            if os.getppid() != parent:
                child.kill()
                return
        try:
            limit, body = receive(requests, math.inf)
        except EOFError:
            child.kill()
            return
        answer = child.ask(body, limit, lambda: os.getppid() == parent)
        if child.process is None:
            child = _Child(job)
        try:
            send(replies, answer)
        except BrokenPipeError:
            child.kill()
            return


class _Child:
    """The process that scores."""

    def __init__(self, job: Job) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        self._ready: dict[str, Any] | None = None
        self.process: int | None = os.fork()
        if self.process == 0:
            code = 1
            with contextlib.suppress(BaseException):
                os.close(self._write)
                os.close(self._read)
                _serve(job, read, write)
                code = 0
            os._exit(code)
        os.close(read)
        os.close(write)

    def ready(self) -> dict[str, Any]:
        """What the process says when it is ready: {} or {"error"}."""
        if self._ready is None:
            try:
                self._ready = json.loads(receive(self._read, time.monotonic() + LOADING)[1])
            except TimeoutError:
                self._ready = {"error": f"was not ready after {LOADING:g} seconds"}
            except EOFError:
                self._ready = {"error": self._end()}
        return self._ready

    def ask(self, body: bytes, limit: float, wanted: Callable[[], bool]) -> bytes:
        """The reply to a request; an error where there is none within `limit` seconds. `process` is None after one."""
        failed = self.ready()
        if "error" not in failed:
            try:
                send(self._write, body, 0.0)
                return receive(self._read, time.monotonic() + limit, wanted)[1]
            except TimeoutError:
                failed = {"error": f"no result after {limit:g} seconds", "killed": True}
            except (EOFError, BrokenPipeError):
                failed = {"error": self._end(), "killed": True}
        self.kill()
        return json.dumps(failed).encode()

    def kill(self) -> None:
        """End the process and what it started."""
        if self.process is not None:
            for end in (lambda: os.killpg(self.process, signal.SIGKILL), lambda: os.kill(self.process, signal.SIGKILL)):
                with contextlib.suppress(ProcessLookupError):
                    end()
            self._end()

    def _end(self) -> str:
        if self.process is None:
            return "the process ended"
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        self.process = None
        os.close(self._read)
        os.close(self._write)
        return f"the process was killed by signal {-status}" if status < 0 else f"the process ended with status {status}"


def _serve(job: Job, requests: int, replies: int) -> None:
    """The scoring process."""
    os.setpgid(0, 0)
    jail.end_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        module, name = job.make.split(":")
        score = getattr(importlib.import_module(module), name)(*job.arguments)
        if job.means is not None:
            jail.confine(job.means, job.readable, job.memory, output=0)
    except BaseException as error:
        send(replies, json.dumps({"error": described(error)}).encode())
        return
    send(replies, b"{}")
    while True:
        try:
            _, body = receive(requests, math.inf)
        except EOFError:
            return
        try:
            answers, rows = pickle.loads(body)
            reply = {"values": [str(value) if job.text else float(value) for value in score(answers, rows)]}
        except BaseException as error:  # MemoryError, RecursionError, SystemExit: all of them are the answer's doing
            reply = {"error": described(error)}
        send(replies, json.dumps(reply).encode())


def described(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def send(descriptor: int, body: bytes, seconds: float = 0.0) -> None:
    """Write a message."""
    left = memoryview(HEAD.pack(len(body), seconds) + body)
    while left:
        left = left[os.write(descriptor, left) :]


def receive(descriptor: int, deadline: float, wanted: Callable[[], bool] = lambda: True) -> tuple[float, bytes]:
    """Read a message: its seconds and body. Raises EOFError at the end, TimeoutError at `deadline` or when not `wanted`."""
    length, seconds = HEAD.unpack(_exactly(descriptor, HEAD.size, deadline, wanted))
    return seconds, _exactly(descriptor, length, deadline, wanted)


def _exactly(descriptor: int, size: int, deadline: float, wanted: Callable[[], bool]) -> bytes:
    parts = []
    while size:
        left = deadline - time.monotonic()
        if left <= 0 or not wanted():
            raise TimeoutError
        if not select.select([descriptor], [], [], min(left, LOOK))[0]:
            continue
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
