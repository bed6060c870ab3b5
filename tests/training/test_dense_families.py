"""Families whose layers are unlike a Llama's, trained by the recipe in two processes: Hugging Face's losses and gradient norms.

Phi-2 (parallel residual, biases to the output's), StableLM 2 12B (one norm a head) and Gemma 2 (soft caps, windows). Tolerances
are those of test_reference.
"""

import pytest
import torch
from test_layouts import losses

from nemo_ext.optim import schedule_factor

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
    from transformers import AutoModelForCausalLM

    from nemo_ext.data.module import build_train_dataset

    data = build_train_dataset(
        corpus.blend(), samples=STEPS * 8, seq_length=64, seed=1234, eod=corpus.eod, index_cache_dir=str(tmp_path)
    )
    model = AutoModelForCausalLM.from_pretrained(models[family]["hf"], attn_implementation="eager").float()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        samples = [data[8 * step + i] for i in range(8)]
        tokens, labels = (torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = schedule_factor(step, schedule="cosine", max_steps=STEPS, warmup_steps=1, floor=0.1, decay_fraction=0.2)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        optimizer.step()
        optimizer.zero_grad()
        for layout in LAYOUTS:
            ours, _, norms = losses(runs, f"{family}_{layout}")
            assert ours[step + 1] == pytest.approx(loss.item(), abs=2e-5), (layout, step)
            assert norms[step + 1] == pytest.approx(norm.item(), rel=1e-4), (layout, step)
