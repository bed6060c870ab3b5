"""Which linears an adapter can have, against the table that converts checkpoints and the parameters of Megatron's adapters."""

import pytest

from conversion import families
from conversion.lora.nemo import slots_of
from nemo_ext import adapters
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from recipes.models import FAMILIES

SHAPES = {size.architecture.family: size.architecture for f in FAMILIES.values() for size in f.sizes.values()}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_linear_that_converts_and_its_shape(family):
    """The experts' linears and the router's neither convert nor are trained."""
    a = SHAPES[family]
    slots = slots_of(families.FAMILIES[family], a, "canonical_lora")
    known = adapters.linears(family)
    assert {name for slot in slots for name in (part.rsplit(".", 1)[1] for part in slot.parts)} == set(known)
    for slot in slots:
        for part, width in zip(slot.parts, slot.widths(a), strict=True):
            name = part.rsplit(".", 1)[1]
            assert known[name] == slot.target
            assert adapters.shape(a, name) == (slot.inputs(a), width)


def test_selection():
    assert adapters.targets("llama", "all-linear") == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert adapters.targets("llama", "attention") == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert adapters.targets("llama", " v_proj, q_proj,q_proj") == ["q_proj", "v_proj"]
    assert adapters.targets("llama", ["mlp", "o_proj"]) == ["o_proj", "gate_proj", "up_proj", "down_proj"]
    assert adapters.targets("phi", "mlp") == ["fc1", "fc2"]
    assert adapters.targets("mixtral", "all-linear") == ["q_proj", "k_proj", "v_proj", "o_proj"]
    for wrong in ("qkv_proj", ["lm_head"], ",", []):
        with pytest.raises(UserError, match="targets="):
            adapters.targets("llama", wrong)


def test_parameters_and_scale():
    """Llama 3 8B at rank 16: (4096 + 4096) 2 + (4096 + 1024) 2 + (4096 + 14336) 3 = 81,920 a rank and layer."""
    a = SHAPES["llama"]
    eight = Architecture("llama", 32, 4096, 14336, 32, num_query_groups=8, vocab_size=128256)
    assert adapters.num_parameters(eight, adapters.targets("llama", "all-linear"), 16) == 32 * 16 * 81_920
    keys = {"rank": 16, "alpha": 32.0, "rslora": False, "dropout": 0.1, "targets": "q_proj,down_proj"}
    settings = adapters.transform_settings(a, keys)
    assert settings == {
        "kind": "canonical_lora", "target_modules": ["linear_fc2", "linear_q"], "dim": 16, "alpha": 32.0, "dropout": 0.1,
    }  # fmt: skip
    assert adapters.transform_settings(a, {**keys, "rslora": True})["alpha"] / 16 == 32 / 16**0.5


def test_operations_of_a_token():
    """Frozen weights cost their product forward and for their inputs' gradient, four operations a weight; the adapter's six."""
    a = Architecture("llama", 2, 64, 128, 4, num_query_groups=2, vocab_size=512)
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 64 * 512
    whole, adapted = a.flops_per_token(32), a.flops_per_token(32, adapter=1000)
    assert whole - adapted == 2 * weights - 6 * 1000
