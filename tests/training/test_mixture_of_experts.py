"""A small Mixtral trained by the recipe: Hugging Face's losses at one process, and the same at every split of the experts.

fp32 on gloo; the tolerances are those of test_layouts and test_reference. The balancing loss is tested against Hugging Face's in
tests/conversion/test_mixtral.py, and here for being the same at every layout.
"""

import pytest
import torch
from test_layouts import assert_same, losses

from nemo_ext.optim import schedule_factor

BALANCED = {"model.config.moe_aux_loss_coeff": 0.1}
BUCKETS = {"trainer.strategy.ddp.bucket_size": 10_000}
LAYOUTS = {
    "ep2": dict(ep=2),
    "ep2_whole_optimizer": dict(ep=2, distributed_optimizer=False, overlap=False),
    "dp2": dict(ep=1),
    "tp2_sp": dict(tp=2, sp=True),
    "pp2": dict(pp=2),
}


@pytest.fixture(scope="module")
def runs(train):
    """Runs in one process and in two, of which some are stopped and continued at another layout."""

    def case(name, **other):
        return dict(name=name, model="mixtral", **other)

    one = [
        case("one"),
        case("one_balanced", overrides=BALANCED),
        case("stopped", stop_at=4, overrides=BUCKETS),
    ]
    folder = train(one, 1)
    two = [case(name, keys=keys) for name, keys in LAYOUTS.items()]
    two += [
        case("ep2_balanced", keys=dict(ep=2), overrides=BALANCED),
        case("again_ep2", keys=dict(ep=2), continue_copy_of="stopped", overrides=BUCKETS),
        case("stopped_ep2", keys=dict(ep=2), stop_at=4, overrides=BUCKETS),
        case("ep2_to_tp2", keys=dict(tp=2), continue_copy_of="stopped_ep2", overrides=BUCKETS),
    ]
    train(two, 2, into=folder)
    return folder


def test_training_equals_hugging_face_with_torchs_adamw(runs, models, corpus, tmp_path):
    """Six steps: loss, falling, and gradient norm."""
    from transformers import MixtralForCausalLM

    from nemo_ext.data.module import build_train_dataset

    ours, held_out, norms = losses(runs, "one")
    assert held_out[6] < held_out[0] - 0.02
    data = build_train_dataset(
        corpus.blend(), samples=6 * 8, seq_length=64, seed=1234, eod=corpus.eod, index_cache_dir=str(tmp_path)
    )
    model = MixtralForCausalLM.from_pretrained(models["mixtral"]["hf"], attn_implementation="eager").float()
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(runs, layout):
    assert_same(losses(runs, "one"), losses(runs, layout))


def test_the_balancing_loss_is_the_same_where_experts_are_split(runs):
    assert_same(losses(runs, "one_balanced"), losses(runs, "ep2_balanced"))
    assert abs(losses(runs, "one_balanced")[2][1] - losses(runs, "one")[2][1]) > 1e-5  # it adds to the gradient
    assert losses(runs, "one_balanced")[0][1] == losses(runs, "one")[0][1]  # and not to the loss that is reported


@pytest.mark.parametrize("name", ["again_ep2", "ep2_to_tp2"])
def test_resumed_at_another_split_equals_the_run_that_was_not(runs, name):
    """Weights and optimizer states of every expert."""
    assert_same(losses(runs, "one"), losses(runs, name))
