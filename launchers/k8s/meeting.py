"""How the pods of a run find each other, start by start, through the run's folder in a shared volume.

Every pod that starts leaves a token of its own. Pod 0 prepares, waits for a token of each other pod that no earlier start had,
and writes down who takes part and where it listens; a pod takes part once its token is in the list. So pods that were replaced
never join workers of an earlier start, and whoever sees a member's token change knows that this start is over.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext import run_folder

START = "start.json"  # the start that goes on, or is being prepared
POLL_SECONDS = 2.0
PORTS = range(29500, 29600)  # one a start, in turn


@dataclass(frozen=True)
class Start:
    """A start of the run: its number, and the address and port of rank 0's store."""

    number: int
    address: str
    port: int


class Meeting:
    """One pod's part in the meetings of a submission, whose folder is `folder`."""

    def __init__(self, folder: Path, index: int, nodes: int):
        self.folder, self.index, self.nodes = folder, index, nodes
        self.token = uuid.uuid4().hex
        self.start: Start | None = None

    def open(self) -> None:
        """Pod 0: end the start before this one, for whoever still takes part in it."""
        before = self._record()
        opened = {"number": before.get("number", 0) + 1, "used": sorted({*before.get("used", []), *before.get("members", [])})}
        self._write(START, {**before, **opened, "members": None})

    def gather(self, address: str, pause: Callable[[], None] | None = None) -> Start:
        """Pod 0: wait for the other pods, then say that all start."""
        pause = pause or _pause
        record = self._record()
        while True:
            tokens = [self.token, *(self._token(index) for index in range(1, self.nodes))]
            if all(token and token not in record["used"] for token in tokens):
                break
            pause()
        port = PORTS[record["number"] % len(PORTS)]
        self._write(START, {**record, "members": tokens, "address": address, "port": port})
        self.start = Start(record["number"], address, port)
        return self.start

    def join(self, over: Callable[[], bool], pause: Callable[[], None] | None = None) -> Start | None:
        """Another pod: say that it is there, and wait until a start takes it. None when `over()`: there is nothing left to do."""
        pause = pause or _pause
        self._write(f"pod-{self.index}.json", {"token": self.token})
        while True:
            record = self._record()
            if self.token in (record.get("members") or []):
                self.start = Start(record["number"], record["address"], record["port"])
                return self.start
            if over():
                return None
            pause()

    def broken(self) -> bool:
        """Whether the start that this pod takes part in is over: pod 0 has begun another, or a member was replaced."""
        record = self._record()
        members = record.get("members")
        if not record:
            return False  # not readable at this moment
        if record["number"] != self.start.number or not members:
            return True
        return any(self._token(index) not in (None, members[index]) for index in range(1, self.nodes))

    def failed(self, progress: int, retries: int) -> bool:
        """Pod 0: note that the start failed with its newest checkpoint at step `progress`. Whether that was once too often:
        more than `retries` failures with no new checkpoint between them."""
        record = self._record()
        failures = record.get("failures", 0) + 1 if record.get("progress") == progress else 1
        self._write(START, {**record, "failures": failures, "progress": progress})
        return failures > retries

    def _record(self) -> dict[str, Any]:
        return run_folder.read_json(self.folder / START) or {}

    def _token(self, index: int) -> str | None:
        return (run_folder.read_json(self.folder / f"pod-{index}.json") or {}).get("token")

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(self.folder / name, content)


def _pause() -> None:
    time.sleep(POLL_SECONDS)
