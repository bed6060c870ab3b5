"""The judge, behind a real HTTP server on this machine that answers by rules."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from nemo_ext.errors import RunError, UserError
from nemo_ext.evaluation import judging
from nemo_ext.evaluation.generation import Prompt
from nemo_ext.evaluation.judge import Endpoint, Judge


@pytest.fixture
def server():
    """An endpoint; `server.rule(body, headers)` gives (status, reply or object, headers), `server.seen` are the requests."""
    state = SimpleNamespace(seen=[], rule=None, url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.seen.append(SimpleNamespace(path=self.path, body=body, headers=self.headers))
            status, reply, *headers = state.rule(body, self.headers)
            content = {"choices": [{"message": {"role": "assistant", "content": reply}}]} if isinstance(reply, str) else reply
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


def judge(server, tmp_path, **more) -> Judge:
    return Judge(Endpoint(server.url, "rules", **{"first_wait": 0.01, "retries": 3, **more}), tmp_path / "replies.jsonl")


def parts(body) -> dict[str, str]:
    """The tagged texts of a request."""
    return dict(re.findall(r"<(\w+)>\n(.*?)\n</\1>", body["messages"][1]["content"], re.DOTALL))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(({"role": "user", "content": f"question {i}"},), (f"reference {i}",), f"line {i}") for i in range(count)]


def test_rating(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    server.rule = lambda body, headers: (200, f"Because. Rating: 3\nOn reflection:\n**Rating:** {len(parts(body)['answer'])}")
    answers = ["a", "bb", "ccccccccc", "dddd"]
    result, rows = judging.rate(judge(server, tmp_path), prompts(4), answers, "Be fair.")
    assert [row["rating"] for row in rows] == [1, 2, 9, 4] and result.metrics[0].value == 4.0
    assert result.metrics[0].low < 4.0 < result.metrics[0].high
    request = server.seen[0]
    assert request.path == "/v1/chat/completions" and request.headers["Authorization"] == "Bearer a-secret"
    assert request.body["model"] == "rules" and request.body["temperature"] == 0.0
    text = request.body["messages"][1]["content"]
    assert "Be fair." in text and "<question>\nquestion " in text and "<reference>\nreference " in text
    assert "a-secret" not in (tmp_path / "replies.jsonl").read_text()


def test_replies_are_kept(server, tmp_path):
    server.rule = lambda body, headers: (200, "Rating: 7")
    judging.rate(judge(server, tmp_path), prompts(3), ["a", "b", "c"], "r")
    with open(tmp_path / "replies.jsonl", "a") as file:
        file.write('{"key": "cut o')  # by a kill
    judging.rate(judge(server, tmp_path), prompts(3), ["a", "b", "other"], "r")
    assert len(server.seen) == 4
    judging.rate(judge(server, tmp_path, temperature=None), prompts(1), ["a"], "r")
    assert len(server.seen) == 5 and "temperature" not in server.seen[-1].body


def test_pairs_are_judged_in_both_orders(server, tmp_path):
    """This judge prefers the longer answer, and A where they are as long: there the orders disagree."""

    def rule(body, headers):
        a, b = len(parts(body)["answer_A"]), len(parts(body)["answer_B"])
        return 200, f"Verdict: {'A' if a >= b else 'B'}"

    server.rule = rule
    base, other = ["xx", "xx", "xx", "xx"], ["yyy", "y", "yy", "yyyy"]
    result, rows = judging.compare(judge(server, tmp_path), prompts(4), base, other, "r")
    assert [row["outcome"] for row in rows] == ["wins", "losses", "ties", "wins"]
    assert rows[2]["verdicts"] == ["a", "a"] and result.metrics[0].value == 2.5 / 4 and len(server.seen) == 8
    assert result.about[0].startswith("2 won, 1 tied, 1 lost") and "1 ties are verdicts that disagree" in result.about[0]


def test_a_judge_that_always_says_a_gives_ties_only(server, tmp_path):
    server.rule = lambda body, headers: (200, "Verdict: [[A]]")
    result, rows = judging.compare(judge(server, tmp_path), prompts(3), ["1", "2", "3"], ["4", "5", "6"], "r")
    assert [row["outcome"] for row in rows] == ["ties"] * 3 and result.metrics[0].value == 0.5


def test_failures_that_pass_are_tried_again(server, tmp_path):
    trouble = [(503, {"error": {"message": "overloaded"}}), (429, {}, {"Retry-After": "0.2"})]

    def rule(body, headers):
        return trouble.pop(0) if trouble else (200, "Rating: 5")

    server.rule = rule
    started = time.monotonic()
    assert judge(server, tmp_path).ask([{"role": "user", "content": "x"}]) == "Rating: 5"
    assert len(server.seen) == 3 and time.monotonic() - started >= 0.2


@pytest.mark.parametrize(
    "status,reply,error,words,requests",
    [
        (401, {"error": {"message": "bad key"}}, UserError, "refuses: 401 Unauthorized: bad key; the key comes from", 1),
        (404, {"detail": "no model rules"}, UserError, "refuses: 404 Not Found: no model rules", 1),
        (500, {"error": "broken"}, RunError, "did not answer in 4 attempts: 500 Internal Server Error: broken", 4),
        (200, {"object": "list"}, RunError, 'gave no chat completion: {"object": "list"}', 1),
        (200, b"<html>", RunError, "gave no chat completion: <html>", 1),
    ],
)
def test_errors(server, tmp_path, status, reply, error, words, requests):
    server.rule = lambda body, headers: (status, reply)
    with pytest.raises(error) as raised:
        judge(server, tmp_path).ask_all([[{"role": "user", "content": "x"}]])
    assert words in str(raised.value) and len(server.seen) == requests


def test_a_slow_and_an_absent_endpoint(server, tmp_path):
    def rule(body, headers):
        time.sleep(0.5)
        return 200, "Rating: 1"

    server.rule = rule
    with pytest.raises(RunError, match="in 1 attempts: no reply within judge_timeout=0.1 seconds"):
        judge(server, tmp_path, timeout=0.1, retries=0).ask([{"role": "user", "content": "x"}])
    with pytest.raises(RunError, match="in 2 attempts: .*refused"):
        Judge(Endpoint("http://127.0.0.1:9", "m", retries=1, first_wait=0.01), tmp_path / "r").ask([])


def test_an_error_ends_the_other_threads_waits(server, tmp_path):
    """Seven wait a minute for a retry when the eighth is refused."""
    server.rule = lambda body, headers: (400, {}) if body["messages"][0]["content"] == "7" else (503, {})
    started = time.monotonic()
    with pytest.raises(UserError, match="400"):
        judge(server, tmp_path, workers=8, first_wait=30.0).ask_all([[{"role": "user", "content": str(i)}] for i in range(8)])
    assert time.monotonic() - started < 20


def test_replies_without_a_rating(server, tmp_path):
    server.rule = lambda body, headers: (200, "Rating: 8" if parts(body).get("answer") == "a" else "I cannot say. Rating: 11")
    result, rows = judging.rate(judge(server, tmp_path), prompts(2), ["a", "b"], "r")
    assert [row["rating"] for row in rows] == [8, None] and "1 replies had no rating and are left out" in result.about
    with pytest.raises(RunError, match="no reply of the judge has a line Rating: N"):
        judging.rate(judge(server, tmp_path), prompts(1), ["b"], "r")
    with pytest.raises(RunError, match="no reply of the judge has a line Verdict"):
        judging.compare(judge(server, tmp_path), prompts(1), ["b"], ["c"], "r")


def test_settings_that_cannot_be(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for settings, words in (
        (dict(url="localhost:8000"), "judge_url=localhost:8000"),
        (dict(key_env="NO_SUCH_KEY"), "judge_key_env=NO_SUCH_KEY: the environment has no such variable"),
        (dict(timeout=0), "judge_timeout=0"),
        (dict(retries=-1), "judge_retries=-1"),
    ):
        with pytest.raises(UserError, match=words):
            Endpoint(**{"url": "http://x/v1", "model": "m", **settings})
    assert Endpoint("http://x/v1/chat/completions", "m").address == "http://x/v1/chat/completions"


@pytest.mark.parametrize(
    "reply,rating",
    [("Rating: 7", 7), ("rating: 7.5/10", 7.5), ("**Rating**: [[9]]", 9), ("Rating: 0", None), ("7", None), ("Rating: 10", 10)],
)
def test_ratings(reply, rating):
    assert judging.parse_rating(reply) == rating


@pytest.mark.parametrize(
    "reply,verdict",
    [("Verdict: A", "a"), ("Verdict: Tie.", "tie"), ("**Verdict:** B", "b"), ("Verdict: Both", None), ("A", None)],
)
def test_verdicts(reply, verdict):
    assert judging.parse_verdict(reply) == verdict
