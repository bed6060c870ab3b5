"""Runs through the command: killed, stopped, out of space, gone on with, and compared with the run that was left alone.

Start-up is most of a run's time, so the runs that do not depend on each other go side by side, two at a time.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from commands import Command, at_step, figures, same, saved, starting, summary, writing

from nemo_ext import run_folder

STEPS = 12


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """The results of all runs, by name."""
    folder = tmp_path_factory.mktemp("runs")
    keys = (f"steps={STEPS}", "every=4", "val_every=4")

    def whole():
        return [Command(small, *keys, f"out={folder / 'whole'}").end()]

    def killed_while_saving():
        """The launcher is killed while a checkpoint is half-written; what it left goes on at another layout."""
        out = folder / "killed"
        first = Command(small, *keys, f"out={out}", "async_save=true").when(writing(8)).signal(signal.SIGKILL).end()
        left = sorted(path.name for path in (out / "checkpoints").iterdir())
        yield SimpleNamespace(**vars(first), left=left)
        yield Command(small, *keys, f"out={out}", "gpus=2", "tp=2").end()

    def stopped():
        """Stopped by a signal, gone on with by the same command, with a stop before the first step in between."""
        out = folder / "stopped"
        one = ("config=" + str(folder / "given.yaml"), f"out={out}")
        (folder / "given.yaml").write_text("\n".join(key.replace("=", ": ", 1) for key in (*small.keys, *keys)))
        yield Command(small, *one).when(at_step(1)).signal(signal.SIGTERM).end()
        yield Command(small, *one).when(starting).signal(signal.SIGINT).end()
        yield Command(small, *one).end()

    def not_a_number():
        return [Command(small, "steps=100", "lr=1e30", "clip=0", "warmup=0", f"out={folder / 'nan'}").end()]

    def full_disk():
        """A file system of 40 MB fills up behind the first checkpoint and is made space on; then two signals, whose second does
        not wait."""
        disk = folder / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True, text=True)
        if mounted.returncode:
            return [mounted.stderr.strip()]
        try:
            keys = ("steps=100000", "every=20", f"out={disk / 'run'}", "async_save=true")
            command = Command(small, *keys).when(saved(20))
            with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
                while ballast.write(bytes(100_000)):
                    pass
            full = command.end()
            newest = run_folder.newest_checkpoint(disk / "run" / "checkpoints")
            shutil.copytree(disk / "run", folder / "full", ignore=shutil.ignore_patterns("checkpoints"))
            (disk / "ballast").unlink()
            command = Command(small, *keys).when(saved(newest[0] + 20))
            command.workers()[0].suspend()
            command.signal(signal.SIGTERM)
            time.sleep(0.3)
            again = command.signal(signal.SIGTERM).end()
            shutil.copytree(disk / "run", folder / "filled")
            again.out = folder / "filled"
            return [full, newest, again]
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    scenarios = (stopped, killed_while_saving, full_disk, whole, not_a_number)
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda scenario: (scenario.__name__, list(scenario())), scenarios)
        return SimpleNamespace(folder=folder, **dict(results))


def test_a_whole_run(runs):
    (result,) = runs.whole
    assert (result.code, result.error) == (0, ""), result
    found = summary(runs.folder / "whole")
    assert found["steps"] == STEPS and found["tokens"] == STEPS * 256 and found["resumed_from_step"] == 0
    assert found["val_loss_after"] < found["val_loss_before"] - 0.02
    assert {"layout", "tokens_per_s", "val_ppl_before", "val_ppl_after"} <= found.keys()
    assert sorted(p.name for p in (runs.folder / "whole" / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    assert {p.stem for p in (runs.folder / "whole" / "plots").iterdir()} == {"loss", "val_loss", "lr", "grad_norm", "throughput"}
    assert [step for step, name in figures(runs.folder / "whole") if name == "val_loss"] == [0, 4, 8, 12]


def test_sigkill_while_a_checkpoint_is_written(runs):
    first, again = runs.killed_while_saving
    assert first.code == -signal.SIGKILL and first.orphans == []
    assert first.left == ["step-000004", "step-000008.partial"]
    assert again.code == 0 and "from step 4" in again.output
    assert summary(again.out)["resumed_from_step"] == 4
    assert sorted(p.name for p in (again.out / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    same(figures(runs.folder / "whole"), figures(again.out), 1e-5)


def test_a_signal_saves_and_the_same_command_goes_on(runs):
    first, early, last = runs.stopped
    assert first.code == 128 + signal.SIGTERM and first.orphans == []
    step = int(re.search(r"stopped by SIGTERM; the same command continues from step (\d+)", first.output)[1])
    assert 1 <= step < STEPS
    assert early.code == 128 + signal.SIGINT and f"stopped by SIGINT; the same command continues from step {step}" in early.output
    assert early.orphans == [] and last.code == 0 and f"from step {step}" in last.output
    assert summary(last.out)["resumed_from_step"] == step
    same(figures(runs.folder / "whole"), figures(last.out), 0)  # config= repeated it, stopped or not, to the last bit


def test_a_loss_that_is_no_number(runs):
    (result,) = runs.not_a_number
    assert result.code == 1
    said = r"error: (loss|gradient|gradient norm) is (nan|inf) at step \d+: lower lr=.*\n"
    assert re.fullmatch(said, result.error), result.error


def test_a_disk_that_fills_while_training(runs):
    """The checkpoints before it stay, and the run goes on when there is space again, as if there always had been."""
    if isinstance(runs.full_disk[0], str):
        pytest.skip(f"a small file system needs the right to mount one: {runs.full_disk[0]}")
    full, (step, _), again = runs.full_disk
    assert full.code == 1 and full.orphans == []
    assert re.fullmatch(r"error: the disk is full: \S+: make space, the same command continues.*\n", full.error)
    assert f"from step {step}\n" in again.output
    assert again.code == 128 + signal.SIGTERM and again.orphans == []
    assert int(re.search(r"continues from step (\d+)", again.output)[1]) >= step + 20
    undisturbed, after = run_folder.read_records(runs.folder / "full")[0], figures(again.out)
    assert undisturbed[-1]["step"] > step  # steps that the second start made again
    for record in undisturbed:
        assert all(after[record["step"], name] == record[name] for name in ("loss", "lr", "grad_norm")), record
