"""Names, weights, the user's own functions, and what happens when a reward raises or hangs."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_ext import rewards
from nemo_ext.errors import UserError
from nemo_ext.rewards.pool import Pool
from nemo_ext.rewards.worker import Job

OWN = """
import os, time
from helper import factor

def lengths(answers, rows):
    print("printing does no harm")
    return [factor * len(answer) + row.get("extra", 0) for answer, row in zip(answers, rows)]

def share(answers, rows):
    return [1 / len(answers)] * len(answers)

def fussy(answers, rows):
    if "boom" in answers:
        raise ValueError("boom\\nseen")
    if "hang" in answers:
        while True:
            time.sleep(1)
    if "die" in answers:
        os.kill(os.getpid(), 9)
    if "exit" in answers:
        raise SystemExit(3)
    if "nan" in answers:
        return [float("nan")] * len(answers)
    if "few" in answers:
        return []
    if "words" in answers:
        return ["good"] * len(answers)
    return [1] * len(answers)
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "helper.py").write_text("factor = 0.5")
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def test_every_name_has_a_line():
    built_in = "math numeric exact choice format length code reasoning_gym model judge"
    assert list(rewards.names()) == [*built_in.split(), "FILE.py:FUNCTION"]
    assert all(rewards.names().values())


def test_weighted_sum_and_its_parts():
    answers = ["<think>a</think><answer>3</answer>", "3", "<think>a</think><answer>4</answer>", ""]
    with rewards.build("numeric:1.0, format:0.25,length:-0.001", length_scale=1) as reward:
        found = reward.score(answers, [{"answer": "3"}] * 4)
        assert reward.weights == {"numeric": 1.0, "format": 0.25, "length": -0.001}
        assert reward([], []) == []
    assert found.parts == {"numeric": [1, 1, 0, 0], "format": [1, 0, 1, 0], "length": [1, 1, 1, 0]}
    assert found.total == pytest.approx([1.249, 0.999, 0.249, 0.0])
    assert (found.failures, found.message) == (0, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", "there is no reward maths, did you mean math?"),
        ("math,fromat:0.2", "there is no reward fromat, did you mean format?"),
        ("xyz", "there is no reward xyz: math, numeric"),
        ("", "there is no reward without a name"),
        ("exact,", "there is no reward without a name"),
        ("exact:high", "'high' behind exact: is no weight"),
        ("exact:nan", "the weight of exact must be a number other than 0"),
        ("exact:0", "the weight of exact must be a number other than 0"),
        ("exact,exact:2", "exact is named twice"),
        ("exact:1:2", "'1' behind exact: is no weight"),
        ("own.py", "a function of your own is named as own.py:FUNCTION"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("reasoning_gym:chain_sun", "there is no such task, did you mean chain_sum?"),
        ("model", "reward=model needs reward_model=hf:FOLDER"),
        ("judge", "reward=judge needs judge_url="),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(UserError) as caught:
        rewards.build(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf])
def test_timeouts_that_are_refused(timeout):
    with pytest.raises(UserError, match="reward_timeout="):
        rewards.build("math", timeout=timeout)


def test_function_of_the_users(own):
    with rewards.build(f"{own}:lengths:2,{own}:share", workers=2) as reward:
        reward.check([{}])
        found = reward.score(["a", "bb", "ccc"], [{}, {"extra": 1}, {}])
    assert found.parts == {f"{own}:lengths": [0.5, 2.0, 1.5], f"{own}:share": [1 / 3] * 3}
    assert found.total == pytest.approx([4 / 3, 13 / 3, 10 / 3])


@pytest.mark.parametrize(
    ("bad", "message"),
    [("boom", "ValueError: boom seen"), ("hang", "no result after 1.5 seconds"), ("die", "was killed by signal 9"),
     ("exit", "SystemExit: 3"), ("nan", "gave 'nan', which is no finite number"), ("few", "gave 0 values for one answer"),
     ("words", "ValueError: could not convert string to float")],
)  # fmt: skip
def test_what_fails_gets_nothing_and_is_counted(own, bad, message):
    with rewards.build(f"{own}:fussy", timeout=1.5 if bad == "hang" else 20, workers=2) as reward:
        reward.check([{}])
        started = time.monotonic()
        found = reward.score(["good", bad, "fine", bad], [{}] * 4)
        assert time.monotonic() - started < 20
        # a bad value is one answer's only where values came for all: here every one is bad, or each is asked for by itself
        expected = [0.0] * 4 if bad == "nan" else [1.0, 0.0, 1.0, 0.0]
        assert found.total == expected
        assert found.failures == expected.count(0.0)
        assert message in found.message
        assert reward(["good"], [{}]) == [1.0]


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [("def lenghts(a, r): pass", "lengths", "it has no function lengths, did you mean lenghts?"),
     ("import nowhere_to_be_found", "f", "No module named 'nowhere_to_be_found'"), ("1 / 0", "f", "ZeroDivisionError"),
     ("def f(:", "f", "SyntaxError"), ("f = 3", "f", "no function f")],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path, text, function, message):
    (tmp_path / "bad.py").write_text(text)
    with rewards.build(f"{tmp_path}/bad.py:{function}", workers=1) as reward, pytest.raises(UserError) as caught:
        reward.check([{}])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_threads_share_the_workers():
    with rewards.build("math", workers=2) as reward, ThreadPoolExecutor(4) as threads:
        batches = [([rf"\boxed{{{n + k}}}" for k in range(8)], [{"answer": str(n + 3)}] * 8) for n in range(12)]
        jobs = [threads.submit(reward, *batch) for batch in batches]
        assert [job.result().index(1.0) for job in jobs] == [3] * 12


def test_called_from_a_thread_where_signals_do_not_work():
    found = []
    with rewards.build("math", workers=1) as reward:
        thread = threading.Thread(target=lambda: found.extend(reward([r"\boxed{\frac{1}{2}}"], [{"answer": r"\frac{2}{4}"}])))
        thread.start()
        thread.join()
    assert found == [1.0]


PARENT = """
import sys, time
from nemo_ext.rewards.pool import Pool
from nemo_ext.rewards.worker import Job
pool = Pool(Job("nemo_ext.rewards.user:load", (sys.argv[1], "fussy")), 1)
pool.start()
print("ready", flush=True)
pool.map([(["hang"], [{}])], 600)
"""


def test_workers_end_with_a_killed_parent(own):
    environment = os.environ | {"PYTHONPATH": str(Path(rewards.__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(own)], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout.readline() == b"ready\n"
    below = children(parent.pid)
    assert len(below) == 2  # the keeper and the process that scores
    time.sleep(0.3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, below)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, below))


def children(pid):
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found += [int(folder.name), *children(int(folder.name))]
        except OSError:
            continue
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_keeper_is_replaced(own):
    pool = Pool(Job("nemo_ext.rewards.user:load", (str(own), "fussy")), 1)
    try:
        pool.start()
        (keeper,) = [each._process.pid for each in pool._started]
        os.kill(keeper, signal.SIGKILL)
        assert pool.map([(["good"], [{}])], 5)[0].error == "the process that scores ended"
        assert pool.map([(["good"], [{}])], 5)[0].values == [1.0]
    finally:
        pool.close()
