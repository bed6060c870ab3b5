"""What the figures of a benchmark were taken with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess

from nemo_ext import gpus

TRAINING = ("torch", "megatron-core", "nemo-toolkit", "transformer-engine")


def versions(packages: tuple[str, ...] = TRAINING) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def on(name: str) -> str:
    """What a measurement is called in a file that holds those of several machines: "NAME on H200"."""
    found = device()
    kind = next((kind.title for kind in gpus.KINDS.values() if kind.title in found), None)
    return f"{name} on {kind or found}"


def device() -> str:
    """The first GPU's name and its driver's version, or how many CPU cores there are."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(FileNotFoundError):
        if lines := subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
            return lines[0].strip()
    return f"{os.cpu_count()} CPU cores"
