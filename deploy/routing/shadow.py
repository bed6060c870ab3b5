"""Copies of requests for versions that answer nobody: bounded, discarded, never waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import httpx

from deploy.routing.forward import Asked, timeouts
from deploy.routing.metrics import RouterMetrics
from deploy.routing.table import Version

DROPPED, LATE, FAILED = "dropped", "late", "failed"


class Shadows:
    """Sends copies with connections of its own, so that a shadow that hangs takes nothing from clients."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._client = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=8))
        self._running: dict[str, set[asyncio.Task]] = {}

    def send(self, asked: Asked, version: Version, url: str | None, names: Mapping[str, Any], most: int, seconds: float) -> None:
        """Start a copy to `url`, and return. Without a server that can be asked, or if `most` run already, there is none. It gets
        `seconds`."""
        running = self._running.setdefault(version.name, set())
        if url is None or len(running) >= most:
            self._metrics.shadows.labels(version.name, FAILED if url is None else DROPPED).inc()
            return
        task = asyncio.create_task(self._copy(asked, version, url, names, seconds))
        running.add(task)
        task.add_done_callback(running.discard)

    async def close(self) -> None:
        """End what runs."""
        tasks = [task for running in self._running.values() for task in running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _copy(self, asked: Asked, version: Version, url: str, names: Mapping[str, Any], seconds: float) -> None:
        began, status = time.monotonic(), FAILED
        try:
            request = asked.to(url, version, names)
            request.extensions = timeouts(seconds)
            async with asyncio.timeout(seconds):
                response = await self._client.send(request, stream=True)
                try:
                    async for _ in response.aiter_raw():
                        pass
                    status = str(response.status_code)
                    self._metrics.shadow_seconds.labels(version.name).observe(time.monotonic() - began)
                finally:
                    await response.aclose()
        except TimeoutError:
            status = LATE
        except httpx.HTTPError:
            pass
        finally:
            self._metrics.shadows.labels(version.name, status).inc()
