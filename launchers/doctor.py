"""Prints what this machine has, and what of this project works on it. Needs nothing installed; changes nothing.

python launchers/doctor.py [--json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 12)
GIB = 1024**3

# Distribution: what needs it. nemo_ext/platform/versions.py says which versions.
PACKAGES = {
    "torch": "everything that trains",
    "nemo_toolkit": "recipes",
    "megatron-core": "recipes",
    "nemo_run": "recipes and launching",
    "lightning": "recipes",
    "transformers": "checkpoints from and to Hugging Face, tokenizers",
    "transformer_engine": "training on GPUs: fused layers, FP8, context parallelism",
    "apex": "optional, some fused GPU kernels",
    "flash-attn-4": "optional, attention=flash4",
    "nvidia-modelopt": "quantization, pruning, distillation",
    "tensorrt_llm": "TensorRT-LLM engines",
    "vllm": "serving with vLLM",
    "bitsandbytes": "QLoRA",
    "uvicorn": "serving, embedded server",
    "trl": "GRPO, embedded engine",
    "nemo_rl": "GRPO through NeMo-RL",
    "tensorboard": "curves while a run goes on",
    "wandb": "optional, wandb=",
}

TOOLS = {
    "sbatch": "submission to SLURM",
    "docker": "runs in a container on this machine",
    "podman": "runs in a container on this machine",
    "apptainer": "containers on a cluster",
    "enroot": "containers under SLURM (pyxis)",
    "kubectl": "submission to Kubernetes",
    "nvidia-smi": "looking at the GPUs",
}


@dataclass(frozen=True)
class Row:
    """One line: `state` is "ok", "missing", or "warning" (there, but not as this project wants it)."""

    group: str
    name: str
    value: str
    state: str = "ok"
    note: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Print the report. Returns 0, or 1 where this Python is too old for the project."""
    parser = argparse.ArgumentParser(prog="doctor.py", description="What this machine has, and what of this project works on it.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    if sys.version_info < OLDEST_PYTHON:
        print(
            f"Python {platform.python_version()} is too old: use Python {_dotted(OLDEST_PYTHON)} or {_dotted(NEWEST_PYTHON)}",
            file=sys.stderr,
        )
        return 1
    rows = examine()
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print("\n".join(table(rows)))
    return 0


def examine() -> list[Row]:
    """All rows, by group: the machine, GPUs, packages, tools, and what works here."""
    from nemo_ext.platform import hardware

    versions = {name: _version(name) for name in PACKAGES}
    try:
        machine, gpu = hardware.detect(), _gpu_facts()
    except (ImportError, OSError, RuntimeError) as error:  # a driver without torch, or a torch that does not load
        cores, memory = hardware.usable_cores(), hardware.usable_memory()
        machine, gpu = hardware.Machine((), False, cores, memory), {"error": str(error).splitlines()[0]}
    tools = {name: shutil.which(name) for name in TOOLS}
    return [
        *machine_rows(machine),
        *gpu_rows(machine, gpu),
        *package_rows(versions),
        *[Row("tools", name, path or "-", "ok" if path else "missing", TOOLS[name]) for name, path in tools.items()],
        *ability_rows(machine, versions, tools),
        *sandbox_rows(),
    ]


def sandbox_rows() -> list[Row]:
    """What keeps programs in that a model wrote (rewards code, math and reasoning_gym)."""
    from nemo_ext.rewards import sandbox

    found = sandbox.describe()
    state = "missing" if "sandbox" in found else "ok"
    return [Row("sandbox of rewards", name, text, state) for name, text in found.items()]


def machine_rows(machine: Any) -> list[Row]:
    """Operating system, Python, cores, memory, disk."""
    known = sys.version_info[:2] <= NEWEST_PYTHON
    written_for = f"written for {_dotted(OLDEST_PYTHON)} and {_dotted(NEWEST_PYTHON)}"
    rows = [
        Row("machine", "system", f"{_system()}, {platform.machine()}"),
        Row("machine", "Python", platform.python_version(), "ok" if known else "warning", "" if known else written_for),
        Row("machine", "cores", str(machine.cpu_count)),
        _size_row("memory", machine.memory_bytes, 11, "the smoke model's run wants 11 GiB with two processes, 6 with one"),
        _size_row("free disk", shutil.disk_usage(os.getcwd()).free, 10, "environment and a small run's checkpoints want 10 GiB"),
    ]
    if os.path.isdir("/dev/shm"):
        rows.append(
            _size_row(
                "/dev/shm", shutil.disk_usage("/dev/shm").total, 1, "NCCL and data loaders want 1 GiB: docker run --shm-size=8g"
            )
        )
    return rows


def gpu_rows(machine: Any, gpu: dict[str, str]) -> list[Row]:
    """Driver, CUDA, NCCL and each GPU; one row that says so where there is none."""
    if not machine.cuda:
        reason = gpu.get("error") or "no GPU that torch can use: recipes run on the CPU, at smoke size"
        return [Row("GPU", "CUDA", "-", "missing", reason)]
    rows = [Row("GPU", name, value) for name, value in gpu.items()]
    for index, card in enumerate(machine.gpus):
        major, minor = card.compute_capability
        text = f"{card.name}, {card.memory_bytes / GIB:.0f} GiB, compute capability {major}.{minor}"
        rows.append(
            Row(
                "GPU",
                f"GPU {index}",
                text,
                "ok" if major >= 8 else "warning",
                "" if major >= 8 else "no bf16: use precision=fp16",
            )
        )
    return rows


def package_rows(versions: dict[str, str | None]) -> list[Row]:
    """Each package that the project uses, with its version against the ones it is written for."""
    from nemo_ext.platform.versions import WRITTEN_FOR, matches

    rows = []
    for name, purpose in PACKAGES.items():
        version, wanted = versions[name], WRITTEN_FOR.get(name, ())
        if version is None:
            rows.append(Row("packages", name, "-", "missing", purpose))
        elif wanted and not any(matches(version, prefix) for prefix in wanted):
            rows.append(Row("packages", name, version, "warning", f"this project is written for {' or '.join(wanted)}"))
        else:
            rows.append(Row("packages", name, version))
    return rows


def ability_rows(machine: Any, versions: dict[str, str | None], tools: dict[str, str | None]) -> list[Row]:
    """What of the project works here, and what is missing for the rest."""
    capability = max((card.compute_capability for card in machine.gpus), default=(0, 0))
    gpus = len(machine.gpus)
    need = {name: (version is not None, name) for name, version in versions.items()}
    cuda = (machine.cuda, "a CUDA GPU")
    nemo = [need[name] for name in ("torch", "nemo_toolkit", "megatron-core", "nemo_run", "lightning")]
    te = need["transformer_engine"]
    cpu = (not machine.cuda, "CPU is used only where there is no CUDA GPU")
    container = any(tools[name] for name in ("docker", "podman"))
    trtllm = versions["tensorrt_llm"]
    # A need that makes sense only with another one counts as met while that one is missing: one cause is named, once.
    second_gpu = (gpus > 1 or not machine.cuda, "a second GPU")
    ampere, ada = (
        (capability >= wanted or not machine.cuda, f"compute capability {_dotted(wanted)}") for wanted in ((8, 0), (8, 9))
    )
    builds_engines = (trtllm is None or tuple(map(int, trtllm.split(".")[:2])) < (1, 3), "trtllm-build (TensorRT-LLM up to 1.2)")
    abilities = {
        "recipes on CPU (smoke size)": [*nemo, cpu],
        "recipes on GPU": [*nemo, cuda, te],
        "several GPUs (NCCL)": [*nemo, cuda, second_gpu],
        "bf16 on GPU": [cuda, ampere],
        "QLoRA": [*nemo, need["bitsandbytes"]],
        "FP8": [cuda, ada, te],
        "context parallelism": [cuda, second_gpu, te],
        "Hugging Face import and export": [need["torch"], need["transformers"], need["nemo_toolkit"]],
        "quantization": [need["torch"], need["nvidia-modelopt"]],
        "TensorRT-LLM engines": [cuda, need["tensorrt_llm"], builds_engines],
        "serving, embedded server": [need["torch"], need["transformers"], need["uvicorn"]],
        "serving with vLLM": [cuda, need["vllm"]],
        "GRPO, embedded engine": [need["torch"], need["transformers"], need["trl"]],
        "GRPO through NeMo-RL": [cuda, need["nemo_rl"]],
        "SLURM submission": [(bool(tools["sbatch"]), "sbatch")],
        "Kubernetes submission": [(bool(tools["kubectl"]), "kubectl")],
        "container runs": [(container, "docker or podman")],
    }
    rows = []
    for name, needs in abilities.items():
        missing = list(dict.fromkeys(what for there, what in needs if not there))
        note = (
            "" if not missing else missing[0] if missing == [cpu[1]] else f"needs {', '.join(m for m in missing if m != cpu[1])}"
        )
        rows.append(Row("what works here", name, "no" if missing else "yes", "missing" if missing else "ok", note))
    return rows


def table(rows: list[Row]) -> list[str]:
    """The rows as aligned text, a heading per group; `ok`, `--` (missing) or `!` (warning) in front."""
    marks = {"ok": "ok", "missing": "--", "warning": " !"}
    name_width = max(len(row.name) for row in rows)
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        value_width = max(len(row.value) for row in members if row.note) if any(row.note for row in members) else 0
        lines += ["", group] if lines else [group]
        for row in members:
            line = f"  {marks[row.state]}  {row.name:<{name_width}}  {row.value:<{value_width}}  {row.note}"
            lines.append(line.rstrip())
    return lines


def _size_row(name: str, size: int, wanted_gib: int, note: str) -> Row:
    enough = size >= wanted_gib * GIB
    return Row("machine", name, f"{size / GIB:.1f} GiB", "ok" if enough else "warning", "" if enough else note)


def _gpu_facts() -> dict[str, str]:
    """Driver, CUDA, NCCL and cuDNN, as far as they are there. Imports torch only where hardware.has_cuda() did."""
    from nemo_ext.platform import hardware

    if not hardware.has_cuda():
        return {}
    import torch

    facts = {"driver": _driver(), "CUDA": torch.version.cuda, "NCCL": _dotted(torch.cuda.nccl.version())}
    if (cudnn := torch.backends.cudnn.version()) is not None:
        facts["cuDNN"] = str(cudnn)
    return facts


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=3, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _version(distribution: str) -> str | None:
    """Installed version from the metadata, without importing the package."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    sys.exit(main())
