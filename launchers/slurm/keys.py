"""The keys of executor=slurm, and profiles of sites that set them.

They say where and how a run is started, never what is learnt, and stay out of the run's configuration.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.command_line import check_choice, check_value, key, keys_of, nearest, read_config, texts, typed
from nemo_ext.errors import UserError
from recipes import keys as recipe_keys

MACHINE = ("gpus", "gpu", "gpu_memory")  # keys of recipes that a site's profile may set: what its machines are
TIME = re.compile(r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?)|(?P<plain>\d+(?::\d+){0,2})")
ENDLESS = ("UNLIMITED", "INFINITE")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class SlurmKeys:
    """Every key of executor=slurm, in the order `--help` shows them."""

    site: str | None = key(None, "profile that sets these keys: ~/.config/llm-builder/sites/NAME.yaml", auto="none")
    account: str | None = key(None, "account that the job is charged to", auto="the user's own")
    partition: str | None = key(None, "partition", auto="the cluster's default")
    qos: str | None = key(None, "quality of service", auto="the account's")
    time: str | None = key(None, "time limit: minutes, HH:MM:SS or D-HH:MM:SS", auto="the partition's")
    name: str | None = key(None, "the job's name, by which launchers/jobs.py finds it", auto="that of the folder out=")
    cpus: int | None = key(None, "cores of a process", auto="what the cluster gives")
    mem: str | None = key(None, "memory of a machine, such as 500G; 0 is all of it", auto="what the cluster gives")
    exclusive: bool = key(False, "take whole machines")
    constraint: str | None = key(None, "features that the machines need", auto="none")
    reservation: str | None = key(None, "reservation to run in", auto="none")
    exclude: str | None = key(None, "machines to stay away from: node[1-3],node7", auto="none")
    gpu_request: str = key(
        "gpus-per-node", "how GPUs are asked for; none where the partition gives whole machines",
        choices=("gpus-per-node", "gres", "none"),
    )  # fmt: skip
    sbatch: Any = key(None, "further options of sbatch: [--mail-type=END,--comment=x]", auto="none")
    srun: Any = key(None, "further options of the steps' srun: [--mpi=none]", auto="none")

    container: str | None = key(None, "container image: a registry's name, or a .sqsh or .sif file", auto="none: this Python")
    runtime: str | None = key(
        None, "what runs the container", choices=("pyxis", "apptainer"),
        auto="apptainer for a .sif file or without pyxis, else pyxis",
    )  # fmt: skip
    mounts: Any = key(None, "folders that the container sees, beside those that keys name: [/data,/a:/b]", auto="none")
    python: str | None = key(None, "Python that runs the job", auto="this one; python in a container")
    project: str | None = key(None, "this project's folder where the job runs", auto="this one, mounted into a container")
    setup: Any = key(None, "shell lines before anything else: [module load cuda]", auto="none")

    fabric: str | None = key(
        None, "network that NCCL uses between machines", choices=("infiniband", "roce", "ethernet"), auto="what NCCL finds"
    )  # fmt: skip
    interface: str | None = key(None, "network interface of NCCL's and gloo's sockets, such as ib0", auto="what they find")
    env: Any = key(None, "environment of all processes, a variable a key: env.NCCL_IB_HCA=mlx5", auto="none")

    requeue: bool | None = key(
        None, "continue by itself after the time limit, a dead machine or preemption", auto="yes, except in a chain"
    )
    grace: int = key(300, "how long before the time limit the run is told to save and end", unit="seconds")
    chain: int = key(1, "jobs submitted one after the other, each going on where the last one ended")
    parallel: int | None = key(None, "points of a sweep that run at the same time", auto="all")


def sites_folder() -> Path:
    """Where profiles of sites are."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "llm-builder" / "sites"


def build(given: dict[str, Any]) -> tuple[SlurmKeys, dict[str, Any]]:
    """The given keys over the site's, and what the site says of its machines (`MACHINE`). Raises UserError."""
    site, machine = _site(given["site"]) if given.get("site") else ({}, {})
    environment = {**(site.get("env") or {}), **(given.get("env") or {})}
    keys = SlurmKeys(**{**site, **{k: v for k, v in given.items() if v is not None}, "env": environment})
    _check(keys)
    return keys, machine


def _site(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A profile's keys, and what it says of the machines."""
    file = sites_folder() / f"{name}.yaml"
    if not file.is_file():
        known = sorted(each.stem for each in sites_folder().glob("*.yaml"))
        raise UserError(f"site={name}: there is no {file}{'; known: ' + ', '.join(known) if known else ''}")
    fields, keys, machine = keys_of(SlurmKeys), {}, {}
    for path, value in read_config(file).items():
        if path in MACHINE:
            field = recipe_keys.fields()[path]
            machine[path] = typed(path, value, field)
            check_value(path, machine[path], field)
        elif path.startswith("env."):
            keys.setdefault("env", {})[path.removeprefix("env.")] = str(value).lower() if isinstance(value, bool) else str(value)
        elif path in fields and path != "site":
            keys[path] = typed(path, value, fields[path])
        else:
            raise UserError(f"{file}: unknown key {path}{nearest(path, [*fields, *MACHINE])}")
    return keys, machine


def _check(keys: SlurmKeys) -> None:
    """Refuse what no cluster takes. Raises UserError."""
    for name, field in keys_of(SlurmKeys).items():
        check_choice(name, getattr(keys, name), field)
        if isinstance(value := getattr(keys, name), str) and (not value.isprintable() or not value.strip()):
            raise UserError(f"{name}={value!r} must be one line of text")
    for name in ("cpus", "chain", "parallel"):
        if getattr(keys, name) is not None and getattr(keys, name) <= 0:
            raise UserError(f"{name}={getattr(keys, name)} must be above 0")
    if keys.name is not None and not NAME.fullmatch(keys.name):
        raise UserError(f"name={keys.name} must be letters, digits, dots, hyphens and underscores, a letter or digit first")
    for variable in keys.env:
        if not VARIABLE.fullmatch(variable):
            raise UserError(f"env.{variable}= is no name of an environment variable")
    for name in ("sbatch", "srun"):
        for option in texts(name, getattr(keys, name)):
            if not re.match(r"--?[A-Za-z]", option):
                raise UserError(f"{name}={option}: an option begins with a hyphen")
    for name in ("mounts", "setup"):
        texts(name, getattr(keys, name))
    if not 0 <= keys.grace <= 65535:
        raise UserError(f"grace={keys.grace} must be between 0 and 65535 seconds")
    if keys.time is not None and (limit := seconds("time", keys.time)) is not None and limit <= keys.grace:
        raise UserError(
            f"time={keys.time} is no longer than grace={keys.grace} seconds, which the run has to save: a longer time="
        )
    if keys.chain > 1 and keys.requeue:
        raise UserError(f"chain={keys.chain} and requeue=true both continue a run: give one of them")
    if keys.runtime and not keys.container:
        raise UserError(f"runtime={keys.runtime} is for a container: container=IMAGE")


def seconds(name: str, text: str) -> int | None:
    """SLURM's duration: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; None for no limit, which 0 is too.

    Raises UserError.
    """
    if text.upper() in ENDLESS:
        return None
    match = TIME.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{name}={text} is no duration: give minutes, HH:MM:SS or D-HH:MM:SS, such as 4:00:00")
    if match["plain"]:
        parts = [int(part) for part in match["plain"].split(":")]
        hours, minutes, rest = (0, *parts, 0) if len(parts) == 1 else (0, *parts) if len(parts) == 2 else parts
        return hours * 3600 + minutes * 60 + rest or None
    days, hours, minutes, rest = (int(match[part] or 0) for part in ("days", "hours", "minutes", "seconds"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest or None
