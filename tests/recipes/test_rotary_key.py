"""rotary= and cuda_graphs=: keys of GPUs."""

import pytest

import recipes
from nemo_ext import platform
from nemo_ext.errors import UserError


@pytest.mark.parametrize("given", [dict(rotary="joint"), dict(cuda_graphs=True)])
def test_keys_of_gpus_are_refused_on_a_cpu(given):
    (key,) = given
    with pytest.raises(UserError, match=f"{key}={str(given[key]).lower()} is for GPUs"):
        recipes.resolve("pretrain_llama3", given, cuda=False)
    assert recipes.resolve("pretrain_llama3", given, cuda=True)[key] == given[key]


@pytest.mark.parametrize(("word", "count"), [("separate", 0), ("joint", 1)])
def test_joint_is_a_callback(word, count):
    platform.activate()
    from nemo_ext.callbacks.joint_rotary import JointRotary

    keys = dict(size="1b", gpus=1, tp=1, pp=1, cp=1, ep=1, sp=False, micro_batch=1, recompute="none", steps=2, rotary=word)
    recipe = recipes.load("pretrain_llama3", device="gpu", **keys)
    assert [each.__fn_or_cls__ for each in recipe.trainer.callbacks].count(JointRotary) == count
