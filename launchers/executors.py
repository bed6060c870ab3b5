"""Where a run's processes are started: `executor=` names an entry of `EXECUTORS`.

An executor that submits has a schema of keys of its own (they never enter a run's configuration) and a function that takes the
parsed command and returns the exit code. Both are named and not imported, so that a command line is parsed in no time.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_ext.command_line import keys_of
from nemo_ext.errors import UserError

if TYPE_CHECKING:
    from launchers.grammar import Command


@dataclass(frozen=True)
class Executor:
    """`schema` and `submit` are MODULE:NAME; without `submit` run.py trains by itself."""

    about: str
    schema: str | None = None
    submit: str | None = None


EXECUTORS = {
    "local": Executor("this machine"),
    "slurm": Executor("a SLURM cluster, by sbatch", "launchers.slurm.keys:SlurmKeys", "launchers.slurm.submit:submit"),
    "k8s": Executor("a Kubernetes cluster, by kubectl", "launchers.k8s.keys:K8sKeys", "launchers.k8s.submit:submit"),
    "allocation": Executor("a step of a job that a cluster has started", "launchers.allocation:AllocationKeys"),
}
HIDDEN = ("allocation",)  # scripts of the others call it, people do not


def names() -> list[str]:
    """The executors that people name."""
    return [name for name in EXECUTORS if name not in HIDDEN]


def schema(name: str) -> type | None:
    """The dataclass of an executor's own keys, or None. Raises UserError for an executor that is unknown."""
    if name not in EXECUTORS:
        raise UserError(f"executor={name} is unknown: {', '.join(names())}")
    return _load(where) if (where := EXECUTORS[name].schema) else None


def fields(name: str) -> dict[str, dataclasses.Field]:
    """The keys that an executor has beside the recipe's."""
    found = schema(name)
    return keys_of(found) if found else {}


def owners(key: str) -> list[str]:
    """The executors that have the key."""
    return [name for name in names() if key in fields(name)]


def submitter(name: str) -> Callable[[Command], int] | None:
    """The function that submits a command, or None where run.py trains by itself."""
    return _load(where) if (where := EXECUTORS[name].submit) else None


def _load(where: str):
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
