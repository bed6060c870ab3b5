"""The recipe's training against an independent one: Hugging Face's model, torch's AdamW, a plain loop over the same samples."""

import pytest
import torch
from test_layouts import losses

from nemo_ext.optim import schedule_factor


def test_training_equals_hugging_face_with_torchs_adamw(train, models, corpus, tmp_path):
    """Six steps: loss and gradient norm. fp32 sums in another order: 2e-5 on losses of about 6, 1e-4 relative on the norm."""
    from transformers import LlamaForCausalLM

    from nemo_ext.data.module import build_train_dataset

    ours, _, norms = losses(train([dict(name="run")], 1), "run")
    data = build_train_dataset(
        corpus.blend(), samples=6 * 8, seq_length=64, seed=1234, eod=corpus.eod, index_cache_dir=str(tmp_path)
    )
    model = LlamaForCausalLM.from_pretrained(models["tied"]["hf"], attn_implementation="eager").float()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(6):
        samples = [data[8 * step + i] for i in range(8)]
        tokens, labels = (torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = schedule_factor(step, schedule="cosine", max_steps=6, warmup_steps=2, floor=0.1, decay_fraction=0.2)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step + 1] == pytest.approx(loss.item(), abs=2e-5), step
        assert norms[step + 1] == pytest.approx(norm.item(), rel=1e-4), step
