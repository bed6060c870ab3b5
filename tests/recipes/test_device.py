"""What keys are on a device where they are not given, and how a plan says so."""

import pytest

import recipes
from nemo_ext.errors import UserError
from nemo_ext.gpus import KINDS
from recipes import device


def resolved(name="pretrain_llama3", **given):
    return recipes.resolve(name, given, cuda=False)


@pytest.mark.parametrize("name", ["h100", "h200", "a100", "l40"])
def test_every_kind_of_gpu_has_defaults(name):
    keys = resolved(gpu=name)
    assert {key: keys[key] for key in device.DEFAULTS} == {key: each.gpu for key, each in device.DEFAULTS.items()}
    assert (keys["device"], keys["gpu_memory"]) == ("gpu", KINDS[name].memory / 2**30)
    lines = device.lines(keys, {"gpu": name}, name)
    assert lines[0].startswith("defaults    precision=bf16: FP8 is ")
    assert ("not on" in lines[-1]) == (not KINDS[name].measured)


def test_a_cpu_has_its_own_and_what_is_given_stays():
    keys = resolved(device="cpu")
    assert {key: keys[key] for key in device.DEFAULTS} == {key: each.cpu for key, each in device.DEFAULTS.items()}
    assert device.lines(keys, {}, None) == []
    given = dict(gpu="h100", precision="fp8", seq=8192, async_save=False)
    keys = resolved(**given)
    assert {key: keys[key] for key in given} == given and device.lines(keys, given, "h100") == []


def test_a_sequence_is_no_longer_than_the_model_was_made_for():
    assert resolved("pretrain_custom", gpu="h100")["seq"] <= 4096
    assert resolved("cpt_gemma2", gpu="h100", size="2b")["seq"] == 4096


@pytest.mark.parametrize("name", ["pretrain_llama3", "grpo_llama3"])
def test_a_kind_of_gpu_and_a_cpu_are_not_planned_for_together(name):
    with pytest.raises(UserError, match="^gpu=l40 device=cpu: leave one of them out$"):
        resolved(name, gpu="l40", device="cpu")
    keys = resolved(name, gpu="l40", gpu_memory=40.0)
    assert (keys["device"], keys["gpu_memory"]) == ("gpu", 40.0)
