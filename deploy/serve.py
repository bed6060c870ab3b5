"""Serves a model over an OpenAI-compatible HTTP API.

python deploy/serve.py model=hf:FOLDER
python deploy/serve.py model=runs/my_run adapters=polite=lora/polite,terse=lora/terse api_keys=keys.txt

The best installed backend answers: TensorRT-LLM's trtllm-serve, vLLM, else the engine of deploy/engine on transformers, on a CPU
or a GPU. Exit codes: 0 stopped by a signal after running requests ended, 1 failed, 2 bad input.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from conversion import hub_cache
from deploy import backends
from deploy.limits import LIMITS, ListeningKeys
from nemo_ext import run_folder
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.errors import UserError
from nemo_ext.platform import hardware

DTYPES = ("float32", "bfloat16", "float16")
EMBEDDED = ("queue", "max_tokens", "draft", "draft_tokens", "image_pixels", *LIMITS)  # keys that no other backend has


@dataclass
class Own:
    """The command's keys beside those of the network."""

    model: str = key(NO_DEFAULT, "hf:FOLDER, hf:NAME (in Hugging Face's local cache), or a run's folder with its export hf/")
    backend: str = key("auto", "who answers", choices=("auto", *backends.BACKENDS, "embedded"))
    name: str | None = key(None, "what clients call the model", auto="the folder's name")
    adapters: str | None = key(
        None, "LoRA adapters, PEFT folders: NAME=FOLDER,NAME=FOLDER; clients name them as model", auto="none"
    )
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
    images: int | None = key(
        None, "images or sounds in a request, of a model that sees or hears; see max_body", auto="embedded 8, else the backend's"
    )
    queue: int = key(64, "requests that may wait; more are answered 429", group="embedded")
    max_tokens: int = key(4096, "new tokens of an answer")
    draft: str | None = key(
        None, "guesses tokens ahead: ngram, or hf:FOLDER of a smaller model with the same tokens", auto="none"
    )
    draft_tokens: int = key(4, "tokens guessed in a step")
    image_pixels: int = key(1 << 24, "pixels of an image")


@dataclass
class Options(ListeningKeys, Own):
    """The command's keys."""


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
            images=options.images,
            api_keys=Path(options.api_keys) if options.api_keys else None,
        ),
    )
    changed = [name for name in EMBEDDED if getattr(options, name) != getattr(Options, name)]
    if changed:
        raise UserError(f"{changed[0]}= is the embedded backend's: {backend.program} has no such key")
    print(f"{backend.program} {backend.version}: {launch.text}", flush=True)
    os.execvpe(launch.arguments[0], launch.arguments, {**os.environ, **launch.environment})


def embedded(options: Options, folder: Path, adapters: dict[str, Path], name: str) -> None:
    """Serve by deploy/engine."""
    from deploy.listening import allow_files, bind
    from deploy.server import Service, run

    for word, value in (("tp", options.tp != 1), ("pp", options.pp != 1), ("gpu_memory", options.gpu_memory is not None)):
        if value:
            raise UserError(f"{word}= is for TensorRT-LLM and vLLM; the embedded backend runs on one device")
    keys, draft = options.keys(), draft_folder(options.draft)
    allow_files(options.connections)
    listener = bind(options.host, options.port)
    try:
        if not hardware.has_cuda():
            from nemo_ext.platform import cpu_torch

            cpu_torch.declare_torchvision_ops()  # transformers imports torchvision
        from deploy.engine.engine import Engine
        from deploy.engine.media import MOST

        engine = Engine(
            folder,
            rows=options.rows or 16,
            prefill_tokens=options.prefill_tokens or 512,
            max_waiting=options.queue,
            context=options.context,
            dtype=options.dtype,
            adapters=adapters,
            draft=draft,
            draft_tokens=options.draft_tokens,
            images=options.images or MOST,
            image_pixels=options.image_pixels,
        )
        port = listener.getsockname()[1]
        print(f"{name} on {engine.network.device}, {engine.rows} rows of {engine.context:,} tokens: http://{options.host}:{port}",
              flush=True)  # fmt: skip
        try:
            run(Service(engine, name, options.limits(max_tokens=options.max_tokens)), keys, [listener])
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


def draft_folder(text: str | None) -> str | Path | None:
    """What `draft=` names, for the engine. Raises UserError."""
    if text in (None, "ngram"):
        return text
    if not text.startswith("hf:"):
        raise UserError(f"draft={text} is neither ngram nor hf:FOLDER")
    return model_folder(text)


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
    options.check_listening()
    for name in (*"rows prefill_tokens context tp pp images".split(), "queue", "max_tokens", "draft_tokens", "image_pixels"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"{name}={value} must be 1 or more")
    if options.gpu_memory is not None and not 0 < options.gpu_memory <= 1:
        raise UserError(f"gpu_memory={options.gpu_memory} must be above 0 and at most 1")


if __name__ == "__main__":
    sys.exit(main(Options, command, sys.argv[1:], about=__doc__, example="python deploy/serve.py model=hf:FOLDER"))
