"""Clients that measure a server as users feel it. Knows the OpenAI API and no engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from nemo_ext.errors import RunError, UserError

Progress = Callable[[int], None]
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Load:
    """What each client asks for."""

    model: str
    prompts: Sequence[str]  # taken in turn
    max_tokens: int
    requests: int  # of all clients together
    chat: bool = True
    ignore_eos: bool = False  # answers of the full length, where the server knows the key
    key: str | None = None
    timeout: float = 600.0  # seconds, for one answer

    def body(self, number: int) -> dict:
        """The JSON of request `number`."""
        prompt = self.prompts[number % len(self.prompts)]
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        more = {"ignore_eos": True} if self.ignore_eos else {}
        return {"model": self.model, "max_tokens": self.max_tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}, **asked, **more}  # fmt: skip

    @property
    def path(self) -> str:
        """The endpoint."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def headers(self) -> dict[str, str]:
        """With the key, if there is one."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass
class Timing:
    """One answer: seconds to its first token, between its events and to its end; tokens as the server counts them."""

    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    whole: float = 0.0
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Level:
    """All answers at one number of clients, and the seconds that they took together."""

    clients: int
    seconds: float
    timings: list[Timing]

    def summary(self) -> dict:
        """Figures: seconds by percentile (over answers; between tokens over all events), tokens and requests a second."""
        good = [timing for timing in self.timings if not timing.error]
        gaps = [gap for timing in good for gap in timing.gaps]
        return {
            "clients": self.clients,
            "requests": len(self.timings),
            "failed": len(self.timings) - len(good),
            "error": next((timing.error for timing in self.timings if timing.error), ""),
            "seconds": self.seconds,
            "tokens_per_second": sum(timing.tokens for timing in good) / self.seconds,
            "requests_per_second": len(good) / self.seconds,
            "time_to_first_token": percentiles([timing.first for timing in good]),
            "inter_token": percentiles(gaps),
            "request": percentiles([timing.whole for timing in good]),
        }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """{"p50": …}, linear between values; None where there are none."""
    import numpy as np

    return {f"p{p}": float(np.percentile(values, p)) if len(values) else None for p in PERCENTILES}


async def measure(url: str, load: Load, clients: int, progress: Progress | None = None) -> Level:
    """Let `clients` clients send `load.requests` requests, each its next one when the last is answered."""
    numbers, timings = iter(range(load.requests)), []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=load.timeout, limits=limits, headers=load.headers) as http:

        async def client() -> None:
            for number in numbers:
                timings.append(await _answer(http, load, number))
                if progress:
                    progress(len(timings))

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return Level(clients, time.perf_counter() - started, timings)


def find_model(url: str, key: str | None) -> str:
    """The first model that a server lists. Raises UserError where no server answers there as it should."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=10)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise UserError(f"{url}/v1/models answers {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"url={url}: no server answers: {str(error) or type(error).__name__}") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{url}/v1/models is not a list of models") from None


def run(url: str, load: Load, levels: Sequence[int], progress: Callable[[int, int], None] | None = None) -> list[dict]:
    """Measure one level after another; `progress(level number, requests done)`. Raises RunError if nothing at all is answered."""
    found = []
    for number, clients in enumerate(levels):
        step = (lambda done, number=number: progress(number, done)) if progress else None
        found.append(asyncio.run(measure(url, load, clients, step)).summary())
        if found[-1]["failed"] == found[-1]["requests"]:
            raise RunError(f"{url}: no request of {clients} clients was answered: {found[-1]['error']}")
    return found


async def _answer(http: httpx.AsyncClient, load: Load, number: int) -> Timing:
    timing, started, last = Timing(), time.perf_counter(), None
    try:
        async with http.stream("POST", load.path, json=load.body(number)) as response:
            if response.status_code != 200:
                timing.error = f"status {response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
                return timing
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now, event = time.perf_counter(), json.loads(line[6:])
                if "error" in event:
                    timing.error = str(event["error"].get("message", event["error"]))
                    return timing
                if event.get("usage"):
                    timing.tokens = event["usage"]["completion_tokens"]
                if not any(choice.get("text") or (choice.get("delta") or {}).get("content") for choice in event["choices"]):
                    continue
                if last is None:
                    timing.first = now - started
                else:
                    timing.gaps.append(now - last)
                last = now
    except (httpx.HTTPError, ValueError, KeyError) as error:
        timing.error = str(error) or type(error).__name__
    timing.whole = time.perf_counter() - started
    if last is None and not timing.error:
        timing.first = timing.whole
    return timing
