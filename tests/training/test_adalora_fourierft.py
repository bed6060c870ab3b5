"""AdaLoRA and FourierFT trained by the recipe: PEFT's losses and ranks, the same at every layout, exact when resumed.

fp32 on gloo; the Llama and the conversations of test_adapters.
"""

import json
import math

import pytest
import torch
from test_adapters import ALL, BEGINNING, rows
from test_layouts import assert_follows, assert_same, losses

from nemo_ext import run_folder
from nemo_ext.schedule import schedule_factor

STEPS, SEQ, LR = 20, 64, 1e-2
COMMON = dict(seq=SEQ, lr=LR, val_every=20)
BUCKETS = {"trainer.strategy.ddp.bucket_size": 1_000}
ADALORA = dict(init_rank=4, target_rank=2, alpha=32.0, rank_warmup=3, rank_final=5, delta_t=2, orthogonality=0.3)
SHORT = dict(init_rank=4, target_rank=2, alpha=8.0, rank_warmup=1, rank_final=1, delta_t=1, orthogonality=0.3)
FOURIER = dict(n_frequency=200, scaling=30.0, frequency_seed=5, spectrum_start="normal")
METHODS = {"adalora": (ADALORA, SHORT), "fourierft": (FOURIER, dict(FOURIER, n_frequency=12, spectrum_start="zeros"))}
LAYOUTS = {
    "tp2": dict(tp=2, sp=False),
    "pp2_vp2": dict(pp=2, vp=2),
    "dp2_distributed_optimizer": dict(distributed_optimizer=True, overlap=True),
}
PLACES = {"adapter_q": "q_proj", "adapter_k": "k_proj", "adapter_v": "v_proj", "adapter_gate": "gate_proj",
          "adapter_up": "up_proj", "linear_proj": "o_proj", "linear_fc2": "down_proj"}  # fmt: skip


@pytest.fixture(scope="module")
def runs(train, chats):
    """All cases of one process and of two, by method and name."""

    def case(method, name, keys, **other):
        recipe = dict(recipe=f"{method}_llama3", model="tied")
        return dict(name=f"{method}_{name}", keys={**COMMON, **keys}, blend=chats.blend(), **{**recipe, **other})

    one, two = [], []
    for method, (long, short) in METHODS.items():
        long, short = dict(long, steps=STEPS, pack=False), dict(short, steps=6, pack=True)
        again = {"overrides": BUCKETS, "continue_copy_of": f"{method}_stopped"}
        fused = dict(recipe=f"{method}_phi4", model="phi3")
        one += [
            case(method, "long", long, probe=True),
            case(method, "one", short, probe=True),
            case(method, "stopped", short, stop_at=4, overrides=BUCKETS),
            case(method, "fused", short, probe=True, **fused),
        ]
        stop = {"stop_at": BEGINNING} if method == "fourierft" else {}  # AdaLoRA's ranks are settled in step 15
        two += [case(method, "long_tp2", {**long, "tp": 2, "sp": True}, **stop)]
        two += [case(method, name, {**short, **keys}, probe=True) for name, keys in LAYOUTS.items()]
        two += [case(method, "again_tp2", {**short, "tp": 2, "sp": True}, **again)]
        two += [case(method, "fused_tp2", {**short, "tp": 2, "sp": False}, **fused)]
    bf16 = dict(SHORT, steps=6, precision="bf16")
    one += [
        case("adalora", "again", dict(SHORT, steps=6), overrides=BUCKETS, continue_copy_of="adalora_stopped"),
        case("adalora", "bf16", bf16),
        case("adalora", "bf16_stopped", bf16, stop_at=4),
        case("adalora", "bf16_again", bf16, continue_copy_of="adalora_bf16_stopped"),
    ]
    two += [case("adalora", "bf16_dp2", {**bf16, **LAYOUTS["dp2_distributed_optimizer"]}, overrides=BUCKETS)]
    folder = train(one, 1)
    train(two, 2, into=folder)
    return folder


def peft_model(hf, config, began, sides):
    """PEFT's model with the values that the run began with; `sides` are our parameters' names by PEFT's."""
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    model = get_peft_model(LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager").float(), config)
    values = {}
    for name, value in began.items():
        parts = name.split(".")
        module = next(hf_name for ours, hf_name in PLACES.items() if ours in parts)
        values[f".{parts[parts.index('layers') + 1]}.", module, parts[-1]] = value
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(values)
    for name, parameter in trained.items():
        parts = name.split(".")
        layer, module, side = f".{parts[parts.index('layers') + 1]}.", parts[-3], sides[parts[-2]]
        parameter.data.copy_(values[layer, module, side].reshape(parameter.shape))
    return model, list(trained.values())


def train_with_peft(model, own, data, steps, after=lambda step: None):
    """[(loss of the tokens, gradient norm)] of a plain loop; `after(step)` runs between AdamW's step and the next gradients."""
    optimizer = torch.optim.AdamW(own, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    found = []
    for step in range(steps):
        batch = [data[8 * step + i] for i in range(8)]
        tokens, labels, mask = (torch.stack([row[key] for row in batch]) for key in ("tokens", "labels", "loss_mask"))
        labels = labels.masked_fill(mask == 0, -100)
        output = model(tokens, labels=labels, shift_labels=labels)  # with PEFT's own term in the loss
        output.loss.backward()
        loss = torch.nn.functional.cross_entropy(output.logits.detach().flatten(0, 1), labels.flatten())
        norm = torch.nn.utils.clip_grad_norm_(own, 1.0)
        factor = schedule_factor(step, schedule="cosine", max_steps=steps, warmup_steps=2, floor=0.1, decay_fraction=0.2)
        optimizer.param_groups[0]["lr"] = LR * factor
        optimizer.step()
        after(step + 1)
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def allocations(folder, name):
    """{step: ranks} that a run wrote."""
    lines = (folder / name / run_folder.METRICS).read_text().splitlines()
    return {r["step"]: r["ranks"] for r in map(json.loads, lines) if "ranks" in r}


def test_twenty_steps_of_adalora_and_its_ranks_equal_pefts(runs, models, chats, tokenizer):
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=32, tinit=3, tfinal=5, deltaT=2, beta1=0.85, beta2=0.85, orth_reg_weight=0.3,
        total_step=STEPS, target_modules=ALL, task_type="CAUSAL_LM",
    )  # fmt: skip
    began = torch.load(runs / "adalora_long" / "probe0.pt")["began"]
    sides = {"lora_A": "right", "lora_E": "values", "lora_B": "left"}
    model, own = peft_model(models["tied"]["hf"], config, began, sides)
    patterns = {}

    def allocate(step):
        before = model.peft_config["default"].rank_pattern
        model.base_model.update_and_allocate(step)
        pattern = model.peft_config["default"].rank_pattern
        if pattern is not before:
            patterns[step] = pattern

    theirs = train_with_peft(model, own, rows(chats, tokenizer, STEPS * 8), STEPS, allocate)
    assert theirs[-1][0] < theirs[0][0] - 0.2
    assert list(patterns) == [4, 6, 8, 10, 12, 14, 15]
    for name in ("adalora_long", "adalora_long_tp2"):
        assert_follows(runs, name, theirs)
        ours = allocations(runs, name)
        assert list(ours) == list(patterns)
        for step, pattern in patterns.items():
            for module, ranks in ours[step].items():
                assert ranks == [sum(pattern[key]) for key in pattern if f".{module}." in key], (name, step, module)
    assert len({rank for ranks in ours[15].values() for rank in ranks}) > 2  # an allocation, not a smaller rank
    assert sum(sum(ranks) for ranks in ours[15].values()) == 2 * 4 * len(ALL)
    kept = {
        name.removeprefix("base_model.model."): (e.abs() > 0).flatten().tolist()
        for name, e in model.named_parameters()
        if "lora_E" in name
    }
    assert kept == patterns[15]  # to the end


def test_twenty_steps_of_fourierft_equal_pefts(runs, models, chats, tokenizer):
    from peft import FourierFTConfig

    config = FourierFTConfig(
        n_frequency=200, scaling=30.0, random_loc_seed=5, target_modules=ALL, task_type="CAUSAL_LM"
    )  # fmt: skip
    began = torch.load(runs / "fourierft_long" / "probe0.pt")["began"]
    model, own = peft_model(models["tied"]["hf"], config, began, {"fourierft_spectrum": "coefficients"})
    theirs = train_with_peft(model, own, rows(chats, tokenizer, STEPS * 8), STEPS)
    assert_follows(runs, "fourierft_long", theirs)
    assert_follows(runs, "fourierft_long_tp2", theirs[:BEGINNING])
    assert theirs[-1][0] < theirs[0][0] - 0.1


def test_a_spectrum_begins_with_zeros_or_drawn(runs):
    short, long = (torch.load(runs / f"fourierft_{name}" / "probe0.pt")["began"] for name in ("one", "long"))
    assert all((value == 0).all() for value in short.values())
    assert all(0.8 < value.std() < 1.2 for value in long.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_process(runs, method, name):
    assert_same(losses(runs, f"{method}_one"), losses(runs, f"{method}_{name}"), 1e-4)
    assert allocations(runs, f"{method}_one") == allocations(runs, f"{method}_{name}")


@pytest.mark.parametrize(
    ("method", "whole", "again", "tolerance"),
    [
        ("adalora", "one", "again", 0),
        ("adalora", "one", "again_tp2", 1e-4),
        ("adalora", "bf16", "bf16_again", 0),
        ("fourierft", "one", "again_tp2", 1e-4),
    ],
)
def test_resuming_is_exact_and_changes_layout(runs, method, whole, again, tolerance):
    assert_same(losses(runs, f"{method}_{whole}"), losses(runs, f"{method}_{again}"), tolerance)
    assert allocations(runs, f"{method}_{whole}") == allocations(runs, f"{method}_{again}")


@pytest.mark.parametrize("method", METHODS)
def test_a_fused_linears_parts_are_the_same_at_every_layout(runs, method):
    assert_same(losses(runs, f"{method}_fused"), losses(runs, f"{method}_fused_tp2"), 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["long", "one", *LAYOUTS])
def test_only_the_adapter_is_trained(runs, method, name):
    probe = torch.load(runs / f"{method}_{name}" / "probe0.pt")
    assert probe["with_gradient"] == set(probe["began"])
    cut = {name for name in probe["began"] if name.endswith(".values")}  # perhaps all of them, back to the zero of the start
    assert probe["with_gradient"] - cut <= probe["trained"] <= probe["with_gradient"]
    assert len(probe["sizes"]) > len(probe["trained"])


def test_what_was_cut_stays_zero_in_bf16(runs):
    """Also where the optimizer's fp32 copy is sharded over two processes."""
    from conversion.dist_checkpoint import read

    for name in ("bf16", "bf16_dp2"):
        _, checkpoint = run_folder.newest_checkpoint(runs / f"adalora_{name}" / run_folder.CHECKPOINTS)
        stored = read(checkpoint / "weights")
        values = [key for key in stored if key.endswith(".values")]
        assert len(values) == len(ALL)
        for key in values:
            kept = torch.stack([stored[key.removesuffix("values") + "kept"].read(i) for i in range(4)])
            weights = torch.stack([stored[key].read(i) for i in range(4)])
            assert ((weights != 0) == (kept == 1)).all()
            assert 0 < kept.sum() <= kept.numel()


def test_a_checkpoint_holds_the_adapter_alone(runs):
    from conversion.dist_checkpoint import read

    for method in METHODS:
        _, checkpoint = run_folder.newest_checkpoint(runs / f"{method}_long" / run_folder.CHECKPOINTS)
        elements = sum(v.numel() for v in torch.load(runs / f"{method}_long" / "probe0.pt")["began"].values())
        stored = read(checkpoint / "weights")
        assert all(".adapter." in name for name in stored)
        assert sum(math.prod(t.shape) for t in stored.values()) <= 7 * elements  # fp32 copy, two moments, AdaLoRA's two means


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT says so of what it saves itself, and uses them
@pytest.mark.parametrize(("method", "name", "model"), [(m, *of) for m in METHODS for of in (("long", "tied"), ("fused", "phi3"))])
def test_exported_adapter_in_peft_and_merged_compute_the_trained_models_logits(runs, models, tmp_path, method, name, model):
    """Also of a model whose queries, keys and values are one linear, and lie in another order in Megatron's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from conversion.lora import from_nemo
    from conversion.lora.merge import merge
    from conversion.lora.nemo import describe
    from nemo_ext.architecture import Architecture

    architecture, run = Architecture(**models[model]["architecture"]), runs / f"{method}_{name}"
    keys = {"targets": "all-linear", "dropout": 0.0, "steps": STEPS, "importance_decay": 0.85, "uncertainty_decay": 0.85,
            **METHODS[method][name != "long"]}  # fmt: skip
    described = run / run_folder.MODEL
    described.mkdir()
    run_folder.write_json(described / "architecture.json", architecture.to_dict())
    run_folder.write_json(described / "adapter.json", describe(architecture, keys, "the/base", "float32", kind=method))
    folder = from_nemo.convert(run, tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == (method.upper(), "the/base")
    linears = len(ALL) if model == "tied" else 4
    if method == "adalora":
        ranks = [sum(kept) for kept in config["rank_pattern"].values()]
        assert sum(ranks) == 2 * 4 * linears
        assert set(map(len, config["rank_pattern"].values())) == {4}

    base = AutoModelForCausalLM.from_pretrained(models[model]["hf"]).float().eval()
    ours, tokens = torch.load(run / "probe0.pt")["logits"], torch.arange(2 * 32).reshape(2, 32) * 7 % 500
    with torch.no_grad():
        before = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, folder).eval()(tokens).logits
    assert (theirs - before).abs().max() > (0.1 if name == "long" else 1e-3)
    assert (theirs - ours[..., : theirs.shape[-1]]).abs().max() < 1e-5 * theirs.abs().max().clamp(min=1)
    merged = merge(models[model]["hf"], folder, tmp_path / "merged")  # compares with PEFT's logits, and raises
    assert merged.tensors == 4 * linears
    assert merged.difference.relative < 1e-4
