"""The recipe's training against an independent one: Hugging Face's model, torch's AdamW, a plain loop over the same samples."""

import hugging_face
import pytest
from test_layouts import losses


def test_training_equals_hugging_face_with_torchs_adamw(train, models, corpus, tmp_path):
    """Six steps: loss and gradient norm. fp32 sums in another order: 2e-5 on losses of about 6, 1e-4 relative on the norm."""
    ours, _, norms = losses(train([dict(name="run")], 1), "run")
    reference = hugging_face.train(models["tied"]["hf"], corpus, tmp_path, steps=6, warmup=2)
    for step, (loss, norm) in enumerate(reference, 1):
        assert ours[step] == pytest.approx(loss, abs=2e-5), step
        assert norms[step] == pytest.approx(norm, rel=1e-4), step
