"""Pipeline stages with unequally many layers train to the same losses, and what they save is continued at any layout."""

import nemo_ext.platform

nemo_ext.platform.activate()

import pytest  # noqa: E402
from test_layouts import assert_same, losses  # noqa: E402

import recipes  # noqa: E402

STAGES = "trainer.strategy.pipeline_model_parallel_layout"


@pytest.fixture(scope="module")
def runs(train):
    folder = train([dict(name="one", model="untied")], 1)
    uneven = dict(model="untied", keys=dict(pp=2), overrides={STAGES: "Ettt|tL"})
    chunks = dict(model="untied", keys=dict(pp=2, vp=2), overrides={STAGES: "Ett|t|t|L"})
    train(
        [
            uneven | dict(name="uneven"),
            chunks | dict(name="chunks"),
            uneven | dict(name="stopped", stop_at=4),
            dict(name="continued", model="untied", keys=dict(tp=2), continue_copy_of="stopped"),
            chunks | dict(name="continued_chunks", continue_copy_of="stopped"),
        ],
        2,
        folder,
    )
    return folder


@pytest.mark.parametrize("name", ["uneven", "chunks"])
def test_losses_are_those_of_one_process(runs, name):
    assert_same(losses(runs, name)[:2], losses(runs, "one")[:2])


@pytest.mark.parametrize("name", ["continued", "continued_chunks"])
def test_a_run_of_uneven_stages_goes_on_at_another_layout(runs, name):
    assert_same(losses(runs, name)[:2], losses(runs, "one")[:2])


def strategy(**keys):
    keys = dict(device="gpu", gpus=2, tp=1, cp=1, sp=False, recompute="none", micro_batch=1, global_batch=16) | keys
    return recipes.load("pretrain_llama3", **keys).trainer.strategy


def test_the_recipe_gives_the_last_stage_fewer_layers():
    layout = "pipeline_model_parallel_layout"
    assert getattr(strategy(size="8b", pp=2, vp=2), layout) == "E" + "t" * 9 + "|" + "t" * 9 + "|" + "t" * 8 + "|" + "t" * 6 + "L"
    assert getattr(strategy(size="8b", pp=2, vp=2, balance_stages=False), layout) is None
    assert getattr(strategy(size="8b", pp=1, vp=1), layout) is None
