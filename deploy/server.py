"""The HTTP server: OpenAI's endpoints, /health, /ready and /metrics over an engine. Knows no torch."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from deploy.answering import Asked, Failure, Running, chunks, whole
from deploy.engine.request import Busy, Refused
from deploy.limits import Gate, Keys, Limits
from deploy.listening import LINGER, Server
from deploy.metrics import Metrics
from deploy.openai_api import COMPLETION_TOKENS, Answer, ChatRequest, CompletionRequest, Generation, error

log = logging.getLogger("llm_builder.server")
CLOSED = 499  # the client left: nginx's status, for the metrics only


class Service:
    """One engine under one name, its limits, and whether it still takes requests."""

    def __init__(self, engine, name: str, limits: Limits) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics = Metrics(engine)
        self.started = int(time.time())
        self.draining = False
        self.open = 0  # requests that have not been answered whole

    def models(self) -> list[str]:
        """The names that `model` may be."""
        return [self.name, *self.engine.adapters]

    def ask(self, body: Generation) -> Asked:
        """Read a body: tokenise its prompts and make the engine's requests. Raises Refused."""
        if body.model not in self.models():
            raise Refused(f"there is no model {body.model}: {', '.join(self.models())}", "model_not_found")
        if body.max_tokens is not None and body.max_tokens > self.limits.max_tokens:
            raise Refused(f"max_tokens={body.max_tokens:,} is above the server's {self.limits.max_tokens:,}")
        if body.stream_options is not None and not body.stream:
            raise Refused("stream_options goes with stream=true")
        adapter = None if body.model == self.name else body.model
        chat = isinstance(body, ChatRequest)
        requests, tools = self._chat(body, adapter) if chat else (self._completion(body, adapter), ())
        for request in requests:
            self.engine.check(request)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return Asked(requests, Answer(chat, body.model), body.stream, usage, tools)

    def _chat(self, body: ChatRequest, adapter: str | None) -> tuple[list, tuple[str, ...]]:
        if body.max_completion_tokens is not None and body.max_completion_tokens > self.limits.max_tokens:
            raise Refused(
                f"max_completion_tokens={body.max_completion_tokens:,} is above the server's {self.limits.max_tokens:,}"
            )
        tools = body.called_tools
        prompts, media = self.engine.prompts, ()
        if sources := [source for message in body.messages for source in message.media]:
            messages = [message.for_template(parts=True) for message in body.messages]
            prompt, media = prompts.chat_with_media(messages, sources, tools)
        else:
            prompt = prompts.chat([message.for_template(parts=prompts.parts_only) for message in body.messages], tools)
        request = body.request(
            prompt,
            self._room(prompt),
            adapter,
            self.limits.request_seconds,
            max_tokens=body.max_completion_tokens,
            schema=body.schema_text,
            logprobs=body.wanted_logprobs,
            media=media,
            **self._words(body),
        )
        return [request], tuple(tool["function"]["name"] for tool in tools)

    def _completion(self, body: CompletionRequest, adapter: str | None) -> list:
        prompts, most = body.prompts(), self.engine.max_waiting
        if len(prompts) > most:
            raise Refused(f"{len(prompts):,} prompts in one request are more than the queue's {most}")
        ids = [self.engine.prompts.text(each) if isinstance(each, str) else self.engine.prompts.ids(each) for each in prompts]
        more = dict(timeout=self.limits.request_seconds, logprobs=body.logprobs, **self._words(body))
        return [body.request(p, min(COMPLETION_TOKENS, self._room(p)), adapter, **more) for p in ids]

    def _words(self, body: Generation) -> dict[str, tuple]:
        """Words that must not appear, in all spellings, and those that must, in one of them."""
        spell = self.engine.prompts.word
        bad = tuple(spelling for word in body.bad_words for spelling in spell(word))
        return {"bad_words": bad, "force_words": tuple(spell(word) for word in body.force_words)}

    def _room(self, prompt: tuple[int, ...]) -> int:
        return min(self.limits.max_tokens, self.engine.context - len(prompt))

    def ended(self, endpoint: str, status: int) -> None:
        """A request of those `open` has been answered."""
        self.open -= 1
        self.metrics.requests.labels(endpoint, status).inc()


class EventStream(Response):
    """Server-sent events of a running request, until they end, the client leaves, or its time is up."""

    def __init__(self, service: Service, asked: Asked, running: Running, endpoint: str) -> None:
        self.service, self.asked, self.running, self.endpoint = service, asked, running, endpoint
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. The first one decides the status: a failure before it is an error's response."""
        status, service = CLOSED, self.service
        tasks = [asyncio.create_task(self._write(scope, receive, send)), asyncio.create_task(_gone(receive))]
        try:
            limit = service.limits.request_seconds + LINGER  # that a slow reader may take for the rest
            done, _ = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] in done:
                status = tasks[0].result()
        finally:
            self.running.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            service.ended(self.endpoint, status)

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> int:
        events = chunks(self.asked, self.running)
        try:
            first = await anext(events)
        except Failure as failure:
            await JSONResponse(failure.body, failure.status)(scope, receive, send)
            return failure.status
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._event(send, first)
        async for event in events:
            await self._event(send, event)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        return 200

    @staticmethod
    async def _event(send: Send, event: dict[str, Any]) -> None:
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


def create_app(service: Service, keys: Keys | None = None) -> FastAPI:
    """The application. `keys`: who may use /v1/; None: everybody."""
    app = FastAPI(title="LLM Builder", openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, limits=service.limits, keys=keys)

    async def answer(http: HttpRequest, body: Generation, endpoint: str) -> Response:
        arrived = time.monotonic()
        service.open += 1
        status: int | None = 500
        try:
            if service.draining:
                raise Busy(int(service.limits.drain_seconds))
            asked = await asyncio.to_thread(service.ask, body)
            running = Running(service.engine, asked, service.metrics, arrived)
            await running.submit()
            if asked.stream:
                status = None  # the stream says when it has ended
                return EventStream(service, asked, running, endpoint)
            content = await _unless_gone(http, whole(asked, running), running)
            status = CLOSED if content is None else 200
            return Response(status_code=CLOSED) if content is None else JSONResponse(content)
        except Refused as refusal:
            status = 404 if refusal.code == "model_not_found" else 400
            return JSONResponse(error(str(refusal), code=refusal.code), status)
        except Busy as busy:
            status, headers = (503 if service.draining else 429), {"Retry-After": str(busy.retry_after)}
            text = "the server is stopping" if service.draining else str(busy)
            return JSONResponse(error(text, "overloaded_error", "busy"), status, headers)
        except Failure as failure:
            status = failure.status
            return JSONResponse(failure.body, status)
        finally:
            if status is not None:
                service.ended(endpoint, status)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        return await answer(http, body, "chat")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        return await answer(http, body, "completions")

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model(name, service) for name in service.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in service.models():
            return JSONResponse(error(f"there is no model {name}", code="model_not_found"), 404)
        return JSONResponse(_model(name, service))

    @app.get("/health")
    async def health() -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        takes = service.engine.alive and not service.draining
        return JSONResponse({"status": "ready" if takes else "not ready"}, 200 if takes else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        malformed = first["type"] == "json_invalid"
        text = "the body is not JSON" if malformed else f"{place or 'body'}: {first['msg']}"
        endpoint = "chat" if "chat" in http.url.path else "completions"
        service.metrics.requests.labels(endpoint, 400).inc()
        return JSONResponse(error(text, param=None if malformed else place or None), 400)

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, problem: HTTPException) -> Response:
        return JSONResponse(error(str(problem.detail)), problem.status_code, problem.headers)

    @app.exception_handler(Exception)
    async def failed(http: HttpRequest, problem: Exception) -> Response:
        return JSONResponse(error("the server failed", "server_error"), 500)

    return app


def run(service: Service, keys: Keys | None, sockets: list) -> None:
    """Serve on bound sockets until a signal."""
    Server(create_app(service, keys), service).run(sockets=sockets)


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(http: HttpRequest, work, running: Running) -> Any:
    """What `work` returns, or None if the client left first; its requests are cancelled then."""
    tasks = [asyncio.create_task(work), asyncio.create_task(_gone(http.receive))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0] in done else None
    finally:
        running.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _model(name: str, service: Service) -> dict[str, Any]:
    parent = {} if name == service.name else {"parent": service.name}
    return {"id": name, "object": "model", "created": service.started, "owned_by": "llm-builder", **parent}
