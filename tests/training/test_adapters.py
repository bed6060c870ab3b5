"""LoRA trained by the recipe: PEFT's losses, the same at every layout, exact when resumed, nothing but the adapter changed.

fp32 on gloo; a Llama of four layers and a hundred short conversations, one a row where Hugging Face's model has to follow.
"""

import json
import math

import pytest
import torch
from test_layouts import assert_follows, assert_same, losses

from nemo_ext import run_folder
from nemo_ext.schedule import schedule_factor

STEPS, SEQ, LR = 20, 64, 1e-2
BEGINNING = 6  # steps of the same schedule, for layouts that take long on few cores
RECIPE = dict(recipe="lora_llama3", model="tied")
COMMON = dict(seq=SEQ, lr=LR, rank=4, alpha=8.0, val_every=20)
SHORT = dict(COMMON, steps=6, pack=True)
BUCKETS = {"trainer.strategy.ddp.bucket_size": 1_000}
LAYOUTS = {
    "tp2_sp": dict(tp=2, sp=True),
    "pp2": dict(pp=2),
    "pp2_vp2": dict(pp=2, vp=2),
    "dp2": dict(distributed_optimizer=False, overlap=False, micro_batch=2),
    "dp2_distributed_optimizer": dict(distributed_optimizer=True, overlap=True, micro_batch=2),
    "pp2_recompute": dict(pp=2, recompute="full"),
}
VARIANTS = {
    "lora_plus": dict(lora_plus=4.0),
    "rslora": dict(rslora=True),
    "attention": dict(targets="attention"),
    "some": dict(targets="k_proj,up_proj,down_proj"),
}


@pytest.fixture(scope="module")
def runs(train, chats):
    """All cases by name, of one process and of two."""

    def case(name, keys, **other):
        return dict(name=name, keys=keys, blend=chats.blend(), **RECIPE, **other)

    long = dict(COMMON, steps=STEPS, pack=False)
    one = [case("long", long, probe=True), case("one", SHORT, probe=True), case("one_recompute", {**SHORT, "recompute": "full"})]
    one += [case(name, {**long, "steps": 6, **keys}, probe=True) for name, keys in VARIANTS.items()]
    one += [
        case("stopped", SHORT, stop_at=4, overrides=BUCKETS),
        case("again", SHORT, continue_copy_of="stopped", overrides=BUCKETS),
        case("dropout", {**SHORT, "dropout": 0.2}),
        case("dropout_stopped", {**SHORT, "dropout": 0.2}, stop_at=4),
        case("dropout_again", {**SHORT, "dropout": 0.2}, continue_copy_of="dropout_stopped"),
        case("bf16", {**SHORT, "precision": "bf16"}),
        case("bf16_stopped", {**SHORT, "precision": "bf16"}, stop_at=4),
        case("bf16_again", {**SHORT, "precision": "bf16"}, continue_copy_of="bf16_stopped"),
        case("rolled_back", {**SHORT, "every": 2, "on_nan": "rollback"}, callbacks={"BrokenBatch": dict(step=4)}),
        case("returned", {**SHORT, "keep": 0}, callbacks={"Return": dict(copied_at=2, back_at=4)}),
    ]
    folder = train(one, 1)
    two = [case("long_tp2", {**long, "tp": 2, "sp": True}, stop_at=BEGINNING)]
    two += [case(name, {**SHORT, **keys}, probe=True) for name, keys in LAYOUTS.items()]
    two += [
        case("lora_plus_dp2", {**long, "steps": 6, "lora_plus": 4.0}),
        case("stopped_tp2", {**SHORT, "tp": 2}, stop_at=4, overrides=BUCKETS),
        case("tp2_to_pp2", {**SHORT, "pp": 2}, continue_copy_of="stopped_tp2"),
        case("tp2_to_dp2", SHORT, continue_copy_of="stopped_tp2"),
        case("again_tp2", {**SHORT, "tp": 2, "sp": True}, continue_copy_of="stopped", overrides=BUCKETS),
    ]
    train(two, 2, into=folder)
    return folder


def rows(chats, tokenizer, count):
    """The samples that the run trains on, in order."""
    from transformers import AutoTokenizer

    from nemo_ext.data.chat.module import RowBuilder, TrainingRows
    from nemo_ext.data.chat.store import Samples

    samples = [Samples(train) for _, train, _ in chats.blend()]
    eod = AutoTokenizer.from_pretrained(tokenizer).eos_token_id
    return TrainingRows(samples, [None], RowBuilder(SEQ, eod, samples[0].unit, "none"), False, count, 1234)


def peft_model(hf, probe, targets, base=None, **settings):
    """PEFT's model, of `base` if it is not the folder's, with the A that the run began with."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = base or LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager").float()
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **settings}, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    places = {"adapter_q": "q_proj", "adapter_k": "k_proj", "adapter_v": "v_proj", "adapter_gate": "gate_proj",
              "adapter_up": "up_proj", "linear_proj": "o_proj", "linear_fc2": "down_proj"}  # fmt: skip
    began = {}
    for name, value in probe["began"].items():
        parts = name.split(".")
        module = next(hf_name for ours, hf_name in places.items() if ours in parts)
        side = "lora_A" if name.endswith("linear_in.weight") else "lora_B"
        began[f"layers.{parts[parts.index('layers') + 1]}", module, side] = value
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            key = next(k for k in began if k[0] in name and k[1] in parts and k[2] in parts)
            assert key[2] == "lora_A" or not began[key].any()
            parameter.data.copy_(began[key])
            count += 1
    assert count == len(began)
    return model


def train_with_peft(model, data, steps, lora_plus=1.0, lr=LR):
    """[(loss, gradient norm)] of a plain loop with torch's AdamW."""
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in own if ("lora_B" in n) == b], "factor": lora_plus if b else 1.0} for b in (False, True)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    found = []
    for step in range(steps):
        batch = [data[8 * step + i] for i in range(8)]
        tokens, labels, mask = (torch.stack([row[key] for row in batch]) for key in ("tokens", "labels", "loss_mask"))
        each = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (each * mask.flatten()).sum() / mask.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in own], 1.0)
        factor = schedule_factor(step, schedule="cosine", max_steps=steps, warmup_steps=2, floor=0.1, decay_fraction=0.2)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor * group["factor"]
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_twenty_steps_equal_peft_with_torchs_adamw(runs, models, chats, tokenizer):
    probe = torch.load(runs / "long" / "probe0.pt")
    theirs = train_with_peft(peft_model(models["tied"]["hf"], probe, ALL), rows(chats, tokenizer, STEPS * 8), STEPS)
    assert_follows(runs, "long", theirs)
    assert_follows(runs, "long_tp2", theirs[:BEGINNING])
    assert theirs[-1][0] < theirs[0][0] - 0.2  # and it learns


@pytest.mark.parametrize(
    ("name", "targets", "settings", "optimizer"),
    [
        ("lora_plus", ALL, {}, {"lora_plus": 4.0}),
        ("rslora", ALL, {"use_rslora": True}, {}),
        ("attention", ALL[:4], {}, {}),
        ("some", ["k_proj", "up_proj", "down_proj"], {}, {}),
    ],
)
def test_variants_equal_peft(runs, models, chats, tokenizer, name, targets, settings, optimizer):
    probe = torch.load(runs / name / "probe0.pt")
    model = peft_model(models["tied"]["hf"], probe, targets, **settings)
    theirs = train_with_peft(model, rows(chats, tokenizer, 6 * 8), 6, **optimizer)
    ours = losses(runs, name)[0]
    assert [ours[step] for step in range(1, 7)] == pytest.approx([loss for loss, _ in theirs], abs=1e-4)
    assert all(abs(ours[6] - losses(runs, other)[0][6]) > 1e-3 for other in VARIANTS if other != name)
    assert len(probe["began"]) == 4 * 2 * len(targets)


@pytest.mark.parametrize("layout", ["one_recompute", *LAYOUTS])
def test_layout_equals_one_process(runs, layout):
    assert_same(losses(runs, "one"), losses(runs, layout))


def test_lora_plus_is_the_same_at_another_layout(runs):
    assert_same(losses(runs, "lora_plus"), losses(runs, "lora_plus_dp2"))


@pytest.mark.parametrize("name", ["again", "again_tp2", "tp2_to_pp2", "tp2_to_dp2"])
def test_resumed_run_equals_the_one_that_was_not(runs, name):
    assert_same(losses(runs, "one"), losses(runs, name))


@pytest.mark.parametrize("name", ["dropout", "bf16"])
def test_resumes_bit_for_bit(runs, name):
    assert_same(losses(runs, name), losses(runs, f"{name}_again"), tolerance=0)
    plain = losses(runs, "one")[0]
    assert max(abs(loss - plain[step]) for step, loss in losses(runs, name)[0].items()) > 1e-4


def test_an_adapter_goes_back_to_its_newest_checkpoint(runs):
    """The fourth step's batch is broken: the rest is what a run learns that goes back to step 2 by hand."""
    broken, by_hand = losses(runs, "rolled_back"), losses(runs, "returned")
    assert [broken[0][step] for step in (1, 2, 3, 5, 6)] == [by_hand[0][step] for step in (1, 2, 3, 5, 6)]
    assert broken[2][4] is None and broken[1] == by_hand[1] and by_hand[0][5] != losses(runs, "one")[0][5]


@pytest.mark.parametrize("name", ["long", "one", *LAYOUTS, *VARIANTS])
def test_only_the_adapter_is_trained(runs, name):
    """Bit for bit, with no gradient or its buffer for anything else."""
    probe = torch.load(runs / name / "probe0.pt")
    assert probe["trained"] == probe["with_gradient"] == set(probe["began"])
    assert len(probe["sizes"]) > len(probe["trained"])
    elements = sum(value.numel() for value in probe["began"].values())
    assert elements <= probe["gradient_elements"] < 1.2 * elements + 4096
    assert not probe["in_use"]


def test_a_begins_as_pefts_does(runs):
    for name, value in torch.load(runs / "long" / "probe0.pt")["began"].items():
        if name.endswith("linear_in.weight"):
            bound = 1 / math.sqrt(value.shape[1])
            assert value.abs().max() <= bound
            assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
            assert abs(value.mean()) < 0.15 * bound
        else:
            assert not value.any()


def test_a_checkpoint_holds_the_adapter_alone(runs):
    from conversion.dist_checkpoint import read

    _, checkpoint = run_folder.newest_checkpoint(runs / "long" / run_folder.CHECKPOINTS)
    elements = sum(value.numel() for value in torch.load(runs / "long" / "probe0.pt")["began"].values())
    stored = read(checkpoint / "weights")
    assert all(".adapter." in name for name in stored)
    weights = {name: t for name, t in stored.items() if not name.startswith("optimizer.")}
    assert sum(math.prod(t.shape) for t in weights.values()) == elements
    assert sum(math.prod(t.shape) for t in stored.values()) <= 4 * elements  # and fp32 copy and two moments


@pytest.mark.parametrize("name", ["long", "rslora", "some"])
def test_exported_adapter_in_peft_computes_the_trained_models_logits(runs, models, tmp_path, name):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from conversion.lora import from_nemo
    from conversion.lora.nemo import describe
    from nemo_ext.architecture import Architecture

    architecture = Architecture(**models["tied"]["architecture"])
    keys = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "rslora": False, "targets": "all-linear", **VARIANTS.get(name, {})}
    described = runs / name / run_folder.MODEL
    described.mkdir()
    run_folder.write_json(described / "architecture.json", architecture.to_dict())
    run_folder.write_json(described / "adapter.json", describe(architecture, keys, "the/base", "float32"))
    folder = from_nemo.convert(runs / name, tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, keys["rslora"])
    assert config["base_model_name_or_path"] == "the/base"

    base = LlamaForCausalLM.from_pretrained(models["tied"]["hf"]).float().eval()
    ours, tokens = torch.load(runs / name / "probe0.pt")["logits"], torch.arange(2 * 32).reshape(2, 32) * 7 % 500
    with torch.no_grad():
        before = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, folder).eval()(tokens).logits
    assert (theirs - before).abs().max() > 0.1
    assert (theirs - ours[..., : theirs.shape[-1]]).abs().max() < 1e-5 * theirs.abs().max().clamp(min=1)
