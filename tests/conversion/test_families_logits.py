"""Every family: Hugging Face's logits and those of NeMo's Megatron model loaded from our checkpoint."""

import pytest
import tiny_models

from conversion import hf_to_nemo, verify


@pytest.mark.parametrize("name", ["llama", "llama_tied_scaled", "qwen2", "qwen3", "phi3", "gemma3_text", "gemma3"])
def test_logits_equal_hugging_face(name, tmp_path):
    hf = tiny_models.save(name, tmp_path / "hf")
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    found = verify.logits_match(hf, nemo, seq=48)
    print(name, found)
    assert found.largest_logit > 0.5  # the comparison is of something
    assert found.max_abs < 1e-5
    assert found.top1_agreement == 1.0
