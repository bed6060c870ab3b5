"""Families whose layers are unlike a Llama's, trained by the recipe in two processes: Hugging Face's losses and gradient norms.

Phi-2 (parallel residual, biases to the output's), StableLM 2 12B (one norm a head) and Gemma 2 (soft caps, windows). Tolerances
are those of test_reference.
"""

import hugging_face
import pytest
from test_layouts import assert_follows

FAMILIES = ("phi", "stablelm_12b", "gemma2")
LAYOUTS = {"tp2_sp": dict(tp=2, sp=True), "pp2": dict(pp=2)}
STEPS = 3


@pytest.fixture(scope="module")
def runs(train):
    keys = dict(steps=STEPS, val_batches=0, warmup=1)
    cases = [dict(name=f"{f}_{n}", model=f, keys={**keys, **layout}) for f in FAMILIES for n, layout in LAYOUTS.items()]
    return train(cases, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_hugging_face_with_torchs_adamw(runs, models, corpus, tmp_path, family):
    reference = hugging_face.train(models[family]["hf"], corpus, tmp_path, steps=STEPS, warmup=1)
    for layout in LAYOUTS:
        assert_follows(runs, f"{family}_{layout}", reference, loss=2e-5, norm=1e-4)
