"""Takes everything away from a process that is about to run what a model wrote. Linux on x86-64 and 64-bit Arm.

Three means of the kernel, none of which needs privileges everywhere:

- seccomp (Linux 3.5): system calls outside a short list fail with EPERM. That list has no sockets, no new processes and
  programs, no signals to others, and opens files for reading only; so there is no network, no fork bomb, and nothing on a disk
  can be made, changed or removed. Always needed.
- Landlock (Linux 5.13, where it is switched on): files outside given folders cannot be opened or listed.
- Namespaces: another root folder with nothing but the given folders, and a network without devices.

Standard library only: the file also runs by itself in an interpreter without packages.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable

LANDLOCK, NAMESPACES = "landlock", "namespaces"

# System calls of linux/arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
ALLOWED = {
    "x86_64": dict(
        read=0, write=1, close=3, stat=4, fstat=5, lstat=6, poll=7, lseek=8, mmap=9, mprotect=10, munmap=11, brk=12,
        rt_sigaction=13, rt_sigprocmask=14, rt_sigreturn=15, ioctl=16, pread64=17, pwrite64=18, readv=19, writev=20, access=21,
        pipe=22, select=23, sched_yield=24, mremap=25, madvise=28, dup=32, dup2=33, nanosleep=35, getitimer=36, alarm=37,
        setitimer=38, getpid=39, exit=60, uname=63, fcntl=72, getcwd=79, chdir=80, getdents=78, readlink=89, gettimeofday=96,
        getrlimit=97, getrusage=98, sysinfo=99, times=100, getuid=102, getgid=104, geteuid=107, getegid=108, getppid=110,
        getpgrp=111, sigaltstack=131, gettid=186, time=201, futex=202, sched_getaffinity=204, getdents64=217,
        set_tid_address=218, clock_gettime=228, clock_getres=229, clock_nanosleep=230, exit_group=231, newfstatat=262,
        readlinkat=267, faccessat=269, pselect6=270, ppoll=271, set_robust_list=273, dup3=292, pipe2=293, getcpu=309,
        getrandom=318, membarrier=324, statx=332, rseq=334, close_range=436, faccessat2=439,
    ),
    "aarch64": dict(
        getcwd=17, dup=23, dup3=24, fcntl=25, ioctl=29, faccessat=48, chdir=49, close=57, pipe2=59, getdents64=61, lseek=62,
        read=63, write=64, readv=65, writev=66, pread64=67, pwrite64=68, pselect6=72, ppoll=73, readlinkat=78, newfstatat=79,
        fstat=80, exit=93, exit_group=94, set_tid_address=96, futex=98, set_robust_list=99, nanosleep=101, getitimer=102,
        setitimer=103, clock_gettime=113, clock_getres=114, clock_nanosleep=115, sched_getaffinity=123, sched_yield=124,
        sigaltstack=132, rt_sigaction=134, rt_sigprocmask=135, rt_sigreturn=139, times=153, uname=160, getrlimit=163,
        getrusage=165, getcpu=168, gettimeofday=169, getpid=172, getppid=173, getuid=174, geteuid=175, getgid=176, getegid=177,
        gettid=178, sysinfo=179, brk=214, munmap=215, mremap=216, mmap=222, mprotect=226, madvise=233, getrandom=278,
        membarrier=283, statx=291, rseq=293, close_range=436, faccessat2=439,
    ),
}  # fmt: skip
# Allowed for some arguments only; clone3 hides its arguments and is said not to exist, so that the C library calls clone.
CHECKED = {
    "x86_64": dict(open=2, openat=257, clone=56, prlimit64=302, clone3=435),
    "aarch64": dict(openat=56, clone=220, prlimit64=261, clone3=435),
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LANDLOCK_CALLS = (444, 445, 446)  # create_ruleset, add_rule, restrict_self: the same on both

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_PDEATHSIG, _SECCOMP_MODE_FILTER = 38, 22, 1, 2
_RET_ALLOW, _RET_ERRNO, _RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
_CLONE_THREAD = 0x00010000
_OPEN_TO_CHANGE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEW_USER, _NEW_NS, _NEW_NET, _NEW_IPC = 0x10000000, 0x00020000, 0x40000000, 0x08000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 4096, 16384, 1 << 18, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def confine(means: Iterable[str], readable: Iterable[str], memory: int, output: int, seconds: int | None = None) -> None:
    """Confine this process, which must have one thread, for good.

    `means` of hiding files, of LANDLOCK and NAMESPACES, all of which are applied; `readable` folders and files stay. `memory`
    in bytes of address space on top of what is in use, `output` in bytes of a file, `seconds` of processor time. Raises OSError
    where the kernel refuses.
    """
    readable = [path for path in readable if os.path.exists(path)]
    memory += address_space()
    if NAMESPACES in means:
        new_root(readable)
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, output), (resource.RLIMIT_CPU, seconds),
                       (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):  # fmt: skip
        if most is not None:
            resource.setrlimit(kind, (most, most))
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    if LANDLOCK in means:
        landlock(readable)
    seccomp()


def address_space() -> int:
    """Bytes of address space that this process has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def landlock(readable: list[str]) -> None:
    """Deny every use of files but reading what is below `readable` (Documentation/userspace-api/landlock.rst)."""
    every = (1 << 13) - 1  # the rights of the first version
    read_file, read_folder = 1 << 2, 1 << 3
    attributes = struct.pack("<Q", every)
    ruleset = _checked(_libc.syscall(LANDLOCK_CALLS[0], attributes, ctypes.c_size_t(len(attributes)), 0), "Landlock")
    for path in readable:
        folder = os.path.isdir(path)
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("<Qi", read_file | read_folder if folder else read_file, descriptor)
        _checked(_libc.syscall(LANDLOCK_CALLS[1], ruleset, 1, rule, 0), f"Landlock rule for {path}")
        os.close(descriptor)
    _checked(_libc.syscall(LANDLOCK_CALLS[2], ruleset, 0), "Landlock")
    os.close(ruleset)


def new_root(readable: list[str]) -> None:
    """New user, mount, network and IPC namespaces; the root folder holds `readable`, and the network no device."""
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(_NEW_USER | _NEW_NS | _NEW_NET | _NEW_IPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    root = "/dev"  # a folder that is always there and that nothing readable lies in
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=64k,mode=755")
    done: list[str] = []
    for path in sorted(os.path.abspath(each) for each in readable):
        if any(path.startswith(f"{above}/") or path == above for above in done):
            continue
        if os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
        _mount(path, root + path, None, _MS_BIND | _MS_REC)
        done.append(path)
    os.chroot(root)
    os.chdir("/")


def seccomp() -> None:
    """Refuse all system calls but those of ALLOWED, and of CHECKED as they say (linux/seccomp.h, classic BPF)."""
    machine = platform.machine()
    if machine not in ALLOWED or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    checked = CHECKED[machine]
    refuse = _RET_ERRNO | errno.EPERM

    def load(offset: int) -> tuple:
        return (0x20, 0, 0, offset)  # a word of struct seccomp_data: nr 0, arch 4, arguments from 16, 8 bytes each

    def back(value: int) -> tuple:
        return (0x06, 0, 0, value)

    def argument(index: int, high: bool = False) -> tuple:
        return load(16 + 8 * index + 4 * high)

    program = [load(4), (0x15, 1, 0, AUDIT_ARCH[machine]), back(_RET_KILL), load(0)]
    for name, number in checked.items():
        if name == "clone3":
            body = [back(_RET_ERRNO | errno.ENOSYS)]
        elif name == "clone":  # threads only
            body = [argument(0), (0x45, 1, 0, _CLONE_THREAD), back(refuse), back(_RET_ALLOW)]
        elif name == "prlimit64":  # reading limits only: the pointer to new ones is null
            body = [argument(2), (0x15, 0, 2, 0), argument(2, high=True), (0x15, 1, 0, 0), back(refuse), back(_RET_ALLOW)]
        else:  # open and openat for reading
            body = [argument(1 if name == "open" else 2), (0x45, 0, 1, _OPEN_TO_CHANGE), back(_RET_ERRNO | errno.EACCES),
                    back(_RET_ALLOW)]  # fmt: skip
        program += [(0x15, 0, len(body), number), *body]
    for number in ALLOWED[machine].values():
        program += [(0x15, 0, 1, number), back(_RET_ALLOW)]
    program.append(back(refuse))
    code = b"".join(struct.pack("<HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]

    head = Filter(len(program), ctypes.addressof(buffer))
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(head), 0, 0), "seccomp")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    def text(value: str | None) -> bytes | None:
        return value.encode() if value is not None else None

    _checked(_libc.mount(text(source), text(target), text(kind), flags, text(data)), f"mount on {target}")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
