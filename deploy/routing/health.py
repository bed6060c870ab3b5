"""Whether a server can be asked: what its own /ready says, and how its last requests went."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx

MOST_COOLDOWNS = 16  # a circuit that stays open waits longer and longer, at most this many cooldowns
SILENT = 2  # probes without an answer until a server counts as silent


@dataclass(frozen=True)
class Rules:
    """How health is found."""

    every: float = 2.0  # seconds between two probes
    timeout: float = 2.0  # seconds for a probe's answer
    failures: int = 3  # failed requests in a row that open the circuit
    cooldown: float = 5.0  # seconds until an open circuit lets one request try


class Circuit:
    """Opens after failures in a row. After a while one request may try: it closes the circuit, or opens it for twice as long."""

    def __init__(self) -> None:
        self._failures = self._opened = 0
        self._until: float | None = None
        self._trying = False

    @property
    def closed(self) -> bool:
        """Whether requests pass freely."""
        return self._until is None

    def allows(self, now: float) -> bool:
        """Whether a request may pass at time `now` (s)."""
        return self._until is None or (now >= self._until and not self._trying)

    def take(self) -> None:
        """A request passes; `succeeded`, `failed` or `left` follows."""
        self._trying = self._until is not None

    def succeeded(self) -> None:
        """The server answered."""
        self._failures = self._opened = 0
        self._until, self._trying = None, False

    def failed(self, now: float, rules: Rules) -> None:
        """The server did not answer, or with an error of its own."""
        self._failures += 1
        if self._trying or (self._until is None and self._failures >= rules.failures):
            self._until = now + rules.cooldown * min(2**self._opened, MOST_COOLDOWNS)
            self._opened += 1
        self._trying = False

    def left(self) -> None:
        """The request ended before the server said anything."""
        self._trying = False


class Backend:
    """One server of a version. Its state outlives a reload of the table."""

    def __init__(self, version: str, url: str, ready_path: str) -> None:
        self.version, self.url, self.ready_path = version, url, ready_path
        self.circuit = Circuit()
        self.open = 0  # requests of clients that it works on
        self.ready = False
        self.silent = asyncio.Event()  # it takes connections, perhaps, and answers nothing
        self._misses = 0

    def usable(self, now: float) -> bool:
        """Whether a request may be sent at time `now` (s)."""
        return self.ready and self.circuit.allows(now)

    async def probe(self, client: httpx.AsyncClient, rules: Rules) -> None:
        """Ask it once. One missed answer of a server that is ready changes nothing: it may be busy."""
        try:
            async with asyncio.timeout(rules.timeout):
                status = (await client.get(self.url + self.ready_path)).status_code
        except TimeoutError:
            self._misses += 1
            if self._misses >= SILENT:
                self.ready = False
                self.silent.set()
            return
        except httpx.HTTPError:
            status = 0
        self._misses = 0
        self.silent.clear()
        self.ready = status == 200

    async def watch(self, client: httpx.AsyncClient, rules: Rules) -> None:
        """Probe it for ever."""
        while True:
            await asyncio.sleep(rules.every)
            await self.probe(client, rules)
