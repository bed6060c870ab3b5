"""What a pod of several runs: prepare the run (pod 0), meet the others, a worker on every device, finish (pod 0).

    python -m launchers.k8s.pod run=/data/run settings=/etc/llm-builder/settings.yaml attempt=ID nodes=2 processes=8

A pod ends with 0 when the run is complete, and otherwise says by its exit code whether to start it again: `AGAIN` after a
failure, `STOPPED` (SIGTERM: the workers have saved), `FAILED` when the run failed too often, `REFUSED` when its input is wrong.
Each start continues from the newest checkpoint. Output of the workers goes to RUN/logs/rankN.log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launchers import folder
from launchers.k8s.manifest import AGAIN, FAILED, REFUSED, STOPPED
from launchers.k8s.meeting import Meeting, Start
from launchers.k8s.phases import COMPLETE, FINISH, PREPARE, ROOT, phase
from launchers.progress import follow
from launchers.worker import die_with_parent, interface_towards
from nemo_ext import run_folder
from nemo_ext.command_line import NO_DEFAULT, ending, key, parse
from nemo_ext.errors import RunError, UserError, explain

EXAMPLE = "python -m launchers.k8s.pod run=/data/run settings=/etc/llm-builder/settings.yaml attempt=ID nodes=2 processes=8"
MEETINGS = "k8s"  # in a run's folder
WORKER = ["-m", "launchers.worker"]
ENDED = ("finished", "stopped", "failed")
LAST_WORDS = 10.0  # seconds that workers have to say what they died of once one has died
LOOK_SECONDS = 5.0  # how often a pod looks whether its start still counts
FRESH_SECONDS = 90.0  # how long a file server may show an old status.json


@dataclass
class PodKeys:
    """What a pod is told."""

    run: str = key(NO_DEFAULT, "the run's folder")
    settings: str = key(NO_DEFAULT, "the run's settings")
    attempt: str = key(NO_DEFAULT, "which submission this is")
    nodes: int = key(NO_DEFAULT, "pods")
    processes: int = key(NO_DEFAULT, "workers of a pod")
    retries: int = key(3, "how often the run starts again after failures without a new checkpoint between them")


def main(arguments: list[str]) -> int:
    with ending("debug=true" in arguments, "the pod that replaces this one goes on") as end:
        end.code = FAILED
        end.code = attend(parse(PodKeys, arguments, EXAMPLE))
    return end.code


def attend(options: PodKeys) -> int:
    """Take part in one start of the run. Returns the exit code. A volume that fails for a moment is no wrong input."""
    run_dir, index = Path(options.run), _index(os.environ, options.nodes)
    meeting = Meeting(run_dir / MEETINGS / options.attempt, index, options.nodes)
    try:
        return _attend(options, run_dir, meeting)
    except OSError as error:
        print(f"error: {explain(error, run_dir)}", file=sys.stderr)
        return AGAIN if index else _judge(RunError.exit_code, meeting, run_dir, options.retries)


def _attend(options: PodKeys, run_dir: Path, meeting: Meeting) -> int:
    index = meeting.index
    if index == 0:
        meeting.open()
        if code := phase(PREPARE, Path(options.settings)):
            return 0 if code == COMPLETE else _judge(code, meeting, run_dir, options.retries)
        print(f"waiting for {options.nodes - 1} more pod{'s' if options.nodes > 2 else ''}", flush=True)
        start = meeting.gather(os.environ.get("POD_IP") or "127.0.0.1")
    else:
        print("waiting for pod 0, which prepares the run", flush=True)
        start = meeting.join(lambda: folder.complete(run_dir) is not None)
        if start is None:
            return 0
    print(f"start {start.number}: pod {index} of {options.nodes}, rank 0 at {start.address}:{start.port}", flush=True)
    workers = Workers(run_dir, index, options.nodes, options.processes, start, meeting)
    with workers:
        follow(run_dir, workers) if index == 0 else workers.wait()
    if index == 0:
        return _judge(phase(FINISH, Path(options.settings)), meeting, run_dir, options.retries)
    return _other_pods_code(run_dir, workers)


class Workers:
    """The workers of this pod. SIGTERM to the pod goes to them, and they save; when one dies, the others die too."""

    def __init__(self, run_dir: Path, index: int, nodes: int, processes: int, start: Start, meeting: Meeting):
        self.meeting, self.stopped = meeting, False
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._kill_at: float | None = None
        self._code = 0  # of the first that died
        world = nodes * processes
        shared = {
            "MASTER_ADDR": start.address, "MASTER_PORT": str(start.port), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": str(index),
            "TORCHELASTIC_RUN_ID": f"k8s-{start.number}",  # for Lightning, which asks who started its processes
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        shared.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // processes)))
        if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_towards(start.address)):
            shared["GLOO_SOCKET_IFNAME"] = interface
        self.environments = [
            {**os.environ, **shared, "RANK": str(index * processes + local), "LOCAL_RANK": str(local)}
            for local in range(processes)
        ]
        self.run_dir = run_dir
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Workers:
        self._previous = signal.signal(signal.SIGTERM, self._pass_on)
        command = [sys.executable, *WORKER, str(self.run_dir)]
        for environment in self.environments:
            self.processes.append(
                subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
            )
            if self.stopped:
                self.processes[-1].send_signal(signal.SIGTERM)
        return self

    def __exit__(self, *unused) -> None:
        signal.signal(signal.SIGTERM, self._previous)
        self._kill()

    def poll(self) -> int | None:
        """The exit code once all have ended: 0, or that of the first that died."""
        codes = [process.poll() for process in self.processes]
        self._code = self._code or next((code for code in codes if code), 0)
        if None not in codes:
            return self._code
        now = time.monotonic()
        if self._code and self._kill_at is None:
            self._kill_at = now + LAST_WORDS
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            if self._kill_at is None and self.meeting.broken():
                print("another pod was replaced: this start is over", flush=True)
                self._kill_at = now
        if self._kill_at is not None and now >= self._kill_at:
            self._kill()
        return None

    def wait(self) -> int:
        """Wait until all have ended; what `poll` returns then."""
        while (code := self.poll()) is None:
            time.sleep(0.5)
        return code

    def _pass_on(self, number: int, frame: object) -> None:
        self.stopped = True
        os.write(2, b"SIGTERM: ending after this step, once it is saved\n")
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()


def _judge(code: int, meeting: Meeting, run_dir: Path, retries: int) -> int:
    """Pod 0's exit code, from that of a step. What it says has been printed."""
    if code == RunError.exit_code:
        newest = folder.newest_checkpoint(run_dir)
        if meeting.failed(newest[0] if newest else 0, retries):
            print(f"failed {retries + 1} times without a new checkpoint: given up", file=sys.stderr)
            return FAILED
        return AGAIN
    return STOPPED if code > 128 or code < 0 else code


def _other_pods_code(run_dir: Path, workers: Workers) -> int:
    """The exit code of a pod but the first, from what rank 0 wrote: a file server may show it late."""
    deadline = time.monotonic() + FRESH_SECONDS
    while (status := run_folder.read_status(run_dir) or {}).get("phase") not in ENDED:
        if workers.poll() or time.monotonic() > deadline:
            return AGAIN
        time.sleep(1)
    if status["phase"] == "failed":
        return REFUSED if status.get("exit_code") == UserError.exit_code else AGAIN
    return 0 if status["phase"] == "finished" else STOPPED


def _index(environment: os._Environ | dict[str, str], nodes: int) -> int:
    """Which pod this is: numbered by the Job, or by the PyTorchJob's operator. Raises UserError."""
    text = environment.get("JOB_COMPLETION_INDEX") or environment.get("RANK")
    if text is None or not text.isdigit() or not int(text) < nodes:
        raise UserError(f"neither JOB_COMPLETION_INDEX nor RANK says which of {nodes} pods this is (found {text})")
    return int(text)


def _cores() -> int:
    from nemo_ext.platform.hardware import usable_cores

    return usable_cores()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
