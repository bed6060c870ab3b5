"""One process of a run: builds the recipe that the launcher wrote down, and trains.

Started by torchrun or by SLURM's srun once a device, as `python -m launchers.worker RUN_FOLDER`. Its output goes to
`logs/rankN.log` of the run; what people see comes from metrics.jsonl and status.json.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

JOB = "job.json"  # what the launcher hands over: recipe, keys, overrides, shape and this machine's paths
LAUNCHER = "LLM_BUILDER_LAUNCHER"  # environment: the process id of a launcher on this machine
AHEAD = "LLM_BUILDER_AHEAD"  # environment: what the file GO of the run's folder will say when there is a job
GO = f"logs/{AHEAD.lower()}"
PR_SET_PDEATHSIG = 1
LOCK_PATIENCE = 150  # seconds that a dead node's lock may outlive it on a file server (NFS 4: a lease of 90)
GIB = 2**30
LIBC = ctypes.CDLL(None)


def main(run_dir: Path) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # until the trainer takes it
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)  # the processes that write checkpoints
    if slurm := from_slurm(os.environ):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])  # likewise; torchrun ends workers by SIGTERM
        os.environ.update(slurm)
    rank = int(os.environ.get("RANK", "0"))
    _log_to(run_dir / "logs" / f"rank{rank}.log")
    from nemo_ext import run_folder
    from nemo_ext.disk import held
    from nemo_ext.errors import RunError, UserError, explain, is_lost_connection

    with ExitStack() as stack:
        if rank == 0 and LAUNCHER not in os.environ:  # else a launcher on this machine holds the folder
            try:
                stack.enter_context(held(run_dir, LOCK_PATIENCE))
            except UserError as error:  # and status.json is another run's
                print(error, flush=True)
                return error.exit_code
        try:
            waited = await_job(run_dir)
            train(run_folder.read_json(run_dir / JOB), run_dir, waited)
        except Exception as error:
            with suppress(OSError):
                traceback.print_exc()
            code = getattr(error, "exit_code", 1)
            if not is_lost_connection(error):
                with suppress(OSError):
                    again = not isinstance(error, (RunError, UserError))  # else another start would end the same
                    run_folder.write_failure(run_dir, explain(error, run_dir), code, again=again)
            os._exit(code)  # threads of libraries may wait for ranks that are gone
    return 0


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set, from what srun sets; nothing where torchrun has set it, or where srun did not start this process.

    The job's script sets MASTER_ADDR and MASTER_PORT. With TORCHELASTIC_RUN_ID Lightning believes in torchrun: left to find
    SLURM, it saves and requeues by itself at SIGUSR1. Gloo would listen at the address of the host's own name, which Debian has
    as 127.0.1.1: it is given the interface by which a node reaches the one that srun runs on.
    """
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    tasks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_STEP_NUM_NODES"])
    found = {
        "RANK": environment["SLURM_PROCID"], "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "GROUP_RANK": environment["SLURM_NODEID"], "TORCHELASTIC_RUN_ID": f"slurm-{environment['SLURM_JOB_ID']}",
    }  # fmt: skip
    if nodes > 1 and "GLOO_SOCKET_IFNAME" not in environment:
        interface = interface_towards(environment["SLURM_LAUNCH_NODE_IPADDR"])
        found |= {"GLOO_SOCKET_IFNAME": interface} if interface else {}
    return found


def interface_towards(address: str) -> str | None:
    """The network interface by which an address, which may be this host's own, is reached; None where no route leads there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # of a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(each.address == own for each in addresses)), None)


def await_job(run_dir: Path) -> float:
    """Where this process was started ahead of its job, import what training takes, which is most of a start, and wait until the
    launcher has prepared the data; a launcher that ends takes this process with it. Returns the seconds waited."""
    ticket = os.environ.get(AHEAD)
    if ticket is None:
        return 0.0
    from nemo_ext import platform
    from nemo_ext.platform.lean import lean

    with lean():
        platform.activate()
        with platform.uncollected():
            import recipes.training  # noqa: F401
    began = time.monotonic()
    while not _orphaned():
        with suppress(FileNotFoundError):
            if (run_dir / GO).read_text() == ticket:
                return time.monotonic() - began
        time.sleep(0.05)
    os._exit(1)  # torchrun was killed before this process could ask to die with it


def _orphaned() -> bool:
    """Whether a launcher of this machine started this process and is none of its ancestors any more."""
    launcher = os.environ.get(LAUNCHER)
    return launcher is not None and int(launcher) not in {each.pid for each in psutil.Process().parents()}


def train(job: dict, run_dir: Path, waited: float = 0.0) -> None:
    """Build and run the job's recipe in this process of the group. `waited` is how long it waited for the job, in seconds."""
    from nemo_ext import platform
    from nemo_ext.platform.lean import lean

    with lean():
        platform.activate()
        import fiddle as fdl
        import torch

        import recipes
        from nemo_ext.architecture import Architecture

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if torch.cuda.is_available() and job["keys"]["gpu_memory"]:
            _hold_to(job["keys"]["gpu_memory"] * GIB)
        shape, given = Architecture(**job["architecture"]), {**job["keys"], "senses": job.get("senses")}
        with platform.uncollected():  # it imports the rest of NeMo
            recipe = recipes.load(job["recipe"], shape=shape, overrides=job["overrides"], **given)
    recipes.bind(recipe, run_dir=str(run_dir), tokenizer=job["tokenizer"], blend=job["blend"], weights=job["weights"],
                 checkpoint=job["checkpoint"])  # fmt: skip
    if "trainer" in recipe.__arguments__:  # GRPO's has none
        _tell_start(recipe, waited)
    with _left_on_device():
        fdl.build(recipe)()
    _write_memory(run_dir, int(os.environ.get("RANK", "0")))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _tell_start(recipe: Any, waited: float) -> None:
    """Let the log say how long it took from the command to the first step, and why."""
    import nemo_run

    from nemo_ext.callbacks.start import StartTimes

    started = psutil.Process().create_time()
    commanded = psutil.Process(int(os.environ[LAUNCHER])).create_time() if LAUNCHER in os.environ else started
    before = {"command": started - commanded, "imports": time.time() - started - waited, "waiting for the data": waited}
    recipe.trainer.callbacks.append(nemo_run.Config(StartTimes, before=before))


def _hold_to(size: float) -> None:
    """Give torch so many bytes of this process's GPU, less what the plan expects a process to take beside its tensors."""
    import torch

    from launchers.memory import CUDA_CONTEXT

    device = int(os.environ.get("LOCAL_RANK", "0"))
    share = (size - CUDA_CONTEXT) / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)


@contextmanager
def _left_on_device() -> Iterator[None]:
    """Keep Lightning from copying the model and the optimizer's states to host memory when a fit ends: for the ranks of a node
    that is hundreds of GB, and this process ends next. Does nothing where the recipe has no Lightning (GRPO)."""
    if "lightning.pytorch" not in sys.modules:
        yield
        return
    from lightning.pytorch import LightningModule

    states = mock.patch("lightning.pytorch.strategies.strategy._optimizers_to_device")
    with states, mock.patch.object(LightningModule, "cpu", lambda module: module):
        yield


def _write_memory(run_dir: Path, rank: int) -> None:
    """Leave what this process held at its peak beside its log, in bytes; on a GPU also what else of the device is in use."""
    import torch

    from nemo_ext import run_folder
    from nemo_ext.platform import hardware

    held = {"peak": hardware.peak_memory()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held["reserved"] = torch.cuda.max_memory_reserved()
        held["outside_torch"] = total - free - torch.cuda.memory_reserved()
    run_folder.write_json(run_folder.rank_memory(run_dir, rank), held)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies: no orphan holds a GPU."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher and not _alive(int(launcher)):  # everything between it and us died before we could ask
        os.kill(os.getpid(), signal.SIGKILL)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _log_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()} on {socket.gethostname()} starts", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
elif __name__ == "__mp_main__":  # a process that multiprocessing starts anew, such as the queue of the checkpoint writers
    die_with_parent()
    # SLURM's signals go to every process of a step: this one serves the last checkpoint.
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
