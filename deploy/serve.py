"""Serves a model over an OpenAI-compatible HTTP API.

python deploy/serve.py model=hf:FOLDER
python deploy/serve.py model=runs/my_run adapters=polite=lora/polite,terse=lora/terse api_keys=keys.txt

The best installed backend answers: TensorRT-LLM's trtllm-serve, vLLM, else the engine of deploy/engine on transformers, on a CPU
or a GPU. Exit codes: 0 stopped by a signal after running requests ended, 1 failed, 2 bad input.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from conversion import hub_cache
from deploy import backends
from nemo_ext import run_folder
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.errors import UserError
from nemo_ext.platform import hardware

DTYPES = ("float32", "bfloat16", "float16")
MIB = 1 << 20


@dataclass
class Options:
    """The command's keys."""

    model: str = key(NO_DEFAULT, "hf:FOLDER, hf:NAME (in Hugging Face's local cache), or a run's folder with its export hf/")
    backend: str = key("auto", "who answers", choices=("auto", *backends.BACKENDS, "embedded"))
    name: str | None = key(None, "what clients call the model", auto="the folder's name")
    adapters: str | None = key(
        None, "LoRA adapters, PEFT folders: NAME=FOLDER,NAME=FOLDER; clients name them as model", auto="none"
    )
    host: str = key("127.0.0.1", "the address to listen on; 0.0.0.0 is all of them", group="network")
    port: int = key(8000, "the port; 0 takes a free one")
    api_keys: str | None = key(None, "a file with a key a line; clients send one as bearer", auto="everybody is let in")
    dtype: str | None = key(
        None, "dtype of the weights", choices=DTYPES, auto="float32 on a CPU, the checkpoint's on a GPU", group="model"
    )
    context: int | None = key(None, "most tokens of prompt and answer", auto="the model's, embedded at most 4096")
    rows: int | None = key(None, "sequences that run together", auto="embedded 16, else the backend's")
    prefill_tokens: int | None = key(None, "tokens of prompts read in a step", auto="embedded 512, else the backend's")
    tp: int = key(1, "tensor parallel size; not embedded")
    pp: int = key(1, "pipeline parallel size; not embedded")
    gpu_memory: float | None = key(None, "share of the GPU's memory (vLLM: all; TensorRT-LLM: of what is left, for the cache); "
                                   "not embedded", auto="the backend's")  # fmt: skip
    queue: int = key(64, "requests that may wait; more are answered 429", group="limits (embedded)")
    max_tokens: int = key(4096, "new tokens of an answer")
    max_body: float = key(2.0, "size of a request", unit="MiB")
    body_timeout: float = key(30.0, "for a client to send its request", unit="s")
    timeout: float = key(600.0, "for a request, from its arrival to its last token", unit="s")
    drain: float = key(60.0, "that running requests get after SIGTERM", unit="s")
    connections: int = key(1024, "open connections; more are answered 503")


def command(options: Options) -> None:
    """Serve until a signal, or become the backend that serves."""
    folder, adapters = model_folder(options.model), adapter_folders(options.adapters)
    name = options.name or folder.resolve().name
    if name in adapters:
        raise UserError(f"adapters: {name} is the model's own name")
    check(options)
    backend = backends.choose(options.backend)
    if backend is None:
        embedded(options, folder, adapters, name)
        return
    launch = backends.launch(
        backend,
        backends.Wanted(
            model=folder,
            name=name,
            adapters=adapters,
            host=options.host,
            port=options.port,
            dtype=options.dtype,
            context=options.context,
            rows=options.rows,
            prefill_tokens=options.prefill_tokens,
            tp=options.tp,
            pp=options.pp,
            gpu_memory=options.gpu_memory,
            api_keys=Path(options.api_keys) if options.api_keys else None,
        ),
    )
    changed = [f for f in ("queue", "max_tokens", "max_body", "body_timeout", "timeout", "drain", "connections")
               if getattr(options, f) != getattr(Options, f)]  # fmt: skip
    if changed:
        raise UserError(f"{changed[0]}= is the embedded backend's: {backend.program} has no such limit")
    print(f"{backend.program} {backend.version}: {launch.text}", flush=True)
    os.execvpe(launch.arguments[0], launch.arguments, {**os.environ, **launch.environment})


def embedded(options: Options, folder: Path, adapters: dict[str, Path], name: str) -> None:
    """Serve by deploy/engine."""
    from deploy.limits import Keys, Limits, read_keys
    from deploy.server import Service, run

    for word, value in (("tp", options.tp != 1), ("pp", options.pp != 1), ("gpu_memory", options.gpu_memory is not None)):
        if value:
            raise UserError(f"{word}= is for TensorRT-LLM and vLLM; the embedded backend runs on one device")
    keys = Keys(read_keys(Path(options.api_keys))) if options.api_keys else None
    listener = bind(options.host, options.port)
    try:
        if not hardware.has_cuda():
            from nemo_ext.platform import cpu_torch

            cpu_torch.declare_torchvision_ops()  # transformers imports torchvision
        from deploy.engine.engine import Engine

        engine = Engine(
            folder,
            rows=options.rows or 16,
            prefill_tokens=options.prefill_tokens or 512,
            max_waiting=options.queue,
            context=options.context,
            dtype=options.dtype,
            adapters=adapters,
        )
        limits = Limits(
            body_bytes=int(options.max_body * MIB),
            body_seconds=options.body_timeout,
            request_seconds=options.timeout,
            max_tokens=options.max_tokens,
            drain_seconds=options.drain,
            connections=options.connections,
        )
        port = listener.getsockname()[1]
        print(f"{name} on {engine.network.device}, {engine.rows} rows of {engine.context:,} tokens: http://{options.host}:{port}",
              flush=True)  # fmt: skip
        try:
            run(Service(engine, name, limits), keys, [listener], options.host, port)
        finally:
            engine.close()
    finally:
        listener.close()


def model_folder(text: str) -> Path:
    """The Hugging Face folder that `model=` names. Raises UserError."""
    kind, _, place = text.partition(":")
    if kind == "hf":
        folder = Path(place)
        found = folder if folder.is_dir() else hub_cache.find(place)
        if found is None:
            raise UserError(f"model={text}: there is no such folder, nor such a model in Hugging Face's local cache")
        if not (found / "config.json").is_file():
            raise UserError(f"model={text}: {found} has no config.json: it is no Hugging Face folder")
        return found
    folder = Path(text)
    if not folder.is_dir():
        raise UserError(f"model={text}: there is no such folder; hf:FOLDER names a Hugging Face folder")
    if (folder / run_folder.EXPORT / "config.json").is_file():
        return folder / run_folder.EXPORT
    if (folder / "config.json").is_file():
        raise UserError(f"model={text} is no run: for a Hugging Face folder say model=hf:{text}")
    export = folder / run_folder.EXPORT
    raise UserError(f"model={text} has no {run_folder.EXPORT}/: python conversion/convert.py from=nemo:{text} to=hf:{export}")


def adapter_folders(text: str | None) -> dict[str, Path]:
    """The PEFT folders that `adapters=` names, by name. Raises UserError."""
    found: dict[str, Path] = {}
    for part in text.split(",") if text else ():
        name, separator, folder = part.partition("=")
        if not separator or not name or not folder:
            raise UserError(f"adapters={text}: {part!r} is not NAME=FOLDER")
        if name in found:
            raise UserError(f"adapters={text}: {name} is there twice")
        if not (Path(folder) / "adapter_config.json").is_file():
            raise UserError(f"adapters={text}: {folder} has no adapter_config.json: it is no PEFT folder")
        found[name] = Path(folder)
    return found


def check(options: Options) -> None:
    """Raises UserError for numbers that no server can have."""
    for name in ("rows", "prefill_tokens", "context", "tp", "pp", "queue", "max_tokens", "connections"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"{name}={value} must be 1 or more")
    for name in ("max_body", "body_timeout", "timeout"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"{name}={getattr(options, name)} must be above 0")
    if not 0 <= options.drain < float("inf"):
        raise UserError(f"drain={options.drain} must be 0 or more")
    if options.gpu_memory is not None and not 0 < options.gpu_memory <= 1:
        raise UserError(f"gpu_memory={options.gpu_memory} must be above 0 and at most 1")
    if not 0 <= options.port < 65536:
        raise UserError(f"port={options.port} must be 0 to 65535")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the port is taken or the address is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"host={host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"host={host} port={port}: {error.strerror}: another port=, or stop what listens there") from None
    return listener


if __name__ == "__main__":
    sys.exit(main(Options, command, sys.argv[1:], about=__doc__, example="python deploy/serve.py model=hf:FOLDER"))
