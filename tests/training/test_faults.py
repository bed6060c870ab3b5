"""Steps that would spoil a run are kept out: it learns, to the last bit, what a run learns that undoes them by hand."""

import json
import math
import random

import pytest
import torch

from nemo_ext import faults, report, run_folder
from nemo_ext.callbacks.stragglers import PERSISTENT, WINDOW, Stragglers, ratios
from nemo_ext.callbacks.watchdog import late

KEYS = dict(steps=8, every=4, keep=3, val_every=8, micro_batch=2)
BY_HAND = {**KEYS, "keep": 0}
SKIP = {**KEYS, "on_nan": "skip", "keep": 0}
ROLL_BACK = {**KEYS, "on_nan": "rollback"}
SPIKE = {**KEYS, "on_spike": "skip", "spike_factor": 1.2, "spike_window": 5}
SLOW = dict(steps=32, keep=0, val_batches=0, global_batch=2, micro_batch=1)


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")

    def case(name, keys, more=None, **callbacks):
        return dict(name=name, keys=keys, callbacks={**callbacks, "Weights": dict(out=str(folder / name))}, **(more or {}))

    broken, undone, returned = dict(step=6), dict(copied_at=5, back_at=6), dict(copied_at=4, back_at=6)
    bf16 = dict(precision="bf16")
    one = [
        case("skipped", SKIP, BrokenBatch=broken),
        case("undone", BY_HAND, Return=undone),
        case("rolled_back", ROLL_BACK, BrokenWeights=broken),
        case("returned", BY_HAND, Return=returned),
        case("rolled_back_bf16", {**ROLL_BACK, **bf16}, BrokenBatch=broken),
        case("returned_bf16", {**BY_HAND, **bf16}, Return=returned),
        case("spike_stopped", SPIKE, dict(stop_at=3), LoudStep=broken),
        case("spike", {**SPIKE, "keep": 1}, dict(continue_copy_of="spike_stopped"), LoudStep=broken),
    ]
    two = [
        case("skipped_pp2", {**SKIP, "pp": 2}, BrokenBatch=dict(step=6, rank=1)),
        case("rolled_back_dp2", ROLL_BACK, BrokenBatch=dict(step=6, rank=1)),
        case("slow", SLOW, SlowRank=dict(rank=1, times=4)),
    ]
    train(one, 1, into=folder)
    train(two, 2, into=folder)
    return folder


def learnt(runs, name):
    return torch.load(runs / name / "weights.pt")


def figures(runs, name):
    steps, held_out = run_folder.read_records(runs / name)
    assert [record["step"] for record in steps] == list(range(1, KEYS["steps"] + 1))
    return [(r["loss"], r["lr"], r["grad_norm"]) for r in steps], [r["val_loss"] for r in held_out]


def assert_same(runs, one, other):
    """The same weights to the last bit, and the same figures but for the step that one of them left out."""
    a, b = learnt(runs, one), learnt(runs, other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    (steps, held_out), (others, others_held_out) = figures(runs, one), figures(runs, other)
    assert steps[:5] == others[:5] and steps[6:] == others[6:] and held_out == others_held_out


def test_a_step_that_is_no_number_is_left_out(runs):
    assert_same(runs, "skipped", "undone")
    step = run_folder.read_records(runs / "skipped")[0][5]
    assert step["loss"] is None and step["grad_norm"] is None and step["skipped"] is True
    assert faults.counts(runs / "skipped") == {"skipped_steps": 1} and faults.counts(runs / "undone") == {}


def test_weights_go_back_to_the_newest_checkpoint(runs):
    """Here it is the weights that are broken, which leaving out a batch would not heal."""
    assert_same(runs, "rolled_back", "returned")
    assert faults.counts(runs / "rolled_back") == {"rollbacks": 1, "rolled_back": 2}
    assert any(not torch.equal(weight, learnt(runs, "undone")[name]) for name, weight in learnt(runs, "returned").items())


def test_weights_of_half_precision_go_back(runs):
    assert_same(runs, "rolled_back_bf16", "returned_bf16")


@pytest.mark.parametrize("name", ["skipped_pp2", "rolled_back_dp2"])
def test_all_ranks_leave_out_what_one_saw(runs, name):
    (steps, held_out), (one, one_held_out) = figures(runs, name), figures(runs, name[:-4])
    for mine, other in zip([*steps[:5], *steps[6:]], [*one[:5], *one[6:]], strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    assert steps[5][2] is None and held_out == pytest.approx(one_held_out, abs=1e-5)
    assert faults.counts(runs / name) == faults.counts(runs / name[:-4])


def test_a_loss_that_jumps_is_left_out(runs):
    """Five good losses are needed, of which this run, which was stopped after three, sees two."""
    assert_same(runs, "spike", "undone")
    losses = [loss for loss, _, _ in figures(runs, "spike")[0]]
    assert losses[5] > 1.2 * sorted(losses[:5])[2]
    (fault,) = faults.read(runs / "spike")
    assert fault["kind"] == "skip" and fault["step"] == 6 and "above 1.2 times the median" in fault["message"]


def test_a_slow_rank_is_named(runs):
    (fault,) = faults.read(runs / "slow")
    assert fault["kind"] == "straggler" and fault["rank"] == 1 and fault["step"] == 30 and fault["ratio"] > 1.5
    steps, _ = run_folder.read_records(runs / "slow")
    assert [r["step"] for r in steps if "straggler" in r] == [31, 32] and steps[-1]["straggler"] == 1
    summary = report.write(runs / "slow", {})
    assert summary["faults"]["stragglers"] == {"1": fault["ratio"]}
    assert f"- faults: rank 1 {fault['ratio']:.1f} times slower" in (runs / "slow" / "summary.md").read_text()


def test_ranks_are_compared_with_their_own_stage():
    found = ratios([([1.0], 0), ([4.0], 1), ([2.0], 0), ([4.0], 1), ([1.0], 0), ([4.0], 1)])
    assert found == [1.0, 1.0, 2.0, 1.0, 1.0, 1.0]
    assert ratios([([1.0], 0), ([2.0], 0)]) == [1.0, 2.0]  # one of two
    assert ratios([([0.0], 0), ([0.0], 0)]) == [1.0, 1.0]
    assert ratios([([1.0, 3.0, 2.0], 0), ([2.0, 30.0, 4.0], 0)]) == [1.0, 2.0]  # by steps, which differ


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_busy_machine_accuses_nobody_and_hides_nobody(ranks, tmp_path):
    """Every fifth step of every rank takes up to twenty times as long; in the second half rank 1 is slow besides."""
    draw = random.Random(7)
    innocent, slow = (Stragglers(str(tmp_path), factor=1.5) for _ in range(2))
    (tmp_path / "faults.jsonl").touch()

    def window(slowness):
        stalled = lambda: draw.uniform(1, 20) if draw.random() < 1 / 5 else draw.uniform(1, 1.2)  # noqa: E731
        return ratios([([stalled() * (slowness if rank == 1 else 1) for _ in range(WINDOW)], 0) for rank in range(ranks)])

    for number in range(300):
        innocent._judge(window(1.0), number)
    assert faults.read(tmp_path) == []
    for number in range(4 * PERSISTENT):
        slow._judge(window(2.5), number)
    (found,) = faults.read(tmp_path)
    assert found["rank"] == 1 and 1.5 < found["ratio"]


def test_who_did_not_arrive():
    def place(marks, waits, step=5):
        return {"step": step, "marks": marks, "waits": waits}

    assert late([place(9, True), None, place(9, True)]) == [1]
    assert late([place(8, True), place(9, False), place(9, True)]) == [1]  # stage 0 waits, though it has come less far
    assert late([place(9, True), place(9, True), place(7, True)]) == [2]
    assert late([place(9, True), place(9, True)]) == [] and late([place(9, False), place(9, False)]) == []
    assert late([None, None]) == [] and late([place(3, True, step=4), place(9, True)]) == [0]


def test_faults_are_counted_once(tmp_path):
    faults.note(tmp_path, "skip", 7, "a")
    faults.note(tmp_path, "restart", 4, "killed")
    faults.note(tmp_path, "skip", 7, "the same step again, after the restart")
    faults.note(tmp_path, "restart", 4, "killed")
    faults.note(tmp_path, "rollback", 9, "b", to=5, loss=math.nan)
    (tmp_path / "faults.jsonl").open("a").write('{"kind": "skip", "st')  # cut off by a kill
    found = faults.counts(tmp_path)
    assert found == {"restarts": 2, "skipped_steps": 1, "rollbacks": 1, "rolled_back": 4}
    assert faults.text(found) == "2 restarts, 1 step skipped, 1 rollback over 4 steps"
    assert json.loads((tmp_path / "faults.jsonl").read_text().splitlines()[-2])["loss"] is None
    with pytest.raises(ValueError, match="none of"):
        faults.note(tmp_path, "flood", 1, "")
