"""The router: what reaches the servers and comes back, and what happens when a server fails. As a process: test_route.py."""

import asyncio
import json
import socket
import threading
import time
from contextlib import asynccontextmanager

import httpx
import psutil
import pytest
from fake_servers import Fake, InThread, wait_until

from deploy import route
from deploy.limits import Keys, Limits
from deploy.listening import Server
from deploy.routing.router import Router, create_app

FAST = ("probe_every=0.05", "probe_timeout=1.0", "failures=2", "cooldown=0.3")


class Routed:
    """A router over fakes, in a thread."""

    def __init__(self, *arguments: str, keys: Keys | None = None, **limits) -> None:
        self.router = Router(Limits(**(dict(body_bytes=20_000, request_seconds=20) | limits)))
        self._loop: asyncio.AbstractEventLoop | None = None

        @asynccontextmanager
        async def background(router: Router):
            self._loop = asyncio.get_running_loop()
            await router.install(self.table(*arguments))
            yield

        app = create_app(self.router, keys, background)
        self.served = InThread(app, lambda app: Server(app, self.router, lifespan="on"))
        self.url = self.served.url
        self.client = httpx.Client(base_url=self.url, timeout=20)
        wait_until(self.router.usable)

    @staticmethod
    def table(*arguments: str):
        given = {argument.partition("=")[0] for argument in arguments}
        return route.load(["name=chat", *(each for each in FAST if each.partition("=")[0] not in given), *arguments])[1]

    def install(self, *arguments: str) -> None:
        asyncio.run_coroutine_threadsafe(self.router.install(self.table(*arguments)), self._loop).result(5)

    def ask(self, prompt="hi", model="chat", headers=None, **body) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": model, "prompt": prompt, **body}, headers=headers)

    def answered_by(self, **asked) -> str:
        response = self.ask(**asked)
        assert response.status_code == 200, response.text
        return response.headers["x-model-version"]

    def figure(self, line: str) -> float:
        """The value of a line of /metrics that begins with `line`."""
        text = self.client.get("/metrics").text
        return float(next((x.rsplit(" ", 1)[1] for x in text.splitlines() if x.startswith(f"llm_builder_router_{line}")), 0))

    def close(self) -> None:
        self.client.close()
        self.served.close()


@pytest.fixture
def fakes():
    """Three fakes, a, b and c, and their addresses."""
    fakes = [Fake(name) for name in "abc"]
    servers = [InThread(fake) for fake in fakes]
    yield fakes, [server.url for server in servers]
    for server in servers:
        server.close()


@pytest.fixture
def routed(fakes):
    """Makes routers over the fakes: `{0}` in an argument is the first one's address."""
    made = []

    def make(*arguments: str, **more) -> Routed:
        made.append(Routed(*(argument.format(*fakes[1]) for argument in arguments), **more))
        return made[-1]

    yield make
    for each in made:
        wait_until(lambda each=each: not each.router.open)
        assert all(not backend.open for backend in each.router._backends.values())
        each.close()


AB = ("versions.a.url={0}", "versions.b.url={1}")


def user_of(version: str, table) -> str:
    """A user whose turn `version` is first."""
    from deploy.routing.table import order

    return next(f"u{i}" for i in range(1000) if order(table.versions, f"user u{i}")[0].name == version)


def test_shares_and_users(routed, fakes):
    router = routed("versions.a.url={0}", "versions.b.url={1}", "versions.a.weight=3")
    answered = [router.answered_by() for _ in range(120)]
    assert 70 < answered.count("a") < 110 and answered.count("a") + answered.count("b") == 120
    for i in range(20):
        turns = {router.answered_by(user=f"u{i}"), router.answered_by(user=f"u{i}", prompt="x")}
        turns |= {router.answered_by(headers={"X-User-Id": f"u{i}"}, user="other")}  # the header comes before the field
        assert len(turns) == 1
    for fake in fakes[0][:2]:
        assert len(fake.seen) > answered.count(fake.name)
        line = f'requests_total{{status="200",version="{fake.name}"}}'
        wait_until(lambda line=line, fake=fake: router.figure(line) == len(fake.seen))
        assert router.figure(f'time_to_first_byte_seconds_count{{version="{fake.name}"}}') == len(fake.seen)


def test_names_of_the_model(routed, fakes):
    router = routed(*AB, "versions.a.model=llama-1", "versions.b.model=llama-2")
    assert router.answered_by(model="b") == "b" and fakes[0][1].seen == [{"model": "llama-2", "prompt": "hi"}]
    assert router.answered_by(user=user_of("a", router.router.table)) == "a" and fakes[0][0].seen[0]["model"] == "llama-1"
    router.ask(model="an-adapter", user=user_of("a", router.router.table))  # the servers' affair
    assert fakes[0][0].seen[1]["model"] == "an-adapter"
    assert [each["id"] for each in router.client.get("/v1/models").json()["data"]] == ["chat", "a", "b"]
    assert router.client.get("/v1/models/a").json()["parent"] == "chat"
    assert router.client.get("/v1/models/z").json()["error"]["code"] == "model_not_found"
    fakes[0][1].mode = "503"
    refusal = router.ask(model="b")  # asked for by name: no other one answers instead
    assert refusal.status_code == 503 and refusal.headers["retry-after"] == "7"


def test_what_passes_through(routed, fakes, tmp_path):
    (tmp_path / "key").write_text("theirs\n")
    router = routed(*AB, f"versions.b.api_key={tmp_path}/key")
    headers = {"authorization": "Bearer mine", "x-trace": "7", "connection": "x-hop", "x-hop": "1", "accept-encoding": "br"}
    raw = b'{"model": "a",  "prompt": "\xc3\xa4", "seed": 12345678901234567890}'
    for model in (b"a", b"b"):
        answer = httpx.post(f"{router.url}/v1/some/path%2Fx?q=%20", content=raw.replace(b'"a"', b'"%s"' % model), headers=headers)
        assert answer.status_code == 200 and answer.json()["text"].endswith(":ä")
    a, b = (fake.headers[0] for fake in fakes[0][:2])
    assert a["path"] == "/v1/some/path/x" and a["query"] == "q=%20" and a["x-trace"] == "7" and "x-hop" not in a
    assert a["host"] == fakes[1][0].removeprefix("http://") and a["accept-encoding"] == "br"
    assert a["authorization"] == "Bearer mine" and b["authorization"] == "Bearer theirs"
    assert fakes[0][0].seen[0]["seed"] == 12345678901234567890


def test_limits(routed):
    router = routed(*AB, keys=Keys(["k"]), body_bytes=2000, body_seconds=1)
    post = f"{router.url}/v1/completions"
    assert httpx.post(post, json={}).status_code == 401
    good = {"authorization": "Bearer k"}
    assert httpx.post(post, content=b"x" * 3000, headers=good).status_code == 413
    for content in (b"{", b"[1]", b"", b"[" * 1900, b"\xff"):
        answer = httpx.post(post, content=content, headers=good)
        assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]
    assert httpx.get(post, headers=good).status_code == 405 and httpx.get(f"{router.url}/other").status_code == 404
    with socket.create_connection(("127.0.0.1", int(router.url.rsplit(":", 1)[1]))) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ncontent-length: 100\r\n\r\n{")
        slow.settimeout(20)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    for path in (b"/v1/../secret", b"/v1/%2e%2e/secret"):  # httpx would tidy them
        with socket.create_connection(("127.0.0.1", int(router.url.rsplit(":", 1)[1]))) as raw:
            raw.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ncontent-length: 2\r\n\r\n{}" % path)
            raw.settimeout(20)
            assert raw.recv(100).startswith(b"HTTP/1.1 404")
    assert httpx.get(f"{router.url}/health").status_code == httpx.get(f"{router.url}/ready").status_code == 200


def test_events_come_one_by_one(routed, fakes):
    router = routed(*AB)
    for fake in fakes[0]:
        fake.gap = 0.15
    times, text, began = [], "", time.monotonic()
    with router.client.stream("POST", "/v1/completions", json={"model": "chat", "prompt": "p", "stream": True}) as response:
        for chunk in response.iter_text():
            text += chunk
            times.append(time.monotonic() - began)
    assert text.count("data: ") == 4 and text.endswith("data: [DONE]\n\n") and len(times) >= 4
    assert times[0] < times[-1] - 0.3  # three gaps lie between the first and the end


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_there(routed, fakes, stream):
    router, fake = routed("versions.a.url={0}"), fakes[0][0]
    fake.mode, fake.tokens, fake.gap = ("ok" if stream else "hang"), 1000, 0.02
    with httpx.Client(timeout=0.3 if not stream else 10) as client:
        asked = dict(json={"model": "chat", "stream": stream})
        if stream:
            with client.stream("POST", f"{router.url}/v1/completions", **asked) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{router.url}/v1/completions", **asked)
    wait_until(lambda: fake.cancelled == 1 and not fake.running)
    version = "a" if stream else "none"
    wait_until(lambda: router.figure(f'requests_total{{status="499",version="{version}"}}') == 1)


def test_clients_that_leave_leak_nothing(routed, fakes):
    """Connections and tasks return to what they were after 100 clients that left in the middle."""
    router = routed(*AB)
    for fake in fakes[0]:
        fake.tokens, fake.gap = 1000, 0.02

    async def leave(count: int) -> None:
        async with httpx.AsyncClient(timeout=20) as client:

            async def one() -> None:
                async with client.stream("POST", f"{router.url}/v1/completions", json={"model": "chat", "stream": True}) as each:
                    await anext(each.aiter_bytes())

            await asyncio.gather(*(one() for _ in range(count)))

    def held() -> tuple[int, int]:
        return psutil.Process().num_fds(), len(asyncio.all_tasks(router._loop))

    asyncio.run(leave(2))
    wait_until(lambda: not router.router.open and not any(fake.running for fake in fakes[0]))
    before = held()
    asyncio.run(leave(100))
    assert sum(len(fake.seen) for fake in fakes[0]) == 102
    wait_until(lambda: all(now <= then + 2 for now, then in zip(held(), before, strict=True)))


@pytest.mark.parametrize("mode", ["503", "reset", "refused"])
def test_another_one_answers(routed, fakes, mode):
    """No client notices; after some failures the server is left alone, and taken back when it is well."""
    router = routed(*AB, "probe_every=0.4")
    a, b = fakes[0][:2]
    user = user_of("a", router.router.table)
    assert router.answered_by(user=user) == "a"
    if mode == "refused":
        address = socket.create_server(("127.0.0.1", 0))
        port = address.getsockname()[1]
        address.close()
        router.install(f"versions.a.url=http://127.0.0.1:{port}", f"versions.b.url={fakes[1][1]}", "probe_every=30")
        router.router.servers(router.router.table.versions[0])[0].ready = True  # as if it had died since its last probe
    else:
        a.mode = mode
    before = len(a.seen)
    assert [router.answered_by(user=user) for _ in range(6)] == ["b"] * 6
    reason = "connect" if mode == "refused" else mode
    assert len(a.seen) - before == (0 if mode == "refused" else 2)
    assert router.figure(f'retries_total{{reason="{reason}",version="a"}}') == (1 if mode == "refused" else 2)
    assert router.figure('fallbacks_total{answered_by="b",version="a"}') == 6
    backend = router.router.servers(router.router.table.versions[0])[0]
    assert not (backend.ready and backend.circuit.closed)
    if mode != "refused":
        a.mode = "ok"
        wait_until(lambda: router.answered_by(user=user) == "a")
        assert backend.circuit.closed


def test_a_server_that_says_it_is_not_ready(routed, fakes):
    router, a = routed(*AB), fakes[0][0]
    user = user_of("a", router.router.table)
    a.ready = False
    wait_until(lambda: router.answered_by(user=user) == "b")
    a.ready = True
    wait_until(lambda: router.answered_by(user=user) == "a")
    fakes[0][1].ready = a.ready = False
    wait_until(lambda: httpx.get(f"{router.url}/ready").status_code == 503, 3)
    refusal = router.ask()
    assert refusal.status_code == 503 and refusal.headers["retry-after"] == "1"
    assert refusal.json()["error"]["code"] == "unavailable"


def test_a_busy_server_is_the_clients_affair(routed, fakes):
    """429 is passed on with its Retry-After, and so is 500; only the latter counts against the server."""
    router, a = routed("versions.a.url={0}"), fakes[0][0]
    for mode, asked in (("429", 5), ("500", 2)):
        a.mode, before = mode, len(a.seen)
        answers = [router.ask() for _ in range(5)]
        assert [r.status_code for r in answers] == [int(mode)] * asked + [503] * (5 - asked)
        assert answers[0].headers["retry-after"] == "7" and answers[0].json()["error"]["message"] == mode
        assert len(a.seen) - before == asked


def test_a_closed_connection_is_tried_again_where_there_is_only_one(routed, fakes):
    router, a = routed("versions.a.url={0}", "failures=5"), fakes[0][0]
    a.mode = "reset"
    assert router.ask().status_code == 503 and len(a.seen) == 2


@pytest.mark.parametrize("mode", ["hang", "headers"])
def test_a_server_that_falls_silent_loses_what_had_not_begun(routed, fakes, mode):
    router, a = routed(*AB, "probe_timeout=0.3"), fakes[0][0]
    user = user_of("a", router.router.table)
    a.mode, answers = mode, []
    thread = threading.Thread(target=lambda: answers.append(router.ask(user=user, stream=mode == "headers")))
    thread.start()
    wait_until(lambda: a.running == 1)
    time.sleep(0.3)
    assert not answers  # slow, but its /ready answers: nothing is done
    a.ready = None
    thread.join(5)
    assert answers[0].status_code == 200 and answers[0].headers["x-model-version"] == "b"
    wait_until(lambda: not a.running)
    a.ready = True


def test_two_servers_of_a_version_share_its_work(routed, fakes):
    router = routed("versions.a.url={0},{1}", "versions.c.url={2}", "versions.c.weight=0")
    a, b, c = fakes[0]
    for fake in (a, b):
        fake.gap = 0.3
    threads = [threading.Thread(target=router.ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(a.seen) == len(b.seen) == 3 and not c.seen
    a.mode = b.mode = "503"
    assert router.answered_by() == "c"  # the reserve, for the others only


def test_a_server_that_dies_within_a_stream(routed, fakes):
    """The stream that had begun ends with an error, and without [DONE]."""
    sudden = socket.create_server(("127.0.0.1", 0))

    def die_in_the_middle() -> None:
        while True:
            try:
                connection, _ = sudden.accept()
            except OSError:
                return
            head = connection.recv(10_000)
            if head.startswith(b"GET /ready"):
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            else:
                start = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                connection.sendall(start + b"9\r\ndata: {}\n\r\n")
            connection.close()

    threading.Thread(target=die_in_the_middle, daemon=True).start()
    try:
        router = routed(f"versions.a.url=http://127.0.0.1:{sudden.getsockname()[1]}")
        answer = router.ask(stream=True)
        first, *_, last = [part.strip() for part in answer.text.split("\n\n") if part.strip()]
        assert first == "data: {}" and json.loads(last.removeprefix("data: "))["error"]["code"] == "cut"
        wait_until(lambda: router.figure('requests_total{status="cut",version="a"}') == 1)
    finally:
        sudden.close()


def test_time_is_up(routed, fakes):
    router, a = routed("versions.a.url={0}", request_seconds=0.4), fakes[0][0]
    a.mode = "hang"
    answer = router.ask()
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    a.mode, a.tokens, a.gap = "ok", 1000, 0.02
    text = router.ask(stream=True).text
    assert json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until(lambda: not a.running)


def test_shadows(routed, fakes):
    router = routed("versions.a.url={0}", "versions.b.url={1}", "versions.b.shadow=0.5", "versions.b.model=other")
    a, b = fakes[0][:2]
    assert {router.answered_by(user=f"u{i}") for i in range(60)} == {"a"}
    wait_until(lambda: router.figure('shadow_requests_total{status="200",version="b"}') == len(b.seen) > 0)
    assert 15 < len(b.seen) < 45 and {body["model"] for body in b.seen} == {"other"}
    users = {body["user"] for body in b.seen}
    for user in users:
        router.ask(user=user)
    wait_until(lambda: len(b.seen) == 2 * len(users))  # the same users again
    router.ask(model="a", user=next(iter(users)))  # a version by name: nobody else's affair
    assert router.answered_by(model="b") == "b" and len(b.seen) == 2 * len(users) + 1


def test_a_shadow_that_hangs_costs_nothing(routed, fakes):
    router = routed(
        "versions.a.url={0}", "versions.b.url={1}", "versions.b.shadow=1", "shadow_running=3", "shadow_timeout=5"
    )  # fmt: skip
    b = fakes[0][1]
    b.mode, began = "hang", time.monotonic()
    assert {router.answered_by() for _ in range(20)} == {"a"}
    assert time.monotonic() - began < 4.8  # none waited for a shadow
    assert len(b.seen) <= 3 and router.figure('shadow_requests_total{status="dropped",version="b"}') == 17
    wait_until(lambda: router.figure('shadow_requests_total{status="late",version="b"}') == 3)
    wait_until(lambda: not b.running)
    b.ready = False  # a shadow that is not ready is sent nothing
    wait_until(lambda: router.figure('backend_up{url="' + fakes[1][1]) == 0)
    seen = len(b.seen)
    assert router.answered_by() == "a" and len(b.seen) == seen
    assert router.figure('shadow_requests_total{status="failed",version="b"}') == 1


def test_a_new_table_keeps_what_is_known(routed, fakes):
    router = routed(*AB)
    a, b, c = fakes[0]
    a.ready = False
    wait_until(lambda: router.figure('backend_up{url="' + fakes[1][0]) == 0)
    known = router.router.servers(router.router.table.versions[0])[0]
    a.mode = "hang"
    urls = fakes[1]
    router.install(f"versions.a.url={urls[0]}", "versions.a.weight=5", f"versions.c.url={urls[2]}")
    assert router.router.servers(router.router.table.versions[0])[0] is known and not known.ready
    assert {router.answered_by() for _ in range(8)} == {"c"} and not b.seen  # b is gone, and c was probed at once
    assert len(router.router._watches) == 2
