"""A run that loses a process, then hangs, then holds Python's lock in all its processes, ends with the weights of the run that
nothing happened to; a sweep goes past a run that fails.

The runs go side by side, each on two processes: what they listen on does not meet.
"""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Command, at_step, figures, same, summary

from nemo_ext import faults, run_folder

pytestmark = pytest.mark.slow

STEPS, EVERY, KILLED, HUNG, HELD = 60, 20, 25, 45, 50
HANGING = Path(__file__).with_name("hanging")  # its sitecustomize.py lets rank 1 fall asleep once, and all hold Python's lock


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """What the commands said, by name."""
    folder = tmp_path_factory.mktemp("faults")
    keys = (f"steps={STEPS}", f"every={EVERY}", "keep=5", "val_every=30", "gpus=2", "tp=1", "async_save=false", "restarts=3")

    def broken():
        path = os.pathsep.join(filter(None, [str(HANGING), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": path, "HANG_ONCE": str(folder / "once"),
                       "HANG_STEP": str(HUNG), "HOLD_STEP": str(HELD)}  # fmt: skip
        command = Command(small, *keys, f"out={folder / 'broken'}", "hang_timeout=10", **environment)
        command.when(at_step(KILLED)).workers()[1].kill()
        return command.end()

    def sweep():
        """The first run has no fault; the loss of the second goes up somewhere."""
        sweep = ("sweep.spike_factor=[9.0,1.0001]", "on_spike=stop", "spike_window=2")
        return Command(small, *keys, *sweep, f"out={folder / 'sweep'}").end()

    with ThreadPoolExecutor(2) as pool:
        results = {scenario.__name__: pool.submit(scenario) for scenario in (broken, sweep)}
        whole = folder / "sweep" / "spike_factor-9.0"
        return SimpleNamespace(folder=folder, whole=whole, **{name: future.result() for name, future in results.items()})


def test_killed_and_hung_ranks_do_not_change_the_result(runs):
    assert runs.broken.code == 0, runs.broken
    assert runs.broken.orphans == []
    same(figures(runs.whole), figures(runs.folder / "broken"), 0)


def test_restarts_are_told_and_counted(runs):
    first, second, third = faults.read(runs.folder / "broken")
    assert first["message"] == "rank 1 was killed (SIGKILL; out of memory?)" and first["step"] == EVERY
    where = f"{runs.folder / 'broken' / 'logs' / 'rank*.stacks'} has the stack of every process"
    hung = re.escape(f"at step {HUNG}: rank 1 did not arrive (reading data): {where}")
    assert re.fullmatch(rf"the run stood still for \d+ s {hung}", second["message"]), second
    held = re.escape(str(runs.folder / "broken" / "logs")) + r"/rank[01]\.stacks has its stacks\)"
    assert re.fullmatch(rf"rank [01] was killed \(SIGKILL; it stood still: {held}", third["message"]), third
    assert second["step"] == third["step"] == 2 * EVERY
    lines = runs.broken.output.splitlines()
    for number, (fault, step) in enumerate([(first, EVERY), (second, 2 * EVERY), (third, 2 * EVERY)], start=1):
        assert f"{fault['message']}: restart {number} of 3, from step {step}" in lines
    assert summary(runs.folder / "broken")["faults"] == {"restarts": 3}
    assert re.search(r"^faults +3 restarts$", runs.broken.output, re.M)
    assert "restarts" not in summary(runs.whole).get("faults", {})


def test_every_process_left_its_stack(runs):
    logs = runs.folder / "broken" / "logs"
    sleeping, waiting = (logs / "rank1.stacks").read_text(), (logs / "rank0.stacks").read_text()
    assert "fall_asleep" in sleeping and "fall_asleep" not in waiting
    assert "torch/distributed" in waiting or "megatron/core/distributed" in waiting
    assert "hold_the_lock" in sleeping and "hold_the_lock" in waiting
    assert list((runs.whole / "logs").glob("*.stacks")) == []


def test_a_sweep_goes_past_a_run_that_fails(runs):
    """And a failure that would only come again is no reason to start again."""
    assert runs.sweep.code == 1 and runs.sweep.orphans == []
    out = runs.folder / "sweep"
    best, failed = json.loads((out / "sweep.json").read_text())["points"]
    assert best["values"] == {"spike_factor": 9.0} and best["status"] == "complete" and best["steps"] == STEPS
    assert best["val_loss_after"] == run_folder.read_records(out / best["name"])[1][-1]["val_loss"]
    assert re.match(r"failed: loss \d\.\d+, above 1.0001 times the median \d\.\d+ at step \d+: lower lr=", failed["status"])
    assert failed["val_loss_after"] is None and faults.read(out / failed["name"]) == []
    assert f"error: {failed['message']}" in runs.sweep.output
    table = (out / "sweep.md").read_text()
    assert f"| 9.0 | {best['val_loss_after']:.4f} |" in table and table.index("| 9.0 |") < table.index("| 1.0001 |")
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
