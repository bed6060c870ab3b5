"""What this machine has: GPUs, cores and memory that this process may really use, cgroup limits of a container included."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path

# Device nodes of NVIDIA's driver: on a bare or virtual machine, in a container, under WSL 2, on Jetson. Where none exists CUDA
# cannot work, and torch (seconds to import) need not be asked.
NVIDIA_NODES = ("nvidiactl", "nvidia0", "dxg", "nvhost-gpu", "nvmap")

# A memory limit of cgroup v1 that nobody set is the largest multiple of the page size in 63 bits.
UNLIMITED_MEMORY = 1 << 60


@dataclass(frozen=True)
class Gpu:
    """One GPU: marketing name, total memory in bytes, CUDA compute capability as (major, minor)."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What one node offers to this process."""

    gpus: tuple[Gpu, ...]
    cuda: bool  # torch can use a GPU
    cpu_count: int  # cores this process may use: affinity and cgroup quota counted
    memory_bytes: int  # physical memory, or the cgroup's limit where that is lower


@functools.cache
def has_cuda() -> bool:
    """Whether torch can use a GPU here. Cheap on machines without NVIDIA's driver."""
    if not any((Path("/dev") / node).exists() for node in NVIDIA_NODES):
        return False
    import torch

    return torch.cuda.is_available()


def detect() -> Machine:
    """Look at this machine. Imports torch only where NVIDIA's driver is present; creates no CUDA context."""
    cuda = has_cuda()
    return Machine(gpus=_gpus() if cuda else (), cuda=cuda, cpu_count=usable_cores(), memory_bytes=usable_memory())


def return_free_memory() -> None:
    """Give back to the system what malloc keeps of freed tensors. Nothing where the C library is none of GNU's.

    Glibc returns a freed block of less than 32 MiB only from the end of its heap: on a CPU a step's activations stay resident.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def peak_memory() -> int:
    """Most bytes this process has held at once so far: allocated tensors of its GPU, or its resident memory without CUDA."""
    if has_cuda():
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def _gpus() -> tuple[Gpu, ...]:
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(p.name, p.total_memory, (p.major, p.minor)) for p in properties)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores by scheduler affinity and by the CPU quota of the cgroups above this process (a half core counts as one)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [cores]
    for folder in _cgroup_folders(root, "cpu"):
        if (limit := _read(folder / "cpu.max")) is not None:  # v2: "max 100000" or "200000 100000", microseconds
            quota, period = limit.split()
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota not in (None, "max", "-1") and period:
            quotas.append(math.ceil(int(quota) / int(period)))
    return max(1, min(quotas))


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process can have: the machine's, or less where a cgroup above it says so."""
    return min([*_meminfo(root, "MemTotal"), *_memory_limits(root).values()], default=0)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process can still take: what the kernel calls available, or less where a cgroup above it has less
    left of its limit. Pages of files count as free: the kernel drops them for others.
    """
    left = _meminfo(root, "MemAvailable")
    for folder, limit in _memory_limits(root).items():
        used = int(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes") or 0)  # v2, v1
        stat = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
        files = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("inactive_file", "active_file"))
        left.append(max(0, limit - max(0, used - files)))
    return min(left, default=0)


def _meminfo(root: Path, name: str) -> list[int]:
    """A figure of /proc/meminfo in bytes; none where there is none."""
    lines = (_read(root / "proc/meminfo") or "").splitlines()
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")]


def _memory_limits(root: Path) -> dict[Path, int]:
    """Bytes that the cgroups above this process may have together, of those with a limit."""
    limits = {}
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # v2, v1
            limit = _read(folder / name)
            if limit not in (None, "max") and int(limit) < UNLIMITED_MEMORY:
                limits[folder] = int(limit)
    return limits


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's cgroup and those above it, for version 2 and for version 1's `controller` (cgroups(7)).

    Inside a container /proc may name a path of the host that is not mounted; its ancestors end at the mount, which then is
    the container's own cgroup.
    """
    folders = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controller, root / "sys/fs/cgroup" / controllers]
        else:
            continue
        own = Path(path.lstrip("/"))
        folders += [mount / part for mount in mounts for part in (own, *own.parents) if (mount / part).is_dir()]
    return list(dict.fromkeys(folders))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
