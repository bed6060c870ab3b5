"""The HTTP server: OpenAI's JSON, limits, and faults that clients make."""

import asyncio
import gc
import json
import resource
import socket
import time

import httpx
import psutil
import pytest
from served_models import Served

GREEDY = dict(temperature=0)
TOOL = {"type": "function", "function": {"name": "f"}}


def events(response: httpx.Response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def wait_until_idle(engine, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while (stats := engine.stats()).running or stats.waiting:
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)


def wait_until_alone(served, seconds: float = 60.0) -> None:
    """Until the server works on nothing, and only the fixture's own client may be connected."""
    state, deadline = served.server.server_state, time.monotonic() + seconds
    while len(state.connections) > 1 or state.tasks or served.service.open:
        assert time.monotonic() < deadline, (len(state.connections), len(state.tasks), served.service.open)
        time.sleep(0.01)


def test_a_chat_is_the_engines_answer(served, engine, reference, baseline):
    import torch

    ids = engine.prompts.chat([{"role": "user", "content": "hi"}])
    expected = reference.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False, pad_token_id=256
    )[0, len(ids) :].tolist()
    body = served.chat(max_tokens=12, **GREEDY).json()
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": engine._tokenizer.decode(expected, skip_special_tokens=True)}
    assert choice["finish_reason"] == "length" and body["object"] == "chat.completion"
    assert body["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 12, "total_tokens": len(ids) + 12}


def test_a_stream_says_the_same(served, baseline):
    asked = dict(max_tokens=20, n=2, seed=3, logprobs=True, top_logprobs=2)
    whole = served.chat(**asked).json()
    streamed = events(served.chat(**asked, stream=True, stream_options={"include_usage": True}))
    assert streamed[-1]["usage"] == whole["usage"] and streamed[-1]["choices"] == []
    for index in range(2):
        parts = [c for event in streamed for c in event["choices"] if c["index"] == index]
        assert parts[0]["delta"]["role"] == "assistant" and all("role" not in part["delta"] for part in parts[1:])
        assert "".join(p["delta"].get("content", "") for p in parts) == whole["choices"][index]["message"]["content"]
        tokens = [t for p in parts if p["logprobs"] for t in p["logprobs"]["content"]]
        assert [t["token"] for t in tokens] == [t["token"] for t in whole["choices"][index]["logprobs"]["content"]]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [whole["choices"][index]["finish_reason"]]


def test_completions_of_several_prompts(served, engine, baseline):
    body = served.complete(["ab", "cde"], max_tokens=6, logprobs=1, **GREEDY).json()
    alone = [served.complete(prompt, max_tokens=6, **GREEDY).json()["choices"][0]["text"] for prompt in ("ab", [99, 100, 101])]
    assert [c["index"] for c in body["choices"]] == [0, 1]
    assert body["choices"][0]["text"] == alone[0]
    ids = list(engine.prompts.text("cde"))
    assert served.complete(ids, max_tokens=6, **GREEDY).json()["choices"][0]["text"] == body["choices"][1]["text"]
    logprobs = body["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 6
    assert logprobs["text_offset"][0] == 0 and max(logprobs["token_logprobs"]) <= 0
    streamed = events(served.complete(["ab", "cde"], max_tokens=6, stream=True, **GREEDY))
    for index in range(2):
        text = "".join(c["text"] for event in streamed for c in event["choices"] if c["index"] == index)
        assert text == body["choices"][index]["text"]


def test_json_schema(served, baseline):
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answers = [served.chat(response_format=form, seed=seed, max_tokens=150).json()["choices"][0] for seed in range(3)]
    finished = [answer for answer in answers if answer["finish_reason"] == "stop"]
    assert finished and all(json.loads(answer["message"]["content"]) == {"a": "x"} for answer in finished)


def test_models(served):
    models = served.client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert served.client.get("/v1/models/tiny").json() == models["data"][0]
    assert served.client.get("/v1/models/other").status_code == 404


def test_metrics(served, baseline):
    def figures() -> dict[str, float]:
        lines = [line for line in served.client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    before = figures()
    assert served.complete("abc", max_tokens=5, ignore_eos=True, n=2).status_code == 200
    after = figures()

    def grown(name: str) -> float:
        return after[f"llm_builder_{name}"] - before.get(f"llm_builder_{name}", 0)

    assert grown("generated_tokens_total") == 10 and grown("prompt_tokens_total") == 3
    assert grown('requests_total{endpoint="completions",status="200"}') == 1
    assert grown("time_to_first_token_seconds_count") == 1 and grown("inter_token_seconds_count") == 8
    assert grown("request_seconds_count") == 1 and grown("answer_tokens_per_second_count") == 2
    assert after["llm_builder_queue"] == after["llm_builder_batch"] == 0 and after["llm_builder_rows"] == 4


@pytest.mark.parametrize(
    "body, status, words",
    [
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"temperature": float("inf")}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 10**9}, 400, "n:"),
        ({"n": 9}, 400, "at most 4"),
        ({"max_tokens": 10**6}, 400, "above the server's 200"),
        ({"prompt": "a" * 300}, 400, "300 tokens, the context 256"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": [5, 999]}, 400, "token 999"),
        ({"prompt": ["a"] * 33}, 400, "33 prompts"),
        ({"model": "other"}, 404, "there is no model other"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"frobnicate": 1}, 400, "frobnicate"),
        ({"stop": ["x"] * 99}, 400, "stop"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"prompt": None}, 400, "prompt"),
        ({"model": "\ud800"}, 404, "there is no model ?"),
    ],
)
def test_bad_requests(served, body, status, words, baseline):
    content = json.dumps({"model": "tiny", "prompt": "hi"} | body)  # Python's json writes NaN
    response = served.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 19_000,
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
    ],
)
def test_malformed_bodies(served, content, baseline):
    response = served.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body, words",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "reads text only"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "none of auto, none, required"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "names g, which is none of"),
        ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "tool_choice must be"),
        ({"tool_choice": "required", "tools": [TOOL], "response_format": {"type": "json_object"}}, "do not go together"),
        ({"top_logprobs": 2}, "logprobs=true"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "what"}}}}, "schema"),
        ({"max_completion_tokens": 999}, "above the server's 200"),
    ],
)
def test_bad_chats(served, body, words, baseline):
    response = served.post("/v1/chat/completions", **{"messages": [{"role": "user", "content": "x"}]} | body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_a_body_too_large_is_not_read(served):
    assert served.complete("a" * 30_000).status_code == 413

    def pieces():
        for _ in range(30):
            yield b"a" * 1000

    response = served.client.post("/v1/completions", content=pieces())  # no Content-Length
    assert response.status_code == 413 and "20,000 bytes" in response.json()["error"]["message"]


def test_keys_bodies_in_time_and_answers_in_time(engine):
    from deploy.limits import Keys, Limits
    from deploy.server import Service

    limits = Limits(body_seconds=0.2, request_seconds=0.05, max_tokens=250)
    guarded = Served(Service(engine, "tiny", limits), Keys(["right", "also"]))
    try:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}, {"authorization": "Bearer righ\xe9"}):
            headers = {name: value.encode("latin-1") for name, value in header.items()}
            assert guarded.client.get("/v1/models", headers=headers).status_code == 401
        headers = {"authorization": "Bearer also"}
        assert guarded.client.get("/v1/models", headers=headers).status_code == 200
        assert guarded.client.get("/health").status_code == 200
        with socket.create_connection(("127.0.0.1", guarded.port)) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer also\r\ncontent-length: 50\r\n\r\n{")
            assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]
        body = {"model": "tiny", "prompt": "x", "max_tokens": 250, "ignore_eos": True}
        for stream in (False, True):
            late = guarded.client.post("/v1/completions", json=body | {"stream": stream}, headers=headers)
            if late.status_code == 200:  # some tokens came before the time was up: the stream ends with the error
                assert stream and '"code":"timeout"' in late.text
            else:
                assert late.status_code == 504
    finally:
        guarded.close()
    wait_until_idle(engine)


def test_clients_that_leave_free_their_rows(served, engine, baseline):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    for stream in (True, False):
        for _ in range(6):
            payload = json.dumps(body | {"stream": stream}).encode()
            with socket.create_connection(("127.0.0.1", served.port)) as client:
                client.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
                    + str(len(payload)).encode() + b"\r\n\r\n" + payload
                )  # fmt: skip
                if stream:
                    assert b" 200 " in client.recv(200)
        started = engine.stats().generated_tokens
        wait_until_idle(engine)
        assert engine.stats().generated_tokens - started < 6 * 200
    wait_until_alone(served)


def test_a_full_server_says_when_to_return(served, engine, baseline):
    async def crowd() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(base_url=served.url, limits=limits, timeout=60) as client:
            body = {"model": "tiny", "prompt": "x" * 50, "max_tokens": 60, "ignore_eos": True}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(60)))

    responses = asyncio.run(crowd())
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 32
    for response in responses:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: "


def connect(port: int, small: bool = False) -> socket.socket:
    """A client's connection, with little room for what it does not read."""
    client = socket.socket()
    if small:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.settimeout(60)
    client.connect(("127.0.0.1", port))
    return client


def test_a_thousand_slow_clients(served, engine, baseline, monkeypatch):
    """Some read nothing, some send a body byte by byte, some not even a head, all at once. Quick clients are answered as ever;
    the slow ones hold no row, get everything in the end, and leave nothing behind."""
    readers, senders, silent = 400, 400, 200
    monkeypatch.setattr(engine, "max_waiting", readers)  # a full queue is another test
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3000:
        pytest.skip(f"both ends of 1,000 connections need 3,000 open files, and {hard} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    payload = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 4, "stream": True, "ignore_eos": True}).encode()
    whole = HEAD + str(len(payload)).encode() + b"\r\n\r\n" + payload

    def quick() -> None:
        assert httpx.get(f"{served.url}/health", timeout=5).status_code == 200
        asked = {"model": "tiny", "prompt": "x", "max_tokens": 2, "ignore_eos": True}
        assert httpx.post(f"{served.url}/v1/completions", timeout=20, json=asked).status_code == 200

    def crowd() -> None:
        before = engine.stats().generated_tokens
        clients = [connect(served.port, small=True) for _ in range(readers + senders + silent)]
        for client in clients[:readers]:
            client.sendall(whole)
        for at in range(0, len(whole) - len(payload) + 20, 7):
            for client in clients[readers:-silent]:
                client.sendall(whole[at : at + 7])
            if at == 70:
                quick()
        for client in clients[-silent:]:
            client.sendall(whole[:30])
        quick()
        deadline = time.monotonic() + 60
        while engine.stats().generated_tokens - before < 4 * readers:  # nobody has read anything
            assert time.monotonic() < deadline
            time.sleep(0.01)
        wait_until_idle(engine)
        quick()
        for client in clients[:readers]:
            answer = b""
            while data := client.recv(65536):
                answer += data
            assert answer.count(b"data: ") >= 2 and b"[DONE]" in answer
        for client in clients:  # those that sent only a part leave
            client.close()
        wait_until_alone(served)

    process = psutil.Process()
    crowd()
    gc.collect()
    memory, files = process.memory_info().rss, process.num_fds()
    crowd()
    gc.collect()
    assert process.memory_info().rss - memory < 16 << 20
    assert process.num_fds() <= files + 5


def test_clients_that_stall_are_closed(engine):
    """A head that never ends, as the first request or after an answered one; not a client that may still ask."""
    from deploy.limits import Limits
    from deploy.server import Service

    def healthy(client: socket.socket) -> bool:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(1000)
        return b" 200 " in answer

    served = Served(Service(engine, "tiny", Limits(body_seconds=0.3)))
    try:
        new, known, resting = (connect(served.port) for _ in range(3))
        assert healthy(known) and healthy(resting)
        rests = time.monotonic()
        for client in (new, known):
            client.sendall(HEAD[:20])
        for client in (new, known):
            with pytest.raises(ConnectionResetError):
                assert client.recv(1000) == b""
                raise ConnectionResetError
        assert time.monotonic() - rests > 4 or healthy(resting)  # uvicorn keeps a connection for five seconds
        for client in (new, known, resting):
            client.close()
    finally:
        served.close()


def test_an_answer_that_nobody_takes_is_dropped(monkeypatch):
    """`close` waits for the client no longer than LINGER."""
    from deploy import listening

    monkeypatch.setattr(listening, "LINGER", 0.2)

    async def lost() -> float:
        gone, loop, began = asyncio.Event(), asyncio.get_running_loop(), time.monotonic()

        class Writes(asyncio.Protocol):
            def connection_made(self, transport) -> None:
                transport.write(b"x" * (64 << 20))
                listening.Patient(transport, loop).close()

            def connection_lost(self, problem) -> None:
                gone.set()

        server = await loop.create_server(Writes, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()):
            await asyncio.wait_for(gone.wait(), 60)
        server.close()
        return time.monotonic() - began

    assert 0.2 <= asyncio.run(lost()) < 30


def test_too_many_connections(engine):
    """Requests are answered 503, those that watch the server are not; far more are closed."""
    from deploy import listening
    from deploy.limits import Limits
    from deploy.server import Service

    served = Served(Service(engine, "tiny", Limits(connections=3)))
    try:
        idle = [connect(served.port) for _ in range(4)]
        refused = served.complete("x", max_tokens=2)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1" and "3 connections" in refused.text
        for path in ("/health", "/ready", "/metrics"):
            assert httpx.get(served.url + path).status_code == 200
        more = [connect(served.port) for _ in range(listening.RESERVE)]
        with pytest.raises(httpx.HTTPError):
            assert httpx.get(served.url + "/health").status_code == 200
        for client in idle + more:
            client.close()
        deadline = time.monotonic() + 60
        while served.server.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert served.complete("x", max_tokens=2).status_code == 200
    finally:
        served.close()


def test_open_files(monkeypatch):
    from deploy import listening
    from nemo_ext.errors import UserError

    set_, limits = [], (1024, 2048)
    monkeypatch.setattr(listening.resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(listening.resource, "setrlimit", lambda which, value: set_.append(value))
    listening.allow_files(100)
    assert not set_
    listening.allow_files(1024)
    assert set_ == [(1024 + listening.RESERVE + listening.FILES, 2048)]
    with pytest.raises(UserError, match="connections=4000 needs 4384 open files"):
        listening.allow_files(4000)


def test_draining_refuses_and_finishes(engine):
    from deploy.limits import Limits
    from deploy.server import Service

    service = Service(engine, "tiny", Limits(max_tokens=250))
    served = Served(service)
    try:
        with served.client.stream(
            "POST", "/v1/completions",
            json={"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True},
        ) as running:  # fmt: skip
            assert running.status_code == 200 and httpx.get(f"{served.url}/ready").status_code == 200
            service.draining = True
            refused = httpx.post(f"{served.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
            if refused.status_code != 200:  # else all 200 tokens came before it
                assert refused.status_code == 503 and "retry-after" in refused.headers
            text = "".join(running.iter_text())
        assert text.endswith("data: [DONE]\n\n") and text.count('"finish_reason":"length"') == 1
    finally:
        served.close()
