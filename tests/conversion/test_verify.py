"""The comparison itself: by hand on small tensors, and a model with one wrong number is noticed."""

import math

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_nemo, verify
from nemo_ext.errors import UserError


def test_compare_by_hand():
    reference = torch.tensor([[[0.0, math.log(3.0)], [1.0, 0.0]]])
    found = verify.compare(reference, torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]))
    assert found.max_abs == pytest.approx(math.log(3.0)) and found.mean_abs == pytest.approx(math.log(3.0) / 4)
    assert found.kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))  # (1/4, 3/4) against (1/2, 1/2)
    assert found.top1_agreement == 0.5 and found.relative == pytest.approx(1.0)


def test_one_wrong_weight_is_noticed(tmp_path):
    hf = tiny_models.save("llama", tmp_path / "hf")
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    assert verify.logits_match(hf, nemo).max_abs > 1e-4


def test_not_a_converted_folder(tmp_path):
    with pytest.raises(UserError, match="no architecture.json"):
        verify.logits_match(tmp_path, tmp_path)
