"""The reward `code` and its sandbox, with programs that do harm. Nothing here is simulated: the harm is tried."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_ext import rewards
from nemo_ext.errors import UserError
from nemo_ext.rewards import jail, sandbox

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
ECHO = {"inputs": ["1 2\n", "10\n20\n"], "outputs": ["3", "30\n"]}
READS = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
MODES = [mode for mode in ("landlock", "namespaces") if not sandbox._refusal((mode,))]

pytestmark = pytest.mark.skipif(not MODES, reason="this kernel offers neither Landlock nor user namespaces")


@pytest.fixture(scope="module")
def reward():
    with rewards.build("code", timeout=5, workers=2) as built:
        yield built


@pytest.mark.parametrize(
    ("tests", "answer", "right"),
    [
        (TESTS, f"```python\n{ADD}\n```", 1),
        ("\n".join(TESTS), ADD, 1),
        (TESTS, ADD.replace("+", "-"), 0),
        (TESTS, "", 0),
        (TESTS, "def add(a, b)", 0),
        (TESTS, "I cannot do that", 0),
        (TESTS, "raise SystemExit(0)", 0),
        (TESTS, "import os; os._exit(0)", 0),
        (TESTS, f"{ADD}\nif __name__ == '__main__':\n    raise ValueError", 1),
        (TESTS, f"import math, collections, itertools, heapq, re, json, decimal, datetime, random\n{ADD}", 1),
        (ECHO, READS, 1),
        (ECHO, "a = input().split()\nwhile len(a) < 2:\n    a += input().split()\nprint(int(a[0]) + int(a[1]), ' ')\nprint()", 1),
        (ECHO, f"{READS}\nraise SystemExit", 1),
        (ECHO, "print(3)", 0),
        (ECHO, f"{READS}\n1 / 0", 0),
        ([{"input": "2", "output": "4"}], "print(int(input()) ** 2)", 1),
        ('[{"input": "2", "output": "4"}]', "print(int(input()) ** 2)", 1),
        ([{"input": ["1", "2"], "output": ["2", "1"]}], "a, b = input(), input()\nprint(b)\nprint(a)", 1),
    ],
)
def test_programs(reward, tests, answer, right):
    row = {"tests": tests}
    reward.check([row])
    assert reward.score([answer], [row]).total == [right]


def test_entry_point(reward):
    row = {"tests": "def check(candidate):\n    assert candidate(2, 2) == 4", "entry_point": "add"}
    assert reward([ADD, ADD.replace("+", "-")], [row, row]) == [1.0, 0.0]


HOSTILE = {
    "endless loop": "while True: pass",
    "endless C": "9**9**9",
    "sleep": "import time; time.sleep(1000)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork": "import os\nos.fork()",
    "program": "import subprocess; subprocess.run(['/bin/true'])",
    "shell": "import os\nassert os.system('true') == 0",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    "memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "memory at once": "x = bytearray(10**12)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "flood": "while True: print('x' * 10**6)",
    "flood of errors": "import os\nfor n in range(10**4): os.write(2, b'x' * 10**6)\nraise ValueError",
    "flood of results": "import os\nfor n in range(64):\n try: os.write(n, b'x' * 10**6)\n except OSError: pass\nraise KeyError",
    "/etc/passwd": "open('/etc/passwd').read()",
    "~/.ssh": "import os; assert os.listdir(os.path.expanduser('~/.ssh'))",
    "secret": "open({secret!r}).read()",
    "secret by link": "import os\nos.symlink({secret!r}, 'link')\nopen('link').read()",
    "secret by /proc": "open('/proc/self/root' + {secret!r}).read()",
    "environment": "import os\nassert os.environ['LLM_BUILDER_SECRET']",
    "parent's environment": "open(f'/proc/{{__import__(\"os\").getppid()}}/environ').read()",
    "delete": "import os\nos.remove({secret!r})",
    "delete folder": "import shutil\nshutil.rmtree({folder!r})",
    "overwrite": "open({secret!r}, 'w').write('gone')",
    "truncate": "import os\nos.truncate({secret!r}, 0)",
    "rename": "import os\nos.rename({secret!r}, {secret!r} + '.gone')",
    "permissions": "import os\nos.chmod({secret!r}, 0o777)",
    "new file": "open({folder!r} + '/new', 'w')",
    "new file in /tmp": "open('/tmp/llm-builder-left-behind', 'w')",
    "new file here": "open('llm-builder-left-behind', 'w')",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
    "unix socket": "import socket\nsocket.socketpair()",
    "name": "import socket\nsocket.gethostbyname('localhost')",
    "kill": "import os\nos.kill({pid}, 9)",
    "kill parent": "import os\nos.kill(os.getppid(), 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "raise limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "trace": "import ctypes\nassert ctypes.CDLL(None, use_errno=True).ptrace(16, {pid}, 0, 0) == 0",
    "mount": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "leave root": "import os\nos.chroot('.')",
    "close": "import os\nos.closerange(0, 64)\nwhile True: pass",
    "bytes": "open(0, 'wb').write(b'x' * 10**9)",
}
SLOW = 0.6  # seconds


@pytest.mark.parametrize("mode", MODES)
def test_hostile_programs_cost_bounded_time_give_nothing_and_leave_nothing(tmp_path, monkeypatch, mode):
    import socket

    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    monkeypatch.setenv("LLM_BUILDER_SECRET", "secret")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    server = socket.create_server(("127.0.0.1", 0))
    names = {"secret": str(secret), "folder": str(tmp_path), "port": server.getsockname()[1], "pid": victim.pid}
    programs = {name: text.format(**names) for name, text in HOSTILE.items()}
    before = processes()
    try:
        with rewards.build("code", timeout=SLOW, workers=2, sandbox=mode) as reward:
            for tests in ([{"input": "", "output": ""}], ["assert True"]):
                started = time.monotonic()
                found = reward.score(list(programs.values()), [{"tests": tests}] * len(programs))
                seconds = time.monotonic() - started
                assert [name for name, value in zip(programs, found.total, strict=True) if value] == []
                assert found.failures == 0
                assert seconds < len(programs) * (SLOW + 1.0) / 2
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
        server.close()
    assert secret.read_text() == "secret"
    assert secret.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert not any(Path(folder, "llm-builder-left-behind").exists() for folder in ("/tmp", "/", "."))
    assert processes() <= before | {victim.pid}


def processes():
    """Processes of the sandbox."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"program.py" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def test_harmless_programs_of_the_same_kind_pass(reward):
    """What the hostile programs do is refused, and not whatever a program does."""
    thread = "import threading\nthread = threading.Thread(target=print, args=('a',))\nthread.start()\nthread.join()"
    lines = ("import numpy", "x = bytearray(10**8)", "import time\ntime.sleep(0.01)", "import tempfile, os, asyncio, zoneinfo")
    programs = [thread, *(f"{line}\nprint('a')" for line in lines)]
    assert reward(programs, [{"tests": [{"input": "", "output": "a"}]}] * len(programs)) == [1.0] * len(programs)


def test_all_tests_share_the_time():
    with rewards.build("code", timeout=0.6, workers=1) as reward:
        started = time.monotonic()
        row = {"tests": [{"input": "", "output": ""}] * 40}
        assert reward(["import time; time.sleep(0.2)"], [row]) == [0.0]
        assert time.monotonic() - started < 6  # forty tests take eight


@pytest.mark.parametrize(
    ("tests", "message"),
    [([], "there is none"), (["assert ("], "cannot be read"), ([{"in": 1}], "cannot be read"), ('["x', "cannot be read"),
     ({"inputs": ["1"], "outputs": []}, "cannot be read"), (7, "cannot be read"), (None, "no `tests`")],
)  # fmt: skip
def test_tests_that_cannot_be_read(reward, tests, message):
    with pytest.raises(UserError, match=message) as caught:
        reward.check([{"tests": tests}])
    assert "\n" not in str(caught.value)


def test_description_says_what_keeps_programs_in():
    found = sandbox.describe()
    assert "seccomp" in found["network"] and ("namespace" in found["network"]) == ("namespaces" in MODES)
    assert ("Landlock" in found["reading files"]) == ("landlock" in MODES)


def test_refused_where_isolation_cannot_be_had(tmp_path):
    """In a process whose kernel refuses: sixteen layers of Landlock are the most, and within one nothing can be mounted."""
    program = """
import ctypes, struct
from nemo_ext.errors import UserError
from nemo_ext import rewards
from nemo_ext.rewards import jail, sandbox
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
for _ in range(16):
    rules = libc.syscall(444, struct.pack("<Q", 1 << 9), ctypes.c_size_t(8), 0)
    assert libc.syscall(446, rules, 0) == 0
for mode in ("auto", "landlock", "namespaces"):
    for name in ("code", "reasoning_gym:chain_sum"):
        try:
            rewards.build(name, sandbox=mode)
        except UserError as error:
            print(error)
print(sandbox.describe()["sandbox"])
with rewards.build("math", workers=1) as reward:
    print(reward(["1"], [{"answer": "1"}]))
"""
    if "landlock" not in MODES:
        pytest.skip("this kernel has no Landlock")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert ended.returncode == 0, ended.stderr
    *refused, described, value = ended.stdout.splitlines()
    assert len(refused) == 6 and all("cannot be isolated here" in line for line in refused)
    assert "cannot be isolated" in described
    assert value == "[1.0]"  # math runs nothing of an answer, and needs no isolation


def test_unknown_mode():
    with pytest.raises(UserError, match="sandbox=docker: must be one of auto, landlock, namespaces"):
        rewards.build("code", sandbox="docker")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_numbers_of_system_calls(machine):
    """Against the kernel's own headers."""
    header = Path("/usr/include", {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}[machine])
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    text = header.read_text()
    for name, number in (jail.ALLOWED[machine] | jail.CHECKED[machine]).items():
        name = {"newfstatat": "3264_fstatat", "fstat": "3264_fstat", "fcntl": "3264_fcntl", "lseek": "3264_lseek",
                "mmap": "3264_mmap", "uname": "newuname"}.get(name, name) if machine == "aarch64" else name  # fmt: skip
        names = (f"__NR_{name}", f"__NR3264_{name.removeprefix('3264_')}", "__NR_uname" if name == "newuname" else "")
        assert any(line.split()[1:3] == [each, str(number)] for line in text.splitlines() for each in names), name
