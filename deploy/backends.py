"""Servers of other projects: the exact command line for the version that is installed. What they differ in is data.

After the command-line references of TensorRT-LLM 0.18 to 1.3 (`trtllm-serve`) and vLLM 0.6 to 0.25 (`vllm serve`).
"""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import Version

from nemo_ext.errors import UserError
from nemo_ext.platform import hardware

Flags = Mapping[str, str]  # our key: their option


@dataclass(frozen=True)
class Backend:
    """A server's package and program, and its options from each version on. A key without an option is refused."""

    name: str
    package: str
    program: str
    command: tuple[str, ...]  # before the model
    constant: tuple[str, ...]  # after it
    options: tuple[tuple[str, Flags], ...]  # (from this version on, options), the oldest first
    version: str = ""

    def flags(self) -> Flags:
        """The options of `version`. Raises UserError for versions older than the oldest known."""
        known = [flags for since, flags in self.options if Version(self.version) >= Version(since)]
        if not known:
            raise UserError(
                f"{self.package} {self.version} is older than {self.options[0][0]}, the oldest that backend={self.name} knows"
            )
        return known[-1]


_TRTLLM = {
    "host": "--host", "port": "--port", "tp": "--tp_size", "pp": "--pp_size", "context": "--max_seq_len",
    "rows": "--max_batch_size", "prefill_tokens": "--max_num_tokens", "gpu_memory": "--kv_cache_free_gpu_memory_fraction",
}  # fmt: skip
_VLLM = {
    "host": "--host", "port": "--port", "tp": "--tensor-parallel-size", "pp": "--pipeline-parallel-size", "dtype": "--dtype",
    "context": "--max-model-len", "rows": "--max-num-seqs", "prefill_tokens": "--max-num-batched-tokens",
    "gpu_memory": "--gpu-memory-utilization", "name": "--served-model-name", "adapters": "--lora-modules",
    "images": "--limit-mm-per-prompt",
}  # fmt: skip
BACKENDS = {
    "trtllm": Backend(
        "trtllm",
        "tensorrt_llm",
        "trtllm-serve",
        ("trtllm-serve",),
        ("--backend", "pytorch"),
        (("0.18", _TRTLLM), ("1.3.0rc0", {**_TRTLLM, "name": "--served_model_name"})),
    ),
    "vllm": Backend("vllm", "vllm", "vllm", ("vllm", "serve"), (), (("0.6", _VLLM),)),
}
VLLM_KEY = "VLLM_API_KEY"  # a key on the command line is seen by everybody on the machine
VLLM_JSON = Version("0.8.5")  # from here on its option for images takes JSON, before image=N
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be


@dataclass(frozen=True)
class Wanted:
    """What deploy/serve.py was asked for. None: the backend's own default."""

    model: Path
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    tp: int = 1
    pp: int = 1
    adapters: Mapping[str, Path] = field(default_factory=dict)
    dtype: str | None = None
    context: int | None = None
    rows: int | None = None
    prefill_tokens: int | None = None
    gpu_memory: float | None = None
    api_keys: Path | None = None
    images: int | None = None


@dataclass(frozen=True)
class Launch:
    """A command line, and what is added to its environment."""

    arguments: list[str]
    environment: dict[str, str]

    @property
    def text(self) -> str:
        """The command line as a shell takes it."""
        return shlex.join(self.arguments)


def choose(wanted: str) -> Backend | None:
    """The backend `wanted`; `auto`: the first that is installed, where there is a GPU. None: the embedded one.

    Raises UserError for one that is not installed.
    """
    if wanted == "embedded" or (wanted == "auto" and not hardware.has_cuda()):
        return None
    for name, backend in BACKENDS.items():
        if wanted not in ("auto", name):
            continue
        version = _installed(backend.package)
        if version is not None and shutil.which(backend.program):
            return Backend(**{**vars(backend), "version": version})
        if wanted == name:
            missing = backend.package if version is None else f"the program {backend.program}"
            raise UserError(f"backend={name}: {missing} is not installed here; backend=embedded serves without it")
    return None


def launch(backend: Backend, wanted: Wanted) -> Launch:
    """The backend's command line for `wanted`. Raises UserError for a key that this version has no option for."""
    flags = backend.flags()
    arguments = [*backend.command, str(wanted.model), *backend.constant]
    environment: dict[str, str] = {}
    for key in ("host", "port", "tp", "pp", "dtype", "context", "rows", "prefill_tokens", "gpu_memory", "images"):
        value = getattr(wanted, key)
        if value is None or (key in ("tp", "pp") and value == 1):
            continue
        if key not in flags:
            raise UserError(f"{key}= has no counterpart in {backend.program} {backend.version}")
        if key == "images":
            value = json.dumps({"image": value}) if Version(backend.version) >= VLLM_JSON else f"image={value}"
        arguments += [flags[key], str(value)]
    if "name" in flags:
        arguments += [flags["name"], wanted.name]
    elif wanted.name != wanted.model.resolve().name:
        raise UserError(f"name={wanted.name}: {backend.program} {backend.version} serves a model under its folder's name only")
    if wanted.adapters:
        if "adapters" not in flags:
            raise UserError(
                f"adapters= has no counterpart in {backend.program} {backend.version}: merge them, or backend=embedded"
            )
        arguments += _vllm_adapters(flags["adapters"], wanted.adapters)
    if wanted.api_keys is not None:
        environment = _vllm_key(backend, wanted.api_keys)
    return Launch(arguments, environment)


def _vllm_adapters(option: str, adapters: Mapping[str, Path]) -> list[str]:
    ranks = {}
    for name, folder in adapters.items():
        try:
            ranks[name] = int(json.loads((folder / "adapter_config.json").read_text())["r"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"adapters: {name}: {folder}/adapter_config.json has no rank r") from None
    highest = max(ranks, key=lambda name: ranks[name])
    rank = next((r for r in VLLM_RANKS if r >= ranks[highest]), None)
    if rank is None:
        raise UserError(f"adapters: {highest} has rank {ranks[highest]}; vLLM takes at most {VLLM_RANKS[-1]}")
    pairs = [f"{name}={folder}" for name, folder in adapters.items()]
    return ["--enable-lora", "--max-loras", str(len(pairs)), "--max-lora-rank", str(rank), option, *pairs]


def _vllm_key(backend: Backend, file: Path) -> dict[str, str]:
    from deploy.limits import read_keys

    if backend.name != "vllm":
        raise UserError(f"api_keys= has no counterpart in {backend.program} {backend.version}: put a proxy before it")
    keys = read_keys(file)
    if len(keys) > 1:
        raise UserError(f"api_keys={file}: {backend.program} takes one key from its environment, the file has {len(keys)}")
    return {VLLM_KEY: keys[0]}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
