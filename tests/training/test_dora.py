"""DoRA, MoE-DoRA and ranks of single linears, trained by the recipe: PEFT's losses, or those of the equations written out.

fp32 on gloo; a Llama of four layers and short conversations, as in test_adapters.
"""

import json

import pytest
import torch
from test_adapters import ALL, BEGINNING, LR, SEQ, STEPS, rows, train_with_peft
from test_layouts import assert_follows, assert_same, losses
from torch import nn

from nemo_ext import run_folder
from nemo_ext.architecture import Architecture

COMMON = dict(seq=SEQ, lr=LR, rank=4, alpha=8.0, val_every=20)
LONG = dict(COMMON, steps=STEPS, pack=False)
STEADY = dict(LONG, lr=LR / 2)  # at LR the gradient norm jumps from 0.4 to 5 in step 11, and differences of rounding with it
SHORT = dict(COMMON, steps=4, pack=True, rank=3)  # which no layout divides
SOME = dict(targets="k_proj,o_proj,up_proj,down_proj", ranks="k_proj:2,mlp:6", alphas="up_proj:3", rslora=True, lora_plus=4.0)
PATTERNS = dict(
    target_modules=["k_proj", "o_proj", "up_proj", "down_proj"], use_rslora=True, alpha_pattern={"up_proj": 3},
    rank_pattern={"k_proj": 2, "up_proj": 6, "down_proj": 6},
)  # fmt: skip
EXPERTS = dict(experts=3, top_k=2, top_layers=2, balance=0.5)
LAYOUTS = {
    "pp2_vp2": dict(pp=2, vp=2),
    "dp2": dict(distributed_optimizer=True, overlap=True, micro_batch=2),
    "moe_tp2": dict(tp=2, sp=False),  # whose lower layers are plain
    "moe_dp2": dict(distributed_optimizer=True, overlap=True, micro_batch=2),
}
PLACES = {"adapter_q": "q_proj", "adapter_k": "k_proj", "adapter_v": "v_proj", "adapter_gate": "gate_proj",
          "adapter_up": "up_proj", "linear_proj": "o_proj", "linear_fc2": "down_proj"}  # fmt: skip


@pytest.fixture(scope="module")
def runs(train, chats):
    """All cases by name, of one process and of two."""

    def case(name, keys, method="dora", **other):
        keys = {**keys, **(EXPERTS if method == "moe_dora" else {})}
        return dict(name=name, keys=keys, blend=chats.blend(), recipe=f"{method}_llama3", model="tied", **other)

    one = [
        case("long", STEADY, probe=True),
        case("some", {**LONG, "steps": 6, **SOME}, probe=True),
        case("lora_some", {**LONG, "steps": 6, **SOME}, "lora", probe=True),
        case("one", SHORT, probe=True),
        case("bf16", {**SHORT, "precision": "bf16"}, probe=True),
        case("bf16_stopped", {**SHORT, "precision": "bf16"}, stop_at=2),
        case("bf16_again", {**SHORT, "precision": "bf16"}, continue_copy_of="bf16_stopped"),
        case("moe_long", LONG, "moe_dora", probe=True),
        case("moe_one", SHORT, "moe_dora"),
        case("moe_one_recompute", {**SHORT, "recompute": "full"}, "moe_dora"),
    ]
    two = [
        case("long_tp2", {**STEADY, "tp": 2, "sp": True}, stop_at=BEGINNING),
        case("moe_long_tp2", {**LONG, "tp": 2, "sp": True}, "moe_dora", stop_at=BEGINNING),
    ]
    for name, keys in LAYOUTS.items():
        two.append(case(name, {**SHORT, **keys}, "moe_dora" if name.startswith("moe_") else "dora", probe=True))
    for method, prefix in (("dora", ""), ("moe_dora", "moe_")):
        two += [
            case(f"{prefix}stopped", {**SHORT, "tp": 2, "sp": True}, method, stop_at=2),
            case(f"{prefix}tp2_to_pp2", {**SHORT, "pp": 2}, method, continue_copy_of=f"{prefix}stopped"),
        ]
    folder = train(one, 1)
    train(two, 2, into=folder)
    return folder


def began(probe):
    """{(layer, Hugging Face's linear): {"linear_in": A, "linear_out": B, "weight_magnitude": m, "router": R}} at the start."""
    found = {}
    for name, value in probe["began"].items():
        parts = name.removesuffix(".weight").split(".")
        module = next(hf for ours, hf in PLACES.items() if ours in parts)
        found.setdefault((int(parts[parts.index("layers") + 1]), module), {})[parts[-1]] = value
    return found


def peft_model(hf, probe, **settings):
    """PEFT's model with the A that the run began with; its magnitudes are its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager").float()
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **settings}, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for (layer, name), parts in began(probe).items():
        block = model.base_model.model.model.layers[layer]
        module = getattr(block.self_attn if name in ALL[:4] else block.mlp, name)
        module.lora_A["default"].weight.data.copy_(parts["linear_in"])
        assert not parts["linear_out"].any()
        if config.use_dora:
            assert torch.allclose(parts["weight_magnitude"], module.lora_magnitude_vector["default"].weight, rtol=1e-6)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(value.numel() for value in probe["began"].values())
    return model


class Mixture(nn.Module):
    """The equations of nemo_ext.adapters.moe_dora on one linear, with every expert's weight made; one expert is a DoRA."""

    def __init__(self, base, parts, scale, top_k):
        super().__init__()
        self.base, self.scale, self.top_k = base, scale, top_k
        self.experts = len(parts["router"]) if "router" in parts else 1
        self.a, self.b, self.m = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for i in range(self.experts):
            self.a.append(parts["linear_in"].chunk(self.experts)[i].clone())
            self.b.append(parts["linear_out"].chunk(self.experts, 1)[i].clone())
            self.m.append(parts["weight_magnitude"].reshape(self.experts, -1)[i].clone())
        self.router = nn.Parameter(parts["router"].clone()) if "router" in parts else None
        self.balance = []

    def forward(self, x):
        outputs = []
        for a, b, m in zip(self.a, self.b, self.m, strict=True):
            weight = self.base.weight + self.scale * b @ a
            stretched = weight / weight.detach().norm(dim=1, keepdim=True) * m[:, None]
            outputs.append(nn.functional.linear(x, stretched, self.base.bias))
        if self.router is None:
            return outputs[0]
        p = torch.softmax(x @ self.router.T, -1)
        lowest = p.sort(-1).values[..., -self.top_k, None]
        kept = p * (p >= lowest)
        for row, chosen in zip(p, p >= lowest, strict=True):
            shares = chosen.float().sum(0) / (self.top_k * len(row))
            self.balance.append(self.experts * (shares * row.mean(0)).sum())
        weights = kept / kept.sum(-1, keepdim=True)
        return sum(weights[..., i, None] * output for i, output in enumerate(outputs))


def mixture_model(hf, probe):
    """Hugging Face's model with a `Mixture` for each linear, as the run began."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(hf, attn_implementation="eager").float()
    model.requires_grad_(False)
    for (layer, name), parts in began(probe).items():
        block = model.model.layers[layer]
        block = block.self_attn if name in ALL[:4] else block.mlp
        setattr(block, name, Mixture(getattr(block, name), parts, 8 / 4, EXPERTS["top_k"]))
    return model


def train_mixture(model, data, steps):
    """[(loss, gradient norm, balance)] with torch's AdamW; the balancing loss added to the mean over the learnt tokens."""
    from nemo_ext.schedule import schedule_factor

    own = [p for p in model.parameters() if p.requires_grad]
    mixtures = [m for m in model.modules() if isinstance(m, Mixture)]
    optimizer = torch.optim.AdamW(own, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    found = []
    for step in range(steps):
        batch = [data[8 * step + i] for i in range(8)]
        tokens, labels, mask = (torch.stack([row[key] for row in batch]) for key in ("tokens", "labels", "loss_mask"))
        each = nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (each * mask.flatten()).sum() / mask.sum()
        balance = torch.stack([value for m in mixtures for value in m.balance]).mean()
        (loss + EXPERTS["balance"] * balance).backward()
        norm = nn.utils.clip_grad_norm_(own, 1.0)
        factor = schedule_factor(step, schedule="cosine", max_steps=steps, warmup_steps=2, floor=0.1, decay_fraction=0.2)
        for group in optimizer.param_groups:
            group["lr"] = LR * factor
        optimizer.step()
        optimizer.zero_grad()
        for m in mixtures:
            m.balance.clear()
        found.append((loss.item(), norm.item(), balance.item()))
    return found


TOKENS = torch.arange(2 * 32).reshape(2, 32) * 7 % 500


def test_twenty_steps_equal_peft(runs, models, chats, tokenizer):
    probe = torch.load(runs / "long" / "probe0.pt")
    model = peft_model(models["tied"]["hf"], probe, use_dora=True)
    theirs = train_with_peft(model, rows(chats, tokenizer, STEPS * 8), STEPS, lr=STEADY["lr"])
    assert_follows(runs, "long", theirs)
    assert_follows(runs, "long_tp2", theirs[:BEGINNING])
    assert theirs[-1][0] < theirs[0][0] - 0.2


@pytest.mark.parametrize(("name", "dora"), [("some", True), ("lora_some", False)])
def test_ranks_of_single_linears_equal_pefts_patterns(runs, models, chats, tokenizer, name, dora):
    probe = torch.load(runs / name / "probe0.pt")
    model = peft_model(models["tied"]["hf"], probe, use_dora=dora, **PATTERNS)
    theirs = train_with_peft(model, rows(chats, tokenizer, 6 * 8), 6, lora_plus=SOME["lora_plus"])
    assert_follows(runs, name, theirs)
    rates = [record["lr"] for record in run_folder.read_records(runs / name)[0]]
    assert max(rates) == pytest.approx(LR)  # A's, not B's


def test_experts_equal_the_equations(runs, models, chats, tokenizer):
    probe = torch.load(runs / "moe_long" / "probe0.pt")
    model = mixture_model(models["tied"]["hf"], probe)
    assert [len(layer.mlp.up_proj.a) for layer in model.model.layers] == [1, 1, 3, 3]
    theirs = train_mixture(model, rows(chats, tokenizer, STEPS * 8), STEPS)
    for name, steps in (("moe_long", STEPS), ("moe_long_tp2", BEGINNING)):
        assert_follows(runs, name, [(loss, norm) for loss, norm, _ in theirs[:steps]])
        balance = {record["step"]: record["balance"] for record in run_folder.read_records(runs / name)[0]}
        for step, (_, _, even) in enumerate(theirs[:steps], 1):
            assert balance[step] == pytest.approx(even, abs=1e-4), (name, step)
    assert theirs[-1][0] < theirs[0][0] - 0.2
    with torch.no_grad():
        logits = model.eval()(TOKENS).logits
    assert (logits - probe["logits"][..., : logits.shape[-1]]).abs().max() < 1e-3


@pytest.mark.parametrize("layout", [*LAYOUTS, "moe_one_recompute", "tp2_to_pp2", "moe_tp2_to_pp2"])
def test_layout_equals_one_process(runs, layout):
    """Also one that was stopped under tensor and sequence parallelism and resumed in a pipeline."""
    assert_same(losses(runs, "moe_one" if layout.startswith("moe_") else "one"), losses(runs, layout))


def test_bf16_resumes_bit_for_bit_and_keeps_magnitudes_in_fp32(runs):
    assert_same(losses(runs, "bf16"), losses(runs, "bf16_again"), tolerance=0)
    ours, full = (torch.load(runs / name / "probe0.pt")["began"] for name in ("bf16", "one"))
    for name, value in full.items():
        rounded = ours[name.replace("0.", "0.module.", 1)]
        assert rounded.dtype == (torch.float32 if name.endswith("weight_magnitude") else torch.bfloat16)
        assert torch.allclose(rounded.float(), value, atol=5e-3)
    assert losses(runs, "bf16")[0][1] == pytest.approx(losses(runs, "one")[0][1], abs=0.05)


@pytest.mark.parametrize("name", ["long", "some", "lora_some", "bf16", "moe_long", *LAYOUTS])
def test_only_the_adapter_is_trained(runs, name):
    probe = torch.load(runs / name / "probe0.pt")
    assert probe["trained"] == probe["with_gradient"] == set(probe["began"])
    assert len(probe["sizes"]) > len(probe["trained"])


@pytest.mark.parametrize(("name", "kind", "keys"), [("long", "dora", {}), ("some", "dora", SOME), ("lora_some", "lora", SOME)])
def test_exported_adapter_in_peft_and_merged(runs, models, tmp_path, name, kind, keys):
    """Both compute the trained model's logits."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from conversion.lora import from_nemo
    from conversion.lora.merge import merge
    from conversion.lora.nemo import describe

    described = runs / name / run_folder.MODEL
    described.mkdir()
    architecture = Architecture(**models["tied"]["architecture"])
    keys = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "rslora": False, "targets": "all-linear", **keys}
    run_folder.write_json(described / "architecture.json", architecture.to_dict())
    run_folder.write_json(described / "adapter.json", describe(architecture, keys, "the/base", "float32", kind=kind))
    folder = from_nemo.convert(runs / name, tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] == (kind == "dora") and config["r"] == 4
    if keys.get("ranks"):
        assert config["rank_pattern"] == PATTERNS["rank_pattern"] and config["alpha_pattern"] == PATTERNS["alpha_pattern"]

    ours = torch.load(runs / name / "probe0.pt")["logits"]
    base = LlamaForCausalLM.from_pretrained(models["tied"]["hf"]).float().eval()
    with torch.no_grad():
        before = base(TOKENS).logits
        theirs = PeftModel.from_pretrained(base, folder).eval()(TOKENS).logits
    limit = 1e-5 * theirs.abs().max().clamp(min=1)
    assert (theirs - before).abs().max() > 0.1
    assert (theirs - ours[..., : theirs.shape[-1]]).abs().max() < limit
    merge(models["tied"]["hf"], folder, tmp_path / "hf", measure=False)
    with torch.no_grad():
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "hf").float().eval()(TOKENS).logits
    assert (merged - theirs).abs().max() < limit
