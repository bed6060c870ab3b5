"""The embedded server against `transformers.generate` behind a plain FastAPI, at 1, 4 and 16 clients.

    python benchmarks/serve.py model=FOLDER [clients=1,4,16] [requests=3] [max_tokens=64] [out=benchmarks/results/serve.json]

Both servers are processes of their own, started in turn on the same cores, with the same weights in float32, and answer the same
streamed requests, measured by deploy/load.py. The plain one is what one writes first: an endpoint that calls `model.generate`
under a lock, since several at once only wait for the same cores, and sends the answer whole. Each level is measured on both
before the next. The run fails if the servers' answers to one greedy request differ.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deploy import load  # noqa: E402

PROMPTS = (
    "Tell me what a library is for, in plain words and at some length.",
    "Why does the sea look blue on some days and grey on others?",
    "Describe how bread is made, step by step.",
    "What should a person know before learning to sail?",
)
START_SECONDS = 180.0


def plain(model_folder: str, port: int) -> None:
    """Serve `model.generate` behind FastAPI."""
    from nemo_ext.platform import cpu_torch, hardware

    if not hardware.has_cuda():
        cpu_torch.declare_torchvision_ops()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if hardware.has_cuda() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval().to(device)
    app, lock = FastAPI(), threading.Lock()

    def answer(body: dict) -> str:
        ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_tensors="pt").to(device)
        with lock, torch.inference_mode():
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=body["max_tokens"], do_sample=False,
                min_new_tokens=body["max_tokens"] if body.get("ignore_eos") else None, pad_token_id=0,
            )[0, ids.shape[1] :]  # fmt: skip
        text = tokenizer.decode(new, skip_special_tokens=True)
        usage = {"choices": [], "usage": {"completion_tokens": len(new)}}
        events = [{"choices": [{"index": 0, "delta": {"content": text}}]}, usage]
        return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    @app.get("/ready")
    def ready() -> dict:
        return {}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> PlainTextResponse:
        return PlainTextResponse(await asyncio.to_thread(answer, await request.json()), media_type="text/event-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def free_port() -> int:
    """A port of the loopback that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(command: list[str], port: int, log: Path) -> tuple[subprocess.Popen, str]:
    """Start a server and wait until it is ready; return it and its address."""
    with open(log, "w") as out:
        server = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return server, url
        except httpx.HTTPError:
            time.sleep(0.2)
    server.kill()
    raise SystemExit(f"{command[0]} did not start: {log.read_text()[-500:]}")


def text(url: str, asked: load.Load) -> str:
    """The whole answer to the first request."""
    found = ""
    for line in httpx.post(f"{url}{asked.path}", json=asked.body(0), timeout=600).text.splitlines():
        if line.startswith("data: {"):
            found += "".join((choice["delta"].get("content") or "") for choice in json.loads(line[6:])["choices"])
    return found


def main() -> None:
    """Measure both servers and write the figures."""
    if sys.argv[1:2] == ["plain"]:
        plain(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*")
    given = dict(each.split("=", 1) for each in parser.parse_args().settings)
    folder, out = given["model"], Path(given.get("out", ROOT / "benchmarks" / "results" / "serve.json"))
    clients = [int(each) for each in given.get("clients", "1,4,16").split(",")]
    requests, max_tokens = int(given.get("requests", 3)), int(given.get("max_tokens", 64))
    load_before = os.getloadavg()
    servers, results = {}, {"embedded": [], "plain": []}
    with tempfile.TemporaryDirectory() as logs:
        try:
            port = free_port()
            line = ["deploy/serve.py", f"model=hf:{folder}", "name=model", f"port={port}", "backend=embedded", "dtype=float32"]
            servers["embedded"] = start([*line, "context=1024"], port, Path(logs) / "embedded")
            port = free_port()
            servers["plain"] = start(["benchmarks/serve.py", "plain", folder, str(port)], port, Path(logs) / "plain")
            once = load.Load("model", PROMPTS, 24, 1)
            answers = {name: text(url, once) for name, (_, url) in servers.items()}
            if answers["embedded"] != answers["plain"]:
                raise SystemExit(f"the servers answer differently: {answers}")
            for number in clients:
                asked = load.Load("model", PROMPTS, max_tokens, number * requests, ignore_eos=True)
                for name, (_, url) in servers.items():
                    results[name] += load.run(url, asked, [number])
                    print(f"{name:>8}, {number:>2} clients: {results[name][-1]['tokens_per_second']:.1f} tokens/s", flush=True)
        finally:
            for server, _ in servers.values():
                server.terminate()
                server.wait()
    times = {
        str(a["clients"]): a["tokens_per_second"] / b["tokens_per_second"]
        for a, b in zip(results["embedded"], results["plain"], strict=True)
    }
    print("times the plain server's tokens/s:", ", ".join(f"{number} clients {value:.2f}" for number, value in times.items()))
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)),
                    "load_before": load_before, "load_after": os.getloadavg()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "fastapi", "uvicorn")},
        "model": Path(folder).name, "dtype": "float32", "max_tokens": max_tokens, "requests_per_client": requests,
        "throughput_ratio": times, **results,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
