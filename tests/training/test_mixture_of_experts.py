"""A small Mixtral trained by the recipe: Hugging Face's losses at one process, and the same at every split of the experts.

fp32 on gloo; the tolerances are those of test_layouts and test_reference. The balancing loss is tested against Hugging Face's in
tests/conversion/test_mixtral.py, and here for being the same at every layout.
"""

import hugging_face
import pytest
from test_layouts import assert_follows, assert_same, losses

BALANCED = {"model.config.moe_aux_loss_coeff": 0.1}
BUCKETS = {"trainer.strategy.ddp.bucket_size": 10_000}
LAYOUTS = {
    "ep2": dict(ep=2),
    "ep2_whole_optimizer": dict(ep=2, distributed_optimizer=False, overlap=False),
    "dp2": dict(ep=1),
    "tp2_sp": dict(tp=2, sp=True),
    "pp2": dict(pp=2),
}


@pytest.fixture(scope="module")
def runs(train):
    """Runs in one process and in two, of which some are stopped and continued at another layout."""

    def case(name, **other):
        return dict(name=name, model="mixtral", **other)

    one = [
        case("one"),
        case("one_balanced", overrides=BALANCED),
        case("stopped", stop_at=4, overrides=BUCKETS),
    ]
    folder = train(one, 1)
    two = [case(name, keys=keys) for name, keys in LAYOUTS.items()]
    two += [
        case("ep2_balanced", keys=dict(ep=2), overrides=BALANCED),
        case("again_ep2", keys=dict(ep=2), continue_copy_of="stopped", overrides=BUCKETS),
        case("stopped_ep2", keys=dict(ep=2), stop_at=4, overrides=BUCKETS),
        case("ep2_to_tp2", keys=dict(tp=2), continue_copy_of="stopped_ep2", overrides=BUCKETS),
    ]
    train(two, 2, into=folder)
    return folder


def test_training_equals_hugging_face_with_torchs_adamw(runs, models, corpus, tmp_path):
    """Six steps: loss, falling, and gradient norm."""
    held_out = losses(runs, "one")[1]
    assert held_out[6] < held_out[0] - 0.02
    reference = hugging_face.train(models["mixtral"]["hf"], corpus, tmp_path, steps=6, warmup=2)
    assert_follows(runs, "one", reference, loss=2e-5, norm=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(runs, layout):
    assert_same(losses(runs, "one"), losses(runs, layout))


def test_the_balancing_loss_is_the_same_where_experts_are_split(runs):
    assert_same(losses(runs, "one_balanced"), losses(runs, "ep2_balanced"))
    assert abs(losses(runs, "one_balanced")[2][1] - losses(runs, "one")[2][1]) > 1e-5  # it adds to the gradient
    assert losses(runs, "one_balanced")[0][1] == losses(runs, "one")[0][1]  # and not to the loss that is reported


@pytest.mark.parametrize("name", ["again_ep2", "ep2_to_tp2"])
def test_resumed_at_another_split_equals_the_run_that_was_not(runs, name):
    """Weights and optimizer states of every expert."""
    assert_same(losses(runs, "one"), losses(runs, name))
