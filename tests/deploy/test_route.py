"""The router as a process under load: a server killed behind it, its table replaced, its own end, a real server."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from fake_servers import ROOT, Fake, InThread, Process, is_ready, wait_until

FAKE = str(ROOT / "tests" / "deploy" / "fake_servers.py")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Load:
    """Clients that ask again and again, streams and whole answers in turn, until they are told to stop."""

    def __init__(self, url: str, clients: int) -> None:
        self.url, self.stop = url, threading.Event()
        self.answers: list[tuple[str, int, str]] = []  # version, status, text
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _client(self, number: int) -> None:
        with httpx.Client(timeout=30) as client:
            while not self.stop.is_set():
                number += 1
                body = {"model": "chat", "prompt": str(number), "stream": number % 2 == 0}
                try:
                    answer = client.post(f"{self.url}/v1/completions", json=body)
                    self.answers.append((answer.headers.get("x-model-version", ""), answer.status_code, answer.text))
                except httpx.HTTPError as problem:
                    self.answers.append(("", 0, repr(problem)))

    def more(self, count: int, of: str = "") -> None:
        """Wait for `count` more answers, of a version if one is named."""
        goal = self.count(of) + count
        wait_until(lambda: self.count(of) >= goal, 30)

    def count(self, version: str = "") -> int:
        return sum(1 for each in list(self.answers) if not version or each[0] == version)

    def end(self) -> list[tuple[str, int, str]]:
        self.stop.set()
        for thread in self._threads:
            thread.join(30)
        return self.answers


def whole(text: str) -> bool:
    return text.endswith("data: [DONE]\n\n") and text.count("data: ") == 21 if text.startswith("data: ") else '"text":"' in text


@pytest.fixture
def processes(tmp_path):
    """Starts commands, and kills them at the end."""
    started: list[Process] = []

    def start(*command: str) -> Process:
        started.append(Process(tmp_path / f"log{len(started)}", *command))
        return started[-1]

    yield start
    for each in started:
        each.close()


def route(processes, *arguments: str) -> Process:
    router = processes("deploy/route.py", "name=chat", "port=0", "probe_every=0.2", *arguments)
    url = router.address()
    wait_until(lambda: is_ready(url), 30)
    return router


def test_kill_9_of_a_server_under_load(processes):
    """Nothing is lost but streams that had begun; those end with an error. The server is used again when it is back."""
    ports = [free_port(), free_port()]
    a, b = (processes(FAKE, name, str(port)) for name, port in zip("ab", ports, strict=True))
    for port in ports:
        wait_until(lambda port=port: is_ready(f"http://127.0.0.1:{port}"), 30)
    url = route(processes, *(f"versions.{n}.url=http://127.0.0.1:{port}" for n, port in zip("ab", ports, strict=True))).address()
    load = Load(url, 6)
    load.more(12, "a")
    os.kill(a.child.pid, signal.SIGKILL)
    load.more(12, "b")
    back = processes(FAKE, "a", str(ports[0]))
    load.more(6, "a")
    answers = load.end()
    assert back.child.poll() is None
    bad = [(version, status, text) for version, status, text in answers if status != 200 or not whole(text)]
    assert len(bad) <= 6  # one of each client, at most
    for version, status, text in bad:
        assert version == "a" and status == 200 and text.startswith("data: ") and '"code": "cut"' in text
    figures = httpx.get(f"{url}/metrics").text
    assert 'llm_builder_router_fallbacks_total{answered_by="b",version="a"}' in figures


def test_reload_under_load(processes, tmp_path):
    """A file that changes and SIGHUP; a wrong file changes nothing; no request notices."""
    fakes = [Fake(name) for name in "abc"]
    servers = [InThread(fake) for fake in fakes]
    file = tmp_path / "router.yaml"

    def write(names: str, more: str = "") -> None:
        rows = "".join(f"  {name}: {{url: '{servers['abc'.index(name)].url}'}}\n" for name in names)
        file.with_suffix(".new").write_text(f"versions:\n{rows}{more}")
        file.with_suffix(".new").replace(file)

    try:
        for fake in fakes:
            fake.tokens, fake.gap = 20, 0.005
        write("ab")
        router = route(processes, f"config={file}")
        url = router.address()
        load = Load(url, 4)
        load.more(8)
        write("bc")
        load.more(4, "c")
        wait_until(lambda: not fakes[0].running)
        seen = len(fakes[0].seen)
        write("ab", "weights: 3\n")
        wait_until(lambda: "unknown key weights" in router.log.read_text())
        assert "the table in force stays" in router.log.read_text()
        assert "llm_builder_router_config_good 0.0" in httpx.get(f"{url}/metrics").text
        load.more(8)
        assert len(fakes[0].seen) == seen
        write("a")
        wait_until(lambda: "reloaded: a 100%" in router.log.read_text())
        router.child.send_signal(signal.SIGHUP)  # the same file again
        wait_until(lambda: router.log.read_text().count("reloaded: a 100%") == 2)
        load.more(8, "a")
        answers = load.end()
        assert {version for version, _, _ in answers} == set("abc")
        assert all(status == 200 and whole(text) for _, status, text in answers)
        assert "llm_builder_router_config_good 1.0" in httpx.get(f"{url}/metrics").text
    finally:
        for server in servers:
            server.close()


def test_sigterm_lets_running_requests_end(processes):
    fake = Fake("a")
    fake.tokens, fake.gap = 20, 0.1
    server = InThread(fake)
    try:
        router = route(processes, f"versions.a.url={server.url}", "drain=20")
        url, answers = router.address(), []
        body = {"model": "chat", "stream": True}
        thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30).text))
        thread.start()
        wait_until(lambda: fake.running == 1)
        router.child.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_ready(url))
        refusal = httpx.post(f"{url}/v1/completions", json=body)
        assert refusal.status_code == 503 and refusal.headers["retry-after"] == "20"
        thread.join()
        assert whole(answers[0])
        assert router.child.wait(10) == 0
    finally:
        server.close()


def test_commands_refuse_in_a_line(processes):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        router = processes("deploy/route.py", "name=m", "versions.a.url=http://127.0.0.1:9", f"port={port}")
        assert router.child.wait(30) == 2
    assert router.log.read_text().startswith(f"error: host=127.0.0.1 port={port}: Address already in use")


def test_a_real_server_killed(processes, tiny: Path):
    """Two embedded servers of one model; answers are those of the model, before and after one of them is killed."""
    command = ("deploy/serve.py", f"model=hf:{tiny}", "name=tiny", "port=0", "backend=embedded", "rows=4")
    servers = [processes(*command) for _ in "ab"]
    urls = [server.address(120) for server in servers]
    router = route(processes, f"versions.a.url={urls[0]}", f"versions.b.url={urls[1]}", "versions.a.model=tiny",
                   "versions.b.model=tiny")  # fmt: skip
    url = router.address()
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    wait_until(lambda: all(is_ready(each) for each in urls), 30)

    def ask(model: str, at: str = url, **more) -> httpx.Response:
        return httpx.post(f"{at}/v1/chat/completions", json={"model": model, **body, **more}, timeout=30)

    expected = ask("tiny", urls[0]).json()["choices"]
    assert ask("a").json()["choices"] == ask("b").json()["choices"] == expected
    refusal = ask("chat", temperature=9)
    assert refusal.status_code == 400 and "temperature" in refusal.json()["error"]["message"]
    assert ask("chat", stream=True).text.endswith("data: [DONE]\n\n")
    with httpx.stream("POST", f"{url}/v1/chat/completions", timeout=30,
                      json={"model": "a", **body, "max_tokens": 200, "ignore_eos": True, "stream": True}) as left:  # fmt: skip
        next(left.iter_bytes())
    wait_until(lambda: "llm_builder_batch 0.0" in httpx.get(f"{urls[0]}/metrics").text)
    assert 'llm_builder_requests_total{endpoint="chat",status="499"} 1.0' in httpx.get(f"{urls[0]}/metrics").text
    servers[0].child.kill()
    began, answers = time.monotonic(), [ask("chat") for _ in range(8)]
    assert all(answer.status_code == 200 and answer.json()["choices"] == expected for answer in answers), sys.argv
    assert {answer.headers["x-model-version"] for answer in answers} == {"b"} and time.monotonic() - began < 20
