"""The sandbox that code written by a model runs in: what this machine can do, and one run of one program."""

from __future__ import annotations

import functools
import json
import math
import os
import secrets
import select
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from nemo_ext.errors import UserError

MODES = ("auto", "landlock", "namespaces")
MEMORY = 512 << 20  # bytes of address space above what an interpreter has
OUTPUT = 1 << 20  # bytes
START = 20.0  # seconds that the first start of an interpreter may take
PROGRAM = Path(__file__).with_name("program.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC", "HOME": "/", "OPENBLAS_NUM_THREADS": "1",
               "OMP_NUM_THREADS": "1"}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """How a program ended: `passed` if it ran to its end with every assertion; `output` is its standard output."""

    passed: bool
    output: str
    timed_out: bool = False
    refused: str | None = None


def readable() -> list[str]:
    """What a confined process may read: Python's library, installed packages, shared libraries, time zones."""
    base = Path(sys.base_prefix) / "lib"
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *packages(), *map(str, base.glob("libpython*"))]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    return sorted({os.path.abspath(path) for path in paths})


def packages() -> list[str]:
    """The folders of installed packages."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


@functools.cache
def means(mode: str = "auto") -> tuple[str, ...]:
    """The means of hiding files that work on this machine, tried out. `auto` takes all that there are.

    Raises UserError where the one asked for, or for `auto` both, cannot be had: nothing runs without.
    """
    if mode not in MODES:
        raise UserError(f"sandbox={mode}: must be one of {', '.join(MODES)}")
    if not sys.platform.startswith("linux"):
        raise UserError(f"sandbox={mode}: running code that a model wrote needs Linux, this is {sys.platform}")
    wanted = MODES[1:] if mode == "auto" else (mode,)
    refused = {each: _refusal((each,)) for each in wanted}
    working = tuple(each for each in wanted if refused[each] is None)
    if not working:
        why = "; ".join(f"{each}: {reason}" for each, reason in refused.items())
        raise UserError(
            f"sandbox={mode}: code that a model wrote cannot be isolated here ({why}); rewards that run it are refused"
        )
    return working


def describe() -> dict[str, str]:
    """What keeps the code of answers in on this machine, in words, a line for each thing that it is kept from."""
    try:
        found = means()
    except UserError as error:
        return {"sandbox": str(error)}
    hidden = {"landlock": "Landlock", "namespaces": "a root folder of its own (mount namespace)"}
    network = "seccomp: no sockets" + (", and a network namespace without devices" if "namespaces" in found else "")
    return {
        "network": network,
        "reading files": " and ".join(hidden[each] for each in found),
        "writing and deleting files": "seccomp: files open for reading only",
        "processes": "seccomp: no new processes, programs, or signals to others",
        "limits": f"time, processor time, {MEMORY >> 20} MiB of memory, {OUTPUT >> 10} KiB of output, 64 open files",
    }


def run(
    code: str,
    tests: list[str],
    *,
    using: tuple[str, ...],
    timeout: float,
    stdin: str = "",
    memory: int = MEMORY,
) -> Run:
    """Run `code` once for at most `timeout` seconds: with `tests` as a module and each of them after it; without, as a program
    that reads `stdin` and writes to standard output.

    The process has a fresh interpreter, an empty environment and no descriptors but its own; input and output are in memory.
    """
    token = secrets.token_hex(16)
    end, result = os.pipe()
    given, output, job = (os.memfd_create(name) for name in ("stdin", "stdout", "job"))
    try:
        task = {"code": code, "tests": tests, "result": result, "token": token, "memory": memory, "means": using,
                "seconds": math.ceil(timeout) + 1, "readable": readable(), "packages": packages(), "output": OUTPUT}  # fmt: skip
        _fill(job, json.dumps(task))
        _fill(given, stdin)
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(PROGRAM), str(job)],
            stdin=given, stdout=output, stderr=subprocess.DEVNULL, cwd="/", env=ENVIRONMENT, pass_fds=(job, result),
            start_new_session=True,
        )  # fmt: skip
        os.close(result)
        result = -1
        said, timed_out = _wait(process, end, started + timeout)
        os.lseek(output, 0, os.SEEK_SET)
        text = os.read(output, OUTPUT).decode(errors="replace")
    finally:
        for descriptor in (end, result, given, output, job):
            if descriptor >= 0:
                os.close(descriptor)
    if said.startswith("refused: "):
        return Run(False, "", refused=said.removeprefix("refused: "))
    return Run(said == token, text, timed_out)


def _wait(process: subprocess.Popen, end: int, deadline: float) -> tuple[str, bool]:
    """What a process says on `end` until it ends, and whether it had to be killed at `deadline`."""
    said = b""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    try:
        while len(said) < 1024 and (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
            part = os.read(end, 1024)
            if not part:
                break
            said += part
        process.wait(max(0.0, deadline - time.monotonic()))
        return said.decode(errors="replace"), False
    except subprocess.TimeoutExpired:
        return "", True
    finally:
        process.kill()
        process.wait()


def _fill(descriptor: int, text: str) -> None:
    with open(descriptor, "w", encoding="utf-8", errors="replace", closefd=False) as file:
        file.write(text)
    os.lseek(descriptor, 0, os.SEEK_SET)


_PROBE = """
import os, socket, threading
def denied(action):
    try:
        action()
    except OSError:
        return
    raise SystemExit(1)
denied(lambda: open("/etc/passwd"))
denied(lambda: os.listdir("/proc"))
denied(lambda: open("/probe", "w"))
denied(lambda: os.unlink("/etc/hostname"))
denied(socket.socket)
denied(os.fork)
denied(lambda: os.kill(os.getppid(), 0))
thread = threading.Thread(target=int)
thread.start()
thread.join()
import decimal, zoneinfo
"""


def _refusal(using: tuple[str, ...]) -> str | None:
    """Why confinement by these means does not work here; None where everything that the probe tries is denied."""
    found = run(_PROBE, [], using=using, timeout=START)
    if found.refused:
        return found.refused
    return None if found.passed else "a probe could do what it must not"
