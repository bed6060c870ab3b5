"""Cores and memory against cgroup files laid out as the kernel's documentation describes, versions 1 and 2."""

import os
import subprocess
import sys

import pytest

from nemo_ext.platform import hardware

GIB = 1024**3


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty system with 16 cores and 64 GiB; `write(path, text)` adds a file."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")

    write("proc/meminfo", f"MemTotal:       {64 * 1024**2} kB\nMemFree: 1 kB\nMemAvailable: {40 * 1024**2} kB")
    tmp_path.joinpath("sys/fs/cgroup").mkdir(parents=True)
    return tmp_path, write


def test_no_cgroup(root):
    path, _ = root
    assert hardware.usable_cores(path) == 16
    assert hardware.usable_memory(path) == 64 * GIB and hardware.free_memory(path) == 40 * GIB


def test_version_2_takes_the_tightest_ancestor(root):
    path, write = root
    write("proc/self/cgroup", "0::/user/job")
    write("sys/fs/cgroup/user/job/cpu.max", "max 100000")
    write("sys/fs/cgroup/user/cpu.max", "350000 100000")  # three and a half cores
    write("sys/fs/cgroup/user/job/memory.max", str(8 * GIB))
    write("sys/fs/cgroup/user/memory.max", "max")
    assert hardware.usable_cores(path) == 4
    assert hardware.usable_memory(path) == hardware.free_memory(path) == 8 * GIB
    write("sys/fs/cgroup/user/job/memory.current", str(7 * GIB))
    assert hardware.free_memory(path) == GIB
    write("sys/fs/cgroup/user/job/memory.stat", f"anon {5 * GIB}\nfile {2 * GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}")
    assert hardware.free_memory(path) == 2.5 * GIB  # without the pages of files
    write("sys/fs/cgroup/user/memory.max", str(10 * GIB))
    write("sys/fs/cgroup/user/memory.current", str(9 * GIB))  # other jobs of the user's
    assert hardware.free_memory(path) == GIB
    write("sys/fs/cgroup/user/memory.current", str(11 * GIB))
    assert hardware.free_memory(path) == 0


def test_version_2_in_a_container_whose_host_path_is_not_mounted(root):
    path, write = root
    write("proc/self/cgroup", "0::/../../docker/0123")
    write("sys/fs/cgroup/cpu.max", "50000 100000")
    write("sys/fs/cgroup/memory.max", str(2 * GIB))
    assert hardware.usable_cores(path) == 1
    assert hardware.usable_memory(path) == 2 * GIB


def test_version_1(root):
    path, write = root
    write("proc/self/cgroup", "9:name=systemd:/x\n4:memory:/job\n2:cpu,cpuacct:/job")
    write("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "200000")
    write("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000")
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1")
    write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000")
    write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", str(4 * GIB))
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))  # nobody set it
    assert hardware.usable_cores(path) == 2
    assert hardware.usable_memory(path) == 4 * GIB
    write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", str(3 * GIB))
    write("sys/fs/cgroup/memory/job/memory.stat", f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0")
    assert hardware.free_memory(path) == 2 * GIB  # with what the cgroups below hold
    write("proc/meminfo", f"MemAvailable: {1024**2} kB")
    assert hardware.free_memory(path) == GIB


def test_this_machine():
    machine = hardware.detect()
    assert 1 <= machine.cpu_count <= os.cpu_count()
    assert 0 < machine.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < hardware.free_memory() <= machine.memory_bytes
    assert machine.cuda == hardware.has_cuda() == bool(machine.gpus)


@pytest.mark.skipif(hardware.has_cuda(), reason="this machine has CUDA")
def test_without_a_driver_torch_is_not_imported():
    code = (
        "import sys; from nemo_ext.platform import hardware; assert not hardware.detect().cuda; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.skipif(hardware.has_cuda(), reason="peak memory is the GPU's where there is one")
def test_peak_memory_grows_by_what_is_held():
    before = hardware.peak_memory()
    block = bytearray(os.urandom(1)) * (256 * 1024**2)
    grown = hardware.peak_memory() - before
    assert len(block) == 256 * 1024**2
    assert grown <= 300 * 1024**2
    assert hardware.peak_memory() >= 256 * 1024**2


@pytest.mark.gpu
@pytest.mark.skipif(not hardware.has_cuda(), reason="needs a CUDA GPU")
def test_gpus_are_those_of_nvidia_smi():
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    listed = [line.split(", ") for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()]
    machine = hardware.detect()
    assert [gpu.name for gpu in machine.gpus] == [name for name, _ in listed]
    for gpu, (_, mebibytes) in zip(machine.gpus, listed, strict=True):
        assert gpu.memory_bytes == pytest.approx(int(mebibytes) * 1024**2, rel=0.05)


FREED = """
import resource
from nemo_ext.platform import hardware

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

bytearray(b"x") * (30 << 20)  # freed at once: from now on malloc takes what is smaller from its heap
before = resident()
blocks = [bytearray(b"x") * (3 << 20) for _ in range(100)]
kept = blocks[-1]
del blocks
freed = resident()
hardware.return_free_memory()
print(before, freed, resident())
"""


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="not the GNU C library")
def test_freed_memory_goes_back_to_the_system():
    """300 MB in blocks of 3 MB that are freed, but for the last."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    before, freed, returned = map(int, done.stdout.split())
    assert freed > before + 250 and returned < before + 30, (done.stdout, done.stderr)
