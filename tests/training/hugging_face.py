"""The independent reference of the training tests: Hugging Face's model, torch's AdamW, a plain loop over the same samples."""

from pathlib import Path

import torch

from nemo_ext.schedule import schedule_factor


def train(folder: Path, corpus, index_cache: Path, steps: int, warmup: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step with the keys of conftest's runs: 8 sequences of 64 tokens, lr 1e-3, cosine to 1e-4."""
    from transformers import AutoModelForCausalLM

    from nemo_ext.data.module import build_train_dataset

    data = build_train_dataset(
        corpus.blend(), samples=steps * 8, seq_length=64, seed=1234, eod=corpus.eod, index_cache_dir=str(index_cache)
    )
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    found = []
    for step in range(steps):
        samples = [data[8 * step + i] for i in range(8)]
        tokens, labels = (torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in ("tokens", "labels"))
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = schedule_factor(step, schedule="cosine", max_steps=steps, warmup_steps=warmup, floor=0.1, decay_fraction=0.2)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found
