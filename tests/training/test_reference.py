"""The recipe's training against an independent one: Hugging Face's model, torch's AdamW, a plain loop over the same samples."""

import hugging_face
from test_layouts import assert_follows


def test_training_equals_hugging_face_with_torchs_adamw(train, models, corpus, tmp_path):
    """Six steps: loss and gradient norm. fp32 sums in another order: 2e-5 on losses of about 6, 1e-4 relative on the norm."""
    runs = train([dict(name="run")], 1)
    reference = hugging_face.train(models["tied"]["hf"], corpus, tmp_path, steps=6, warmup=2)
    assert_follows(runs, "run", reference, loss=2e-5, norm=1e-4)
