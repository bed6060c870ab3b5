"""A cluster of stand-ins for SLURM's commands, which write down what they are asked."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers import run

SINFO = """\
debug*|up|30:00|2|4|(null)
h100|up|1-00:00:00|14|96|gpu:h100:8(S:0-1)
h100|up|1-00:00:00|2|64|gpu:4
old|down|infinite|1|8|(null)
"""
RECORD = """#!{python} -IS
import json, os, sys
folder = {folder!r}
name = os.path.basename(sys.argv[0])
with open(os.path.join(folder, "calls"), "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answer = os.path.join(folder, name + ".answer")
{body}
if os.path.exists(answer):
    sys.stdout.write(open(answer).read())
error = os.path.join(folder, name + ".error")
if os.path.exists(error):
    sys.stderr.write(open(error).read())
    sys.exit(1)
"""
SBATCH = """
count = os.path.join(folder, "count")
number = int(open(count).read()) + 1 if os.path.exists(count) else 100
open(count, "w").write(str(number))
if not os.path.exists(os.path.join(folder, "sbatch.error")):
    print(f"{number};cluster")
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> SimpleNamespace:
    """`answer(command, text)` and `fail(command, text)` say what a command prints; `calls(name)` what it was asked."""
    folder = tmp_path / "cluster"
    bin = folder / "bin"
    bin.mkdir(parents=True)
    for name in ("sinfo", "sbatch", "squeue", "scancel", "scontrol", "srun"):
        program = bin / name
        program.write_text(RECORD.format(python=sys.executable, folder=str(folder), body=SBATCH if name == "sbatch" else ""))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("LLM_BUILDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("launchers.slurm.cluster.shutil.which", _which(bin))
    monkeypatch.chdir(tmp_path)
    (folder / "sinfo.answer").write_text(SINFO)

    def calls(name: str) -> list[list[str]]:
        file = folder / "calls"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line[1:] for line in lines if line[0] == name]

    return SimpleNamespace(
        bin=bin, calls=calls,
        answer=lambda command, text: (folder / f"{command}.answer").write_text(text),
        fail=lambda command, text: (folder / f"{command}.error").write_text(text),
    )  # fmt: skip


def _which(bin: Path):
    """Finds the stand-ins only: what else this machine has of SLURM is not this cluster's."""
    import shutil

    real = shutil.which

    def which(name: str, *more):
        found = real(name, *more)
        known = name in ("sacctmgr", "sacct", "apptainer")
        return None if known and not (bin / name).exists() else found

    return which


@pytest.fixture
def submit(capsys):
    """Runs the command: (exit code, what it printed, what it printed as errors)."""

    def submit(*arguments: str) -> tuple[int, str, str]:
        code = run.main(["recipe=pretrain_custom", "layers=2", "hidden=64", "heads=4", "executor=slurm", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return submit
