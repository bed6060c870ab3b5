"""Servers that speak OpenAI's API without a model, and do what a test tells them; as threads, or as a process that can be killed:
`python fake_servers.py NAME PORT`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

ROOT = Path(__file__).resolve().parents[2]
MODES = ("ok", "429", "503", "500", "hang", "reset", "headers")  # headers: a stream's head, then nothing


class Fake:
    """The application: answers "NAME:content", in `tokens` events `gap` seconds apart."""

    def __init__(self, name: str) -> None:
        self.name, self.mode, self.ready, self.tokens, self.gap = name, "ok", True, 3, 0.0
        self.seen: list[dict] = []  # bodies
        self.headers: list[dict] = []
        self.running = self.cancelled = 0
        routes = [Route("/v1/{rest:path}", self.generate, methods=["POST"]), Route("/ready", self.is_ready)]
        self._routes = Starlette(routes=routes)

    async def __call__(self, scope, receive, send) -> None:
        """The ASGI application."""
        if self.mode == "reset" and scope["path"] != "/ready":
            self.seen.append({})
            send.__self__.transport.abort()
        else:
            await self._routes(scope, receive, send)

    async def is_ready(self, http: Request) -> Response:
        while self.ready is None:  # silent
            await asyncio.sleep(0.02)
        return JSONResponse({}, 200 if self.ready else 503)

    async def generate(self, http: Request) -> Response:
        body = await http.json()
        self.seen.append(body)
        self.headers.append(dict(http.headers) | {"path": http.url.path, "query": http.url.query})
        if self.mode in ("429", "503", "500"):
            return JSONResponse({"error": {"message": self.mode}}, int(self.mode), {"Retry-After": "7"})
        if body.get("stream"):
            return StreamingResponse(self.events(body), media_type="text/event-stream")
        self.running += 1
        try:
            while self.mode == "hang":
                await asyncio.sleep(0.02)
                if await http.is_disconnected():
                    self.cancelled += 1
                    break
            await asyncio.sleep(self.gap)
        finally:
            self.running -= 1
        return JSONResponse({"model": body.get("model"), "text": f"{self.name}:{body.get('prompt')}"})

    async def events(self, body: dict):
        self.running += 1
        ended = False
        try:
            while self.mode == "headers":
                await asyncio.sleep(0.02)
            for number in range(self.tokens):
                yield f"data: {json.dumps({'name': self.name, 'prompt': body.get('prompt'), 'number': number})}\n\n"
                await asyncio.sleep(self.gap)
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            self.running -= 1
            self.cancelled += not ended


class InThread:
    """An application served by a thread of this process."""

    def __init__(self, app, server=None, **config) -> None:
        """`server`: makes the uvicorn server of the application; None: a plain one with this `config`."""
        from deploy.listening import bind

        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        more = dict(log_level="critical", access_log=False, timeout_graceful_shutdown=1, lifespan="off") | config
        self.server = server(app) if server else uvicorn.Server(uvicorn.Config(app, **more))
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        wait_until(lambda: self.server.started)

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(10)
        self._socket.close()


class Process:
    """A command with its log, killed at the end."""

    def __init__(self, log: Path, *command: str) -> None:
        self.log = log
        with open(log, "w") as out:
            self.child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)

    def address(self, seconds: float = 60.0) -> str:
        """The address that it printed."""
        wait_until(lambda: "http://" in self.log.read_text() or self.child.poll() is not None, seconds)
        text = self.log.read_text()
        assert "http://" in text, text
        return text[text.rindex("http://") :].split()[0]

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.01)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    fake = Fake(sys.argv[1])
    fake.tokens, fake.gap = 20, 0.01
    print(f"http://127.0.0.1:{sys.argv[2]}", flush=True)
    uvicorn.run(fake, port=int(sys.argv[2]), log_level="critical", access_log=False, lifespan="off")
