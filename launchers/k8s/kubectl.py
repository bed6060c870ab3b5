"""kubectl: how this project speaks to a cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from nemo_ext.errors import RunError, UserError

TIMEOUT = "30s"


@dataclass(frozen=True)
class Kubectl:
    """A cluster and a namespace of it; None: kubectl's own."""

    context: str | None = None
    namespace: str | None = None

    def command(self, *arguments: str) -> list[str]:
        """A command line. Raises UserError where there is no kubectl."""
        if shutil.which("kubectl") is None:
            raise UserError("kubectl is not on the PATH: executor=k8s submits through it; dryrun=true prints what it would")
        place = [f"--context={self.context}"] if self.context else []
        place += [f"--namespace={self.namespace}"] if self.namespace else []
        return ["kubectl", *place, *arguments]

    def run(self, *arguments: str, given: str | None = None) -> str:
        """Run kubectl and return what it prints. Raises RunError with its last line where it fails."""
        line = self.command(*arguments)
        done = subprocess.run(line, input=given, capture_output=True, text=True)
        if done.returncode:
            said = [text for text in done.stderr.splitlines() if text.strip()] or [f"exit code {done.returncode}"]
            raise RunError(f"kubectl {arguments[0]}: {said[-1].strip()}")
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any] | None:
        """An object or a list of them, or None where there is none. Raises RunError."""
        text = self.run("get", *arguments, "--ignore-not-found", "--output=json", f"--request-timeout={TIMEOUT}")
        return json.loads(text) if text.strip() else None

    def items(self, *arguments: str) -> list[dict[str, Any]] | None:
        """A list's objects; None where the cluster does not let this user list them. Raises RunError."""
        try:
            return (self.get(*arguments) or {}).get("items", [])
        except RunError as error:
            if "forbidden" in str(error).lower():
                return None
            raise
