"""The embedded server against `transformers.generate` behind a plain FastAPI, at 1, 4 and 16 clients; and beside its own float32:
bfloat16, INT8 and INT4 weights, and drafts by prompt lookup.

    python benchmarks/serve.py model=FOLDER [int8=FOLDER] [int4=FOLDER] [clients=1,4,16] [rounds=3] [max_tokens=48]
                               [threads=N] [out=benchmarks/results/serve.json]

All servers are processes of their own on the same cores and answer the same streamed requests, measured by deploy/load.py. The
plain one is what one writes first: an endpoint that calls `model.generate` under a lock, since several at once only wait for the
same cores, and sends the answer whole. A level is measured in short rounds, in which the servers take turns and begin in another
order each time, so that other load on the machine meets all alike; tokens a second are those of all rounds together, and each
round's are written beside them. The run fails if servers with the same weights answer one greedy request differently.

`threads` is what OpenMP may use in each server, by default a thread a core. On a machine that does other work at the same time
say threads=1: two threads that wait for each other at every operation wait for the other work as well.

INT8 and INT4 are folders of conversion/quantize.py (compressed-tensors), which transformers computes on a CPU by writing the
weights out again: they save memory and disk there, not time.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from benchmarks.prompts import QUESTIONS  # noqa: E402
from deploy import load  # noqa: E402

PROMPTS = QUESTIONS[:4]
COPY = (  # what drafts by prompt lookup are for
    "Repeat the following text word for word. The library opens at nine in the morning and closes at six in the evening, except "
    "on Sundays, when it opens at noon. Books may be kept for three weeks.",
)
COPYING = "1, copying"
BUSY = "other work ran on the machine (see load): ratios, taken in turns, say more than tokens a second"
START_SECONDS = 600.0
FEW = 4  # clients, at most, that the weights in fewer bits and the drafts are measured with


@dataclass
class Server:
    """A process, and what was measured of it by number of clients (and task)."""

    name: str
    folder: str
    keys: tuple[str, ...] | None  # of deploy/serve.py; None: the plain server
    url: str = ""
    process: subprocess.Popen | None = None
    log: Path | None = None
    rounds: dict[str, list[load.Level]] = field(default_factory=dict)

    def start(self, logs: Path, threads: int) -> None:
        """Start the process."""
        port = free_port()
        line = ["benchmarks/serve.py", "plain", self.folder, str(port)]
        if self.keys is not None:
            line = ["deploy/serve.py", f"model=hf:{self.folder}", "name=model", f"port={port}", "context=1024", *self.keys]
        self.url, self.log = f"http://127.0.0.1:{port}", logs / self.name
        with open(self.log, "w") as out:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, *line]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)

    def wait(self) -> None:
        """Until it is ready."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise SystemExit(f"{self.name} did not start: {self.log.read_text()[-500:]}")

    def text(self, asked: load.Load) -> str:
        """The whole answer to the first request."""
        found = ""
        for line in httpx.post(f"{self.url}{asked.path}", json=asked.body(0), timeout=600).text.splitlines():
            if line.startswith("data: {"):
                found += "".join((choice["delta"].get("content") or "") for choice in json.loads(line[6:])["choices"])
        return found

    def measure(self, asked: load.Load, clients: int, label: str) -> None:
        """One round of what is called `label`."""
        level = asyncio.run(load.measure(self.url, asked, clients))
        if errors := [timing.error for timing in level.timings if timing.error]:
            raise SystemExit(f"{self.name}: {errors[0]}")
        self.rounds.setdefault(label, []).append(level)

    def figures(self) -> list[dict]:
        """All rounds of each level together, and the tokens a second of each."""
        found = []
        for label, rounds in self.rounds.items():
            timings = [timing for level in rounds for timing in level.timings]
            whole = load.Level(rounds[0].clients, sum(level.seconds for level in rounds), timings).summary()
            found.append({"load": label, **whole, "rounds": [level.summary()["tokens_per_second"] for level in rounds]})
        return found

    def megabytes(self) -> dict[str, float]:
        """Of its weights on disk and of the process."""
        import psutil

        size = sum(file.stat().st_size for file in Path(self.folder).glob("*.safetensors"))
        return {"disk": size / 1e6, "resident": psutil.Process(self.process.pid).memory_info().rss / 1e6}

    def guesses(self) -> dict[str, float]:
        """What became of its drafts."""
        metrics = httpx.get(f"{self.url}/metrics").text
        drawn, held = (float(re.search(rf"^llm_builder_{each}_total (\S+)", metrics, re.M)[1])
                       for each in ("draft_tokens", "accepted_draft_tokens"))  # fmt: skip
        return {"draft_tokens": drawn, "accepted": held, "acceptance_rate": held / drawn if drawn else 0.0}

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


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


def servers_of(given: dict[str, str]) -> list[Server]:
    """What is compared."""
    model, float32 = given["model"], ("backend=embedded", "dtype=float32")
    found = [
        Server("embedded", model, float32),
        Server("plain", model, None),
        Server("bfloat16", model, ("backend=embedded", "dtype=bfloat16")),
    ]
    found += [Server(name, given[name], ("backend=embedded",)) for name in ("int8", "int4") if name in given]
    return [*found, Server("ngram", model, (*float32, "draft=ngram"))]


def measure(servers: list[Server], clients: list[int], rounds: int, max_tokens: int) -> None:
    """All rounds of all levels."""
    for number in clients:
        turn = [server for server in servers if number <= FEW or server.name in ("embedded", "plain")]
        take_turns(turn, load.Load("model", PROMPTS, max_tokens, number, ignore_eos=True), number, str(number), rounds)
    take_turns([servers[0], servers[-1]], load.Load("model", COPY, 2 * max_tokens, 1), 1, COPYING, rounds)


def take_turns(servers: list[Server], asked: load.Load, clients: int, label: str, rounds: int) -> None:
    """Short rounds, begun by another server each time."""
    for number in range(rounds):
        servers = [*servers[1:], servers[0]]
        for server in servers:
            server.measure(asked, clients, label)
            speed = server.rounds[label][-1].summary()["tokens_per_second"]
            print(f"clients {label}, round {number + 1}, {server.name:>8}: {speed:.1f} tokens/s", flush=True)


def main() -> None:
    """Measure and write the figures."""
    if sys.argv[1:2] == ["plain"]:
        plain(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*")
    given = dict(each.split("=", 1) for each in parser.parse_args().settings)
    out = Path(given.get("out", ROOT / "benchmarks" / "results" / "serve.json"))
    clients = [int(each) for each in given.get("clients", "1,4,16").split(",")]
    rounds, max_tokens = int(given.get("rounds", 3)), int(given.get("max_tokens", 48))
    cores = len(os.sched_getaffinity(0))
    threads = int(given.get("threads", cores))
    load_before, servers = os.getloadavg(), servers_of(given)
    with tempfile.TemporaryDirectory() as logs:
        try:
            for server in servers:
                server.start(Path(logs), threads)
            for server in servers:
                server.wait()
            once = load.Load("model", PROMPTS, 24, 1)
            answers = {server.name: server.text(once) for server in servers}
            if len({answers[name] for name in ("embedded", "plain", "ngram")}) > 1:
                raise SystemExit(f"the servers answer differently: {answers}")
            measure(servers, clients, rounds, max_tokens)
            sizes, guesses = {server.name: server.megabytes() for server in servers}, servers[-1].guesses()
        finally:
            for server in servers:
                server.stop()
    results = {server.name: server.figures() for server in servers}
    speeds = {name: {level["load"]: level["tokens_per_second"] for level in levels} for name, levels in results.items()}

    def times(name: str, other: str) -> dict[str, float]:
        return {label: speed / speeds[other][label] for label, speed in speeds[name].items() if label in speeds[other]}

    ratios = {
        "embedded/plain": times("embedded", "plain"),
        "ngram/embedded": times("ngram", "embedded"),
        **{f"{name}/bfloat16": times(name, "bfloat16") for name in ("int8", "int4") if name in speeds},
    }
    for name, values in ratios.items():
        print(f"{name}: " + "; ".join(f"{label}: {value:.2f}" for label, value in values.items()))
    load_after = os.getloadavg()
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": cores,
                    "load_before": load_before, "load_after": load_after},
        "caveat": None if load_before[0] < 0.5 * cores else BUSY,
        "versions": machine.versions(("torch", "transformers", "fastapi", "uvicorn")),
        "model": Path(given["model"]).name, "threads": threads, "max_tokens": max_tokens, "rounds": rounds,
        "ratios": ratios, "megabytes": sizes, "drafts": guesses, "servers": results,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
