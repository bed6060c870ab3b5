"""The commands: what they refuse, a server as a process, drained by SIGTERM, and what a benchmark says of it."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from deploy import bench, listening, load, serve
from nemo_ext.command_line import parse
from nemo_ext.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]


def options(*arguments: str) -> serve.Options:
    return parse(serve.Options, list(arguments), "")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["model=hf:nowhere/at-all"], "no such folder, nor such a model"),
        (["model=nowhere"], "no such folder"),
        (["model={}"], "is no run: for a Hugging Face folder say model=hf:"),
        (["model=hf:{}/.."], "no config.json"),
        (["model=hf:{}", "adapters=polite"], "is not NAME=FOLDER"),
        (["model=hf:{}", "adapters=polite={}"], "no adapter_config.json"),
        (["model=hf:{}", "port=70000"], "0 to 65535"),
        (["model=hf:{}", "rows=0"], "1 or more"),
        (["model=hf:{}", "timeout=.inf"], "above 0"),
        (["model=hf:{}", "tp=2"], "tp= is for TensorRT-LLM and vLLM"),
        (["model=hf:{}", "gpu_memory=1.5"], "at most 1"),
        (["model=hf:{}", "backend=vllm"], "is not installed"),
        (["model=hf:{}", "api_keys=nowhere.txt"], "cannot be read"),
        (["model=hf:{}", "context=512"], "1 to 256"),
        (["model=hf:{}", "draft=small"], "neither ngram nor hf:FOLDER"),
        (["model=hf:{}", "draft=hf:nowhere"], "no such folder"),
        (["model=hf:{}", "draft_tokens=0"], "1 or more"),
        (["model=hf:{}", "host=203.0.113.7"], "host=203.0.113.7"),
    ],
)
def test_refused_in_a_line(tiny, arguments, words, monkeypatch):
    monkeypatch.setattr(serve.backends.hardware, "has_cuda", lambda: False)
    with pytest.raises(UserError, match=words):
        serve.command(options(*(argument.format(tiny) for argument in arguments), *(
            [] if any("port" in argument for argument in arguments) else ["port=0"])))  # fmt: skip


def test_a_taken_port(tiny):
    with listening.bind("127.0.0.1", 0) as taken:
        with pytest.raises(UserError, match="Address already in use"):
            serve.command(options(f"model=hf:{tiny}", f"port={taken.getsockname()[1]}", "backend=embedded"))


def test_a_runs_export(tiny, tmp_path):
    with pytest.raises(UserError, match=f"convert.py from=nemo:{tmp_path} to=hf:"):
        serve.model_folder(str(tmp_path))
    (tmp_path / "hf").symlink_to(tiny)
    assert serve.model_folder(str(tmp_path)) == tmp_path / "hf"


def test_the_server_knows_no_torch():
    """Nothing of the HTTP side imports torch, and nothing of the engine HTTP."""
    code = "import sys, deploy.server, deploy.serve; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}).returncode == 0
    for file in (ROOT / "deploy" / "engine").glob("*.py"):
        text = file.read_text()
        assert not any(word in text for word in ("import fastapi", "import httpx", "starlette", "uvicorn", "from deploy.server"))


@pytest.fixture(scope="module")
def process(tiny, tmp_path_factory):
    """`python deploy/serve.py` over the random model, and its address."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with open(log, "w") as out:
        command = [sys.executable, "deploy/serve.py", f"model=hf:{tiny}", "port=0", "backend=embedded", "rows=4", "drain=20",
                   "draft=ngram"]  # fmt: skip
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "http://" not in (text := log.read_text()):
            assert child.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.1)
        url = text[text.index("http://") :].split()[0]
        while True:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                assert time.monotonic() < deadline
            time.sleep(0.05)
        yield child, url
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def test_bench(process, tmp_path, capfd):
    _, url = process
    out = tmp_path / "bench"
    bench.command(parse(bench.Options, [f"url={url}", "clients=1,3", "requests=2", "max_tokens=12", f"out={out}"], ""))
    levels = json.loads((out / "bench.json").read_text())["servers"][url]
    assert [level["clients"] for level in levels] == [1, 3] and [level["requests"] for level in levels] == [2, 6]
    for level in levels:
        assert level["failed"] == 0
        assert level["tokens_per_second"] == pytest.approx(12 * level["requests"] / level["seconds"])
        first, whole = level["time_to_first_token"], level["request"]
        assert 0 < first["p50"] <= first["p95"] <= first["p99"] <= whole["p99"] <= level["seconds"]
    assert (out / "bench.png").stat().st_size > 10_000
    table = (out / "report.md").read_text()
    assert "llm_builder_accepted_draft_tokens_total" in httpx.get(f"{url}/metrics").text
    assert f"## {url}" in table and table in capfd.readouterr().out
    with pytest.raises(RunError, match="no request of 1 clients was answered: status 404"):
        load.run(url, load.Load("other", ["x"], 4, 2), [1])
    with pytest.raises(UserError, match="no server answers"):
        load.find_model("http://127.0.0.1:9", None)


def test_percentiles_by_hand():
    assert load.percentiles([1.0, 2.0, 3.0]) == {"p50": 2.0, "p95": pytest.approx(2.9), "p99": pytest.approx(2.98)}
    level = load.Level(2, 4.0, [load.Timing(0.5, [0.1, 0.3], 1.0, 8), load.Timing(error="late")]).summary()
    assert level["tokens_per_second"] == 2.0 and level["failed"] == 1 and level["error"] == "late"
    assert level["inter_token"]["p50"] == pytest.approx(0.2) and level["requests_per_second"] == 0.25


def test_sigterm_drains(process):
    """Last: what runs ends whole, the process by itself."""
    child, url = process
    answers: list[str] = []
    body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}

    def client() -> None:
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).text)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    while "llm_builder_batch 4.0" not in httpx.get(f"{url}/metrics").text:
        if answers:
            break
    child.send_signal(signal.SIGTERM)
    for thread in clients:
        thread.join()
    assert len(answers) == 4 and all(answer.endswith("data: [DONE]\n\n") for answer in answers)
    assert child.wait(30) == 0
