"""The router: the table in force, its servers, and the HTTP application over them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import httpx
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deploy.limits import Gate, Keys, Limits
from deploy.openai_api import error
from deploy.routing.forward import Asked, Forward, NotJson, read
from deploy.routing.health import Backend, Rules
from deploy.routing.metrics import RouterMetrics
from deploy.routing.shadow import Shadows
from deploy.routing.table import Version, order, share

KEPT_SECONDS = 2.0  # that an idle connection is kept: less than servers keep theirs (uvicorn 5 s)
KEPT = 64  # idle connections


@dataclass(frozen=True)
class Table:
    """What a reload replaces."""

    name: str  # what clients call the model
    versions: tuple[Version, ...]
    rules: Rules = field(default_factory=Rules)
    user_header: str = "x-user-id"
    connect_seconds: float = 2.0
    shadow_most: int = 16  # copies that run at a time, of each shadow
    shadow_seconds: float = 60.0

    @property
    def named(self) -> dict[str, Version | None]:
        """The names that a request's model may be: a version's own, or the one that stands for all."""
        return {self.name: None, **{version.name: version for version in self.versions}}


class Router:
    """Versions behind one address. `install` before the first request, and within a running loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.draining = False
        self.open = 0  # requests that have not been answered whole
        self.started = int(time.time())
        self.table: Table | None = None
        self.metrics = RouterMetrics(lambda: self._backends.values())
        self._backends: dict[tuple[str, str, str], Backend] = {}
        self._watches: dict[Backend, asyncio.Task] = {}
        self._numbers = itertools.count()
        self._client = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=KEPT, keepalive_expiry=KEPT_SECONDS))  # fmt: skip
        self._prober = httpx.AsyncClient(trust_env=False, timeout=None, limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=0))  # fmt: skip
        self._shadows = Shadows(self.metrics)

    async def install(self, table: Table) -> None:
        """Put `table` in force. Servers that stay keep what is known of them; new ones are probed first. Requests that run are
        not touched."""
        wanted = [(version.name, url, version.ready) for version in table.versions for url in version.urls]
        backends = {place: self._backends.get(place) or Backend(*place) for place in wanted}
        new = [backend for backend in backends.values() if backend not in self._watches]
        await asyncio.gather(*(backend.probe(self._prober, table.rules) for backend in new))
        rules_changed = self.table is not None and self.table.rules != table.rules
        self.table, self._backends = table, backends
        for backend in list(self._watches):
            if rules_changed or backend not in backends.values():
                self._watches.pop(backend).cancel()
        for backend in backends.values():
            if backend not in self._watches:
                self._watches[backend] = asyncio.create_task(backend.watch(self._prober, table.rules))

    async def close(self) -> None:
        """End probes and copies, close connections."""
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        await self._shadows.close()
        await self._client.aclose()
        await self._prober.aclose()

    def servers(self, version: Version) -> list[Backend]:
        """The servers of a version of the table in force."""
        return [self._backends[version.name, url, version.ready] for url in version.urls]

    def usable(self) -> bool:
        """Whether a request for the name of all versions could be sent somewhere."""
        now = time.monotonic()
        return any(
            backend.usable(now) for version in self.table.versions if not version.shadow for backend in self.servers(version)
        )

    def turn(self, asked: Asked) -> list[Version]:
        """The versions that may answer, the first one first. A version's own name asks for it alone."""
        own = self.table.named.get(asked.model)
        return [own] if own else order(self.table.versions, asked.key)

    def pick(self, asked: Asked, tried: set[Backend]) -> tuple[Version, Backend] | None:
        """The next server to ask: of the first version that has one, the least busy."""
        now = time.monotonic()
        for version in self.turn(asked):
            if servers := [each for each in self.servers(version) if each not in tried and each.usable(now)]:
                return version, min(servers, key=lambda each: (each.open, share(asked.key, each.url)))
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to /v1/ on."""
        self.open += 1
        try:
            if self.draining:
                headers = {"Retry-After": str(max(1, int(self.limits.drain_seconds)))}
                refusal = JSONResponse(error("the router is stopping", "overloaded_error", "busy"), 503, headers)
                await refusal(scope, receive, send)
                return
            if {".", ".."} & set(scope["path"].split("/")):  # would leave /v1/ at the server
                await JSONResponse(error("there is no such path"), 404)(scope, receive, send)
                return
            raw = (await receive()).get("body", b"")  # Gate has it whole
            table = self.table
            try:
                asked = read(scope, raw, table.user_header, next(self._numbers))
            except NotJson as problem:
                await JSONResponse(error(str(problem)), 400)(scope, receive, send)
                return
            self._shadow(asked)
            await Forward(
                asked,
                self.pick,
                self.turn(asked)[0].name,
                table.named,
                self._client,
                self.metrics,
                table.rules,
                table.connect_seconds,
                self.limits.request_seconds,
            )(scope, receive, send)
        finally:
            self.open -= 1

    def _shadow(self, asked: Asked) -> None:
        """Copy the request to the shadows whose share it falls into. Requests for one version by its name are not copied."""
        table, now = self.table, time.monotonic()
        if table.named.get(asked.model) is not None:
            return
        for version in table.versions:
            if share(asked.key, f"shadow {version.name}") < version.shadow:
                ready = [backend for backend in self.servers(version) if backend.usable(now)]
                url = min(ready, key=lambda each: share(asked.key, each.url)).url if ready else None
                self._shadows.send(asked, version, url, table.named, table.shadow_most, table.shadow_seconds)


def create_app(router: Router, keys: Keys | None, background: Callable[[Router], AbstractAsyncContextManager[None]]) -> Starlette:
    """The application. `keys`: who may use /v1/; None: everybody, so that the servers decide. `background(router)`: the context
    in which it runs, which installs a table."""

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        try:
            async with background(router):
                yield
        finally:
            await router.close()

    async def models(http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": list(_models(router))})

    async def model(http: HttpRequest) -> Response:
        name = http.path_params["name"]
        found = next((each for each in _models(router) if each["id"] == name), None)
        refusal = error(f"there is no model {name}", code="model_not_found")
        return JSONResponse(refusal, 404) if found is None else JSONResponse(found)

    async def health(http: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(http: HttpRequest) -> Response:
        takes = router.usable() and not router.draining
        return JSONResponse({"status": "ready" if takes else "not ready"}, 200 if takes else 503)

    async def metrics(http: HttpRequest) -> Response:
        return PlainTextResponse(router.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def refused(http: HttpRequest, problem) -> Response:
        return JSONResponse(error(str(problem.detail)), problem.status_code, problem.headers)

    routes = [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/{rest:path}", router, methods=["POST"]),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, limits=router.limits, keys=keys)],
        exception_handlers={404: refused, 405: refused},
        lifespan=life,
    )


def _models(router: Router) -> Iterator[dict]:
    for name, version in router.table.named.items():
        parent = {"parent": router.table.name} if version else {}
        yield {"id": name, "object": "model", "created": router.started, "owned_by": "llm-builder", **parent}
