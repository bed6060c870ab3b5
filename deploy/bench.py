"""Measures a running OpenAI-compatible server as its users feel it, at rising numbers of clients.

python deploy/bench.py url=http://127.0.0.1:8000
python deploy/bench.py url=http://127.0.0.1:8000 against=http://127.0.0.1:8001 clients=1,4,16 out=bench

Time to first token, time between tokens and throughput, with percentiles, as a table, JSON and plots. Exit codes: 0 measured, 1 a
server answered nothing, 2 bad input.
"""

from __future__ import annotations

import datetime
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from deploy import load
from nemo_ext import run_folder
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.disk import held, write_atomic
from nemo_ext.errors import UserError
from nemo_ext.progress import bar

PROMPT = "Tell me, in plain words and at some length, what a library is for and how it changed over the centuries."
RESULT = "bench.json"
REPORT = "report.md"
PLOT = "bench.png"


@dataclass
class Options:
    """The command's keys."""

    url: str = key(NO_DEFAULT, "the server, without /v1")
    against: str | None = key(None, "another server, measured in the same run, level by level in turn", auto="none")
    model: str | None = key(None, "the model to ask for", auto="the first that the server lists")
    clients: str = key("1,2,4,8,16", "numbers of clients at a time", group="load")
    requests: int = key(4, "requests of each client")
    max_tokens: int = key(64, "tokens of an answer")
    ignore_eos: bool = key(True, "answers of the full length; a server that does not know this needs false")
    chat: bool = key(True, "chat completions; false: completions")
    prompts: str | None = key(None, "a file with a prompt a line", auto="one prompt")
    api_key: str | None = key(None, "a file with the key in its first line", auto="none")
    timeout: float = key(600.0, "for an answer", unit="s")
    out: str = key("bench", "folder of the results")


def command(options: Options) -> None:
    """Measure, print a table, write the results."""
    levels = parse_levels(options.clients)
    for name in ("requests", "max_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be 1 or more")
    prompts = read_lines("prompts", options.prompts) if options.prompts else [PROMPT]
    secret = read_lines("api_key", options.api_key)[0] if options.api_key else None
    urls = [options.url.rstrip("/"), *([options.against.rstrip("/")] if options.against else [])]
    models = [options.model or load.find_model(url, secret) for url in urls]
    results: dict[str, list[dict]] = {url: [] for url in urls}
    if len(results) < len(urls):
        raise UserError("against= is url= itself")
    with held(Path(options.out)):
        total = sum(levels) * options.requests * len(urls)
        with bar("measuring", total, "requests") as progress:
            for clients in levels:
                for url, model in zip(urls, models, strict=True):
                    asked = load.Load(model, prompts, options.max_tokens, clients * options.requests, options.chat,
                                      options.ignore_eos, secret, options.timeout)  # fmt: skip
                    results[url] += load.run(url, asked, [clients])
                    progress.advance(asked.requests)
        write(Path(options.out), options, results)
    print((Path(options.out) / REPORT).read_text())


def parse_levels(text: str) -> list[int]:
    """`1,4,16` as numbers. Raises UserError."""
    try:
        levels = [int(part) for part in str(text).split(",")]
    except ValueError:
        raise UserError(f"clients={text} must be whole numbers with commas between them") from None
    if any(level < 1 for level in levels):
        raise UserError(f"clients={text} must be 1 or more")
    return levels


def read_lines(name: str, file: str) -> list[str]:
    """The lines of a file that are not empty. Raises UserError."""
    try:
        lines = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}={file} cannot be read: {getattr(error, 'strerror', None) or 'not text'}") from None
    if not lines:
        raise UserError(f"{name}={file} is empty")
    return lines


def write(out: Path, options: Options, results: dict[str, list[dict]]) -> None:
    """bench.json, report.md and bench.png."""
    run_folder.write_json(
        out / RESULT,
        {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "requests_per_client": options.requests,
            "max_tokens": options.max_tokens,
            "servers": results,
        },
    )
    write_atomic(out / REPORT, report(results))
    plot(out / PLOT, results)


def report(results: dict[str, list[dict]]) -> str:
    """A table of each server, and how many times the first one's throughput the second's is."""
    percentiles = " / ".join(f"p{p}" for p in load.PERCENTILES)
    head = f"| clients | tokens/s | first token {percentiles} (ms) | between tokens {percentiles} (ms) | failed |"
    lines = []
    for url, levels in results.items():
        lines += [f"## {url}", "", head, "|---:|---:|---:|---:|---:|"]
        for level in levels:
            first, gaps = (_milliseconds(level[name]) for name in ("time_to_first_token", "inter_token"))
            lines.append(f"| {level['clients']} | {level['tokens_per_second']:.1f} | {first} | {gaps} | {level['failed']} |")
        lines.append("")
    if len(results) == 2:
        one, other = results.values()
        for a, b in zip(one, other, strict=True):
            if b["tokens_per_second"]:
                times = a["tokens_per_second"] / b["tokens_per_second"]
                lines.append(f"- {a['clients']} clients: the first server gives {times:.2f} times the second's tokens/s")
    return "\n".join(lines).rstrip() + "\n"


def plot(file: Path, results: dict[str, list[dict]]) -> None:
    """Throughput, time to first token and time between tokens over the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    throughput, first, between = figure.subplots(1, 3)
    for url, levels in results.items():
        clients = [level["clients"] for level in levels]
        throughput.plot(clients, [level["tokens_per_second"] for level in levels], marker="o", label=url)
        for axes, name in ((first, "time_to_first_token"), (between, "inter_token")):
            for percentile, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
                values = [1e3 * (level[name][percentile] or float("nan")) for level in levels]
                axes.plot(clients, values, style, marker="o", label=f"{url} {percentile}")
    for axes, title in ((throughput, "tokens/s"), (first, "time to first token, ms"), (between, "between tokens, ms")):
        axes.set(title=title, xlabel="clients", xscale="log", ylim=(0, None))
        axes.set_xticks(clients, [str(number) for number in clients])
        axes.minorticks_off()
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def _milliseconds(values: dict[str, float | None]) -> str:
    return " / ".join("-" if value is None else f"{1e3 * value:.0f}" for value in values.values())


if __name__ == "__main__":
    sys.exit(main(Options, command, sys.argv[1:], about=__doc__, example="python deploy/bench.py url=http://127.0.0.1:8000"))
