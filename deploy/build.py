"""Builds TensorRT-LLM engines from a TensorRT-LLM checkpoint: writes and runs the `trtllm-build` line of the installed version.

python deploy/build.py checkpoint=FOLDER out=FOLDER rows=64 context=8192

Without TensorRT-LLM the line is printed, to be run in its container. TensorRT-LLM after 1.2.1 has no engine builder: it serves a
checkpoint itself. Exit codes: 0 built, 1 the builder failed, 2 bad input, or no builder here.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from packaging.version import Version

from deploy import trtllm_folder
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.errors import RunError, UserError

PROGRAM = "trtllm-build"
PRINTED = "1.2.1"  # the version whose line is printed where none is installed
# Our key: its option, from a version on, after each version's command-line reference; None: this version has no builder.
_BUILDER = {
    "rows": "--max_batch_size", "prompt": "--max_input_len", "context": "--max_seq_len", "prefill_tokens": "--max_num_tokens",
    "beams": "--max_beam_width", "cache": "--kv_cache_type", "gemm": "--gemm_plugin", "context_fmha": "--use_paged_context_fmha",
    "workers": "--workers", "log": "--log_level",
}  # fmt: skip
OPTIONS: tuple[tuple[str, Mapping[str, str] | None], ...] = (("0.18", _BUILDER), ("1.3.0rc0", None))


@dataclass
class Options:
    """The command's keys."""

    checkpoint: str = key(NO_DEFAULT, "a TensorRT-LLM checkpoint: config.json and rank*.safetensors")
    out: str = key(NO_DEFAULT, "folder of the engines; must not exist, or be empty")
    tp: int | None = key(None, "tensor parallel size", auto="the checkpoint's, which it must be", group="layout")
    pp: int | None = key(None, "pipeline parallel size", auto="the checkpoint's, which it must be")
    rows: int | None = key(None, "sequences that run together", auto="the builder's", group="shape")
    context: int | None = key(None, "most tokens of prompt and answer", auto="the model's")
    prompt: int | None = key(None, "most tokens of a prompt", auto="the builder's")
    prefill_tokens: int | None = key(None, "tokens of a step, padding removed", auto="the builder's")
    beams: int | None = key(None, "most beams of a request", auto="the builder's")
    cache: str | None = key(None, "how keys and values lie", choices=("continuous", "paged", "disabled"), auto="the builder's")
    gemm: str | None = key(
        None, "cuBLAS in a plugin", choices=("auto", "float16", "bfloat16", "float32", "int32", "fp8", "nvfp4", "disable"),
        auto="the builder's", group="build",
    )  # fmt: skip
    context_fmha: str | None = key(
        None, "attention of prompts over a paged cache", choices=("enable", "disable"), auto="the builder's"
    )
    workers: int | None = key(None, "engines built at a time, a GPU each", auto="one an engine")
    log: str | None = key(None, "the builder's log level", auto="the builder's")


def command(options: Options) -> None:
    """Build, or print the line."""
    checkpoint, out = Path(options.checkpoint), Path(options.out)
    config = read_checkpoint(checkpoint)
    check(options, config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not an empty folder")
    version = installed()
    arguments = line(options, config, version or PRINTED)
    text = shlex.join(arguments)
    if version is None:
        print(text)
        raise UserError(f"TensorRT-LLM is not installed here: run the line above, for {PRINTED}, in its container")
    if shutil.which(PROGRAM) is None:
        raise UserError(f"TensorRT-LLM {version} is installed without its program {PROGRAM}: is its bin folder in PATH?")
    print(text, flush=True)
    if code := subprocess.run(arguments).returncode:
        raise RunError(f"{PROGRAM} ended with exit code {code}: its last lines say why")


def line(options: Options, config: dict[str, Any], version: str) -> list[str]:
    """The command line for a version. Raises UserError for versions that have no builder or are not known."""
    known = [flags for since, flags in OPTIONS if Version(version) >= Version(since)]
    if not known:
        raise UserError(f"TensorRT-LLM {version} is older than {OPTIONS[0][0]}, the oldest that is known here")
    flags = known[-1]
    if flags is None:
        raise UserError(
            f"TensorRT-LLM {version} has no engine builder: serve a Hugging Face checkpoint with "
            "python deploy/serve.py model=hf:FOLDER backend=trtllm"
        )
    ranks = trtllm_folder.ranks(config)
    arguments = [PROGRAM, "--checkpoint_dir", options.checkpoint, "--output_dir", options.out]
    for name, option in flags.items():
        value = getattr(options, name)
        if name == "workers" and value is None and ranks > 1:
            value = ranks
        if value is not None:
            arguments += [option, str(value)]
    return arguments


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """config.json of a TensorRT-LLM checkpoint. Raises UserError for anything else, and for missing ranks."""
    return trtllm_folder.read(
        "checkpoint", folder, "rank{rank}.safetensors", lambda config: config if "architecture" in config else None,
        "is no TensorRT-LLM checkpoint",
    )  # fmt: skip


def check(options: Options, config: dict[str, Any]) -> None:
    """Raises UserError for sizes that no engine has, and for a layout other than the checkpoint's."""
    for name in ("rows", "context", "prompt", "prefill_tokens", "beams", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"{name}={value} must be 1 or more")
    if options.prompt and options.context and options.prompt > options.context:
        raise UserError(f"prompt={options.prompt} is more than context={options.context}")
    for name in ("tp", "pp"):
        wanted, found = getattr(options, name), config.get("mapping", {}).get(f"{name}_size", 1)
        if wanted is not None and wanted != found:
            raise UserError(f"{name}={wanted}, but the checkpoint was split for {name}={found}: split it again")


def installed() -> str | None:
    """The version of TensorRT-LLM here."""
    try:
        return importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(Options, command, sys.argv[1:], about=__doc__, example="python deploy/build.py checkpoint=FOLDER out=FOLDER"))
