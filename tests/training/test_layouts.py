"""From one checkpoint, every parallel layout trains to the losses of one process; runs resume at any other layout.

fp32 on gloo. Losses are about 6 and sums of different order differ in the last bits: 1e-5 is some twenty units in the last place
of a float32 of that size, and two orders of magnitude below the change that one wrong shard makes.
"""

import math

import pytest

from nemo_ext import run_folder

TOLERANCE = 1e-5
FAMILIES = ("gemma3", "phi4", "qwen2.5", "qwen3")
LAYOUTS = {
    "tp2": dict(tp=2, sp=False),
    "tp2_sp": dict(tp=2, sp=True),
    "pp2": dict(pp=2),
    "pp2_vp2": dict(pp=2, vp=2),
    "dp2": dict(distributed_optimizer=False, overlap=False, micro_batch=2),
    "dp2_distributed_optimizer": dict(distributed_optimizer=True, overlap=True, micro_batch=2),
}
RESUMED_AT = [name for name in LAYOUTS if name != "dp2"]  # which has another optimizer: refused when a folder is continued
# Many gradient buckets, whose ends are padded: upstream shifts the optimizer states of all but the first when it saves them.
DROPOUT = {"model.config.hidden_dropout": 0.1}
BUCKETS = {"trainer.strategy.ddp.bucket_size": 10_000}
OTHERS = {
    "tp2_sp_recompute": dict(tp=2, sp=True, recompute="full"),
    "pp2_micro1": dict(pp=2, micro_batch=1),
    "pp2_selective": dict(pp=2, recompute="selective"),
}


def losses(folder, name):
    """(training losses, held-out losses, gradient norms) of a case, each by step."""
    steps, validations = run_folder.read_records(folder / name)
    return (
        {r["step"]: r["loss"] for r in steps},
        {r["step"]: r["val_loss"] for r in validations},
        {r["step"]: r["grad_norm"] for r in steps},
    )


def assert_same(one, other, tolerance=TOLERANCE):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for step in a:
            assert math.isclose(a[step], b[step], rel_tol=0, abs_tol=tolerance), (step, a[step], b[step])


def assert_follows(folder, name, reference, loss=1e-4, norm=1e-3):
    """A run's steps are those of `reference`, [(loss, gradient norm)], within an absolute and a relative tolerance."""
    ours, _, norms = losses(folder, name)
    assert sorted(ours) == list(range(1, len(reference) + 1))
    for step, (their_loss, their_norm) in enumerate(reference, 1):
        assert ours[step] == pytest.approx(their_loss, abs=loss), (name, step)
        assert norms[step] == pytest.approx(their_norm, rel=norm), (name, step)


@pytest.fixture(scope="module")
def runs(train):
    """Reference runs in one process, and all layouts in two."""
    resumes = [
        dict(name="stopped", stop_at=4, overrides=BUCKETS),
        dict(name="stopped_bf16", stop_at=4, keys=dict(precision="bf16"), overrides=BUCKETS),
        dict(name="whole_bf16", keys=dict(precision="bf16")),
        dict(name="whole_fp16", keys=dict(precision="fp16"), overrides={"trainer.plugins.fp16_initial_loss_scale": 1024.0}),
        dict(name="whole_dropout", overrides=DROPOUT),
        dict(name="stopped_dropout", stop_at=4, overrides=DROPOUT),
    ]
    again = [dict(name="again", continue_copy_of="stopped", overrides=BUCKETS),
             dict(name="again_bf16", continue_copy_of="stopped_bf16", keys=dict(precision="bf16"), overrides=BUCKETS),
             dict(name="again_dropout", continue_copy_of="stopped_dropout", overrides=DROPOUT)]  # fmt: skip
    one = [dict(name="one"), dict(name="one_untied", model="untied"), dict(name="one_layerwise", keys=dict(layer_decay=0.7)),
           *resumes,
           *again]  # fmt: skip
    one += [dict(name="no_evaluation", keys=dict(val_batches=0, profile=3))]
    one += [
        dict(
            name=family, recipe=f"pretrain_{family}", keys=dict(size="smoke", steps=4, val_every=4, global_batch=2, micro_batch=2)
        )
        for family in FAMILIES
    ]
    folder = train(one, 1)
    two = [dict(name=n, keys=k) for n, k in {**LAYOUTS, **OTHERS}.items()]
    two += [
        dict(name="untied_pp2_vp2", keys=LAYOUTS["pp2_vp2"], model="untied"),
        dict(name="untied_tp2", keys=dict(tp=2), model="untied"),
    ]
    two += [dict(name=f"layerwise_{n}", keys={**LAYOUTS[n], "layer_decay": 0.7}) for n in ("pp2", "dp2_distributed_optimizer")]
    two += [dict(name=f"again_{n}", keys=LAYOUTS[n], continue_copy_of="stopped", overrides=BUCKETS) for n in RESUMED_AT]
    # stop at one layout of two processes, go on at another
    two += [dict(name="stopped_tp2", keys=dict(tp=2), stop_at=4, overrides=BUCKETS),
            dict(name="tp2_to_pp2", keys=dict(pp=2), continue_copy_of="stopped_tp2"),
            dict(name="tp2_to_dp2", continue_copy_of="stopped_tp2")]  # fmt: skip
    train(two, 2, into=folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_from_random_weights(runs, family):
    """Nearly uniform over the 49,152 tokens of the smoke size before the first step, better after the fourth."""
    train_losses, held_out, _ = losses(runs, family)
    assert sorted(train_losses) == [1, 2, 3, 4]
    assert abs(held_out[0] - math.log(49152)) < 0.4
    assert held_out[4] < held_out[0] - 0.02


def test_training_without_evaluation_is_the_same(runs):
    assert losses(runs, "no_evaluation")[0] == losses(runs, "one")[0]
    assert losses(runs, "no_evaluation")[1] == {}


def test_a_profiled_step_adds_up(runs):
    found = run_folder.read_json(run_folder.rank_profile(runs / "no_evaluation", 0))
    record = run_folder.read_records(runs / "no_evaluation")[0][2]
    assert found["step"] == record["step"] == 3
    seconds = found["seconds"]
    assert 0 < sum(seconds.values()) <= record["step_time"]
    assert min(seconds["GEMM"], seconds["other element-wise"]) > 0
    assert seconds["idle"] < 0.8 * sum(seconds.values())
    assert any(name in ("aten::mm", "aten::addmm") for name, *_ in found["longest"])
    assert (runs / "no_evaluation/logs/rank0.trace.json.gz").stat().st_size > 1000


def test_training_learns(runs):
    train_losses, held_out, _ = losses(runs, "one")
    assert sorted(train_losses) == [1, 2, 3, 4, 5, 6] and sorted(held_out) == [0, 3, 6]
    assert abs(held_out[0] - math.log(512)) < 0.3  # random weights: nearly uniform over 512 tokens
    assert held_out[6] < held_out[3] < held_out[0] - 0.01


@pytest.mark.parametrize("layout", [*LAYOUTS, *OTHERS])
def test_layout_equals_one_process(runs, layout):
    assert_same(losses(runs, "one"), losses(runs, layout))


@pytest.mark.parametrize("layout", ["untied_pp2_vp2", "untied_tp2"])
def test_layout_equals_one_process_untied(runs, layout):
    assert_same(losses(runs, "one_untied"), losses(runs, layout))


@pytest.mark.parametrize("layout", ["pp2", "dp2_distributed_optimizer"])
def test_layerwise_decay_is_the_same_at_every_layout(runs, layout):
    assert_same(losses(runs, "one_layerwise"), losses(runs, f"layerwise_{layout}"))
    assert abs(losses(runs, "one_layerwise")[0][6] - losses(runs, "one")[0][6]) > 1e-3  # and it does something


@pytest.mark.parametrize("name", ["again", *(f"again_{n}" for n in RESUMED_AT), "tp2_to_pp2", "tp2_to_dp2"])
def test_resumed_run_equals_the_one_that_was_not(runs, name):
    """Optimizer, schedule, data order and held-out text: stopped after step 4, continued, also at another layout."""
    assert_same(losses(runs, "one"), losses(runs, name))


def test_bf16_resumes_with_its_fp32_weights(runs):
    assert_same(losses(runs, "whole_bf16"), losses(runs, "again_bf16"), tolerance=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_fp32(runs, precision):
    """Losses of about 6 from 8 bits (bf16) or 11 bits (fp16, with loss scaling) of mantissa, averaged over 512 tokens."""
    exact, half = losses(runs, "one")[0], losses(runs, f"whole_{precision}")[0]
    assert all(0 < abs(exact[step] - half[step]) < 5e-3 for step in exact)


def test_dropout_resumes_with_its_random_state(runs):
    assert_same(losses(runs, "whole_dropout"), losses(runs, "again_dropout"), tolerance=0)
    assert abs(losses(runs, "whole_dropout")[0][6] - losses(runs, "one")[0][6]) > 1e-4
