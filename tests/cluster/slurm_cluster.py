"""A real SLURM on this machine, in namespaces of its own.

Each node is what a node is to SLURM: a host name, an address, processes of its own, and a network card on a bridge. Nothing
leaves the bridge. Everything runs in one process namespace whose init ends when its input does: whatever way the tests end, the
kernel ends the cluster with them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NEEDED = "munged slurmctld slurmd sbatch srun scontrol squeue sinfo scancel unshare nsenter ip ps".split()
NETWORK = "10.77.0"
LOGIN = "login"  # the host that slurmctld and people's commands run on
NEW = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
JOIN = ["--mount", "--net", "--uts", "--ipc", "--pid"]
# A job that is requeued may start once its old credential has run out (cred_expire, 120 s by default). By process groups, because
# proctrack/linuxproc loses an srun whose shell dies first, and this then cancels the requeued job's step of the same number.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={login}({network}.254)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=200000,bf_interval=2
SlurmdTimeout=6
KillWait=30
MinJobAge=600
MessageTimeout=5
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={nodes} CPUs={cpus} RealMemory={memory} Gres=gpu:2 State=UNKNOWN
PartitionName=batch Nodes={nodes} Default=YES MaxTime=60:00 GraceTime=120
PartitionName=urgent Nodes={nodes} PriorityTier=10 MaxTime=60:00
PartitionName=small Nodes={first} MaxTime=2:00
"""
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # what SLURM takes for two GPUs: no job here uses one


def unavailable() -> str | None:
    """Why no cluster can be started here, or None."""
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm munge iproute2 procps)"
    if os.getuid():
        return "slurmd and network namespaces need root"
    probe = subprocess.run([*NEW, "sh", "-c", "ip link add bridge0 type bridge && ip link add left type veth peer name right"],
                           capture_output=True, text=True)  # fmt: skip
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


class SlurmCluster:
    """munged, slurmctld and slurmds called n1, n2, ... with all their files in `folder`; a context manager."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus
        self._holder: subprocess.Popen | None = None
        self._init = 0  # the process that holds the cluster's namespaces
        self._booted: dict[str, tuple[subprocess.Popen, int]] = {}  # with the process that holds the node's own

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def popen(self, command: Sequence[str | os.PathLike], **more: Any) -> subprocess.Popen:
        """Start a command on the login host."""
        more["env"] = {**(more.get("env") or os.environ), "SLURM_CONF": str(self.folder / "slurm.conf")}
        inside = ["env", f"--chdir={more.pop('cwd', self.folder)}", *map(str, command)]
        return subprocess.Popen(["nsenter", f"--target={self._init}", *JOIN, *inside], **more)

    def run(self, command: Sequence[str | os.PathLike], timeout: float = 60, **more: Any) -> subprocess.CompletedProcess:
        """Run a command on the login host; its output as text."""
        process = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, **more)
        output, errors = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def check(self, *command: str) -> str:
        """A command's output. AssertionError where it fails."""
        done = self.run(command)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: int | str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, NodeList, ..."""
        words = self.check("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: Callable[[], Any], timeout: float, why: str) -> Any:
        """What `what()` gives as soon as it is true. AssertionError with the daemons' last words after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not (found := what()):
            assert time.monotonic() < end, f"{why}: not within {timeout} s\n{self.last_words()}"
            time.sleep(0.2)
        return found

    def last_words(self, lines: int = 20) -> str:
        """The end of every daemon's log."""
        logs = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-lines:]) for log in logs)

    def crash(self, name: str) -> None:
        """Cut a node's power: its slurmd, its job steps and its network card are gone at once, and nobody hears of it."""
        node, init = self._booted.pop(name)
        os.kill(init, 9)
        node.wait()

    def boot(self, name: str) -> None:
        """Start a node, again if it runs."""
        if name in self._booted:
            self.crash(name)
        address = f"{NETWORK}.{self.nodes.index(name) + 1}"
        connected = f"until ip -brief address show eth0 2>/dev/null | grep -q {address}; do sleep 0.05; done"
        hosts = self.folder / f"hosts-{name}"
        hosts.write_text(f"127.0.1.1 {name}\n" + (self.folder / "hosts").read_text())  # as Debian's installer does
        slurmd = shlex.join(["slurmd", "-D", "-f", str(self.folder / "slurm.conf")])
        start = f"hostname {name} && mount --bind {hosts} /etc/hosts && {connected} && {slurmd}; while :; do sleep 1; done"
        with open(self.folder / "log" / f"{name}.out.log", "a") as output:
            node = self.popen([*NEW, "sh", "-c", start], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        init = _descendant(node.pid, 2)  # of nsenter: unshare, and what it started
        self._booted[name] = node, init
        self._ip(self._init, f"link add to-{name} type veth peer name eth0 netns {init}")
        self._ip(self._init, f"link set to-{name} master bridge0 up")
        for command in ("link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up"):
            self._ip(init, command)

    def ready(self, timeout: float = 30) -> None:
        """Wait until all nodes take jobs."""

        def idle() -> bool:
            done = self.run(["sinfo", "--noheader", "--Node", "--partition=batch", "--format=%T"])
            return done.stdout.split() == ["idle"] * len(self.nodes)

        self.wait(idle, timeout, "all nodes idle")

    def processes(self) -> dict[int, str]:
        """Command lines of every process of the cluster, by the number that it has on the login host."""
        lines = self.check("ps", "-ww", "-e", "-o", "pid=,args=").splitlines()
        return {int(process): arguments for process, arguments in (line.split(None, 1) for line in lines)}

    def stop(self) -> None:
        """End everything, whatever it is doing."""
        if self._holder is not None:
            self._holder.kill()  # the end of init is the end of its namespace
            self._holder.communicate()
            for node, _ in self._booted.values():
                node.wait()
        self._holder, self._booted = None, {}

    def _start(self) -> None:
        for each in ("log", "state", *(f"spool/{name}" for name in self.nodes)):
            (self.folder / each).mkdir(parents=True)
        hosts = {"127.0.0.1": "localhost", f"{NETWORK}.254": LOGIN}
        hosts |= {f"{NETWORK}.{number}": name for number, name in enumerate(self.nodes, start=1)}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in hosts.items()))
        (self.folder / "resolv.conf").write_text("")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(
            login=LOGIN, network=NETWORK, folder=self.folder, nodes=",".join(self.nodes), first=self.nodes[0], cpus=self.cpus,
            memory=8000))  # fmt: skip
        bind = " && ".join(f"mount --bind {self.folder / file} /etc/{file}" for file in ("hosts", "resolv.conf"))
        (self.folder / "gres.conf").write_text(GPUS)
        self._holder = subprocess.Popen([*NEW, "sh", "-c", f"hostname {LOGIN} && {bind} && echo up && cat; exit"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        assert self._holder.stdout.readline() == b"up\n"
        self._init = _descendant(self._holder.pid, 1)
        for command in ("link set lo up", "link add bridge0 type bridge", f"address add {NETWORK}.254/24 dev bridge0",
                        "link set bridge0 up"):  # fmt: skip
            self._ip(self._init, command)
        munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed",
                 "log-file": "log/munge.log"}  # fmt: skip
        self.check("munged", "--force", *(f"--{option}={self.folder / file}" for option, file in munge.items()))
        self.check("slurmctld")
        for name in self.nodes:
            self.boot(name)
        self.ready()

    @staticmethod
    def _ip(process: int, command: str) -> None:
        """Run `ip` in the network of a process."""
        subprocess.run(["nsenter", f"--net=/proc/{process}/ns/net", "ip", *command.split()], check=True)


def _descendant(process: int, generations: int) -> int:
    """The only child of the only child ... of a process, as soon as there is one."""
    for _ in range(generations):
        children = Path(f"/proc/{process}/task/{process}/children")
        end = time.monotonic() + 60
        while not (found := children.read_text().split()):
            assert time.monotonic() < end, f"process {process} started nothing"
            time.sleep(0.01)
        process = int(found[0])
    return process


if __name__ == "__main__":  # a shell on the login host, for people who write the tests
    import tempfile

    with tempfile.TemporaryDirectory() as temporary, SlurmCluster(Path(temporary)) as cluster:
        sys.exit(cluster.popen(sys.argv[1:] or ["bash"], cwd=os.getcwd()).wait())
