"""QLoRA trained by the recipe: the losses of PEFT on bitsandbytes' rounded weights, at every layout, with no full weight kept.

fp32 on gloo. The wide Llama's shards are whole blocks of 64, so that tensor ranks have the blocks of the whole.
"""

import pytest
import torch
from test_adapters import ALL, BEGINNING, COMMON, STEPS, peft_model, rows, train_with_peft
from test_layouts import assert_follows, assert_same, losses

from nemo_ext import run_folder

WIDE = dict(recipe="qlora_llama3", model="wide")
LONG = dict(COMMON, steps=STEPS, pack=False)
SHORT = dict(COMMON, steps=6, pack=True)
FAMILIES = {"gemma2": "qlora_gemma2", "mixtral": "qlora_mixtral"}


@pytest.fixture(scope="module")
def runs(train, chats):
    """All cases by name, of one process and of two."""

    def case(name, keys, **other):
        return dict(name=name, keys=keys, blend=chats.blend(), **{**WIDE, **other})

    one = [
        case("long", LONG, probe=True),
        case("once", {**LONG, "steps": BEGINNING, "double_quant": False}, probe=True),
        case("one", SHORT),
        case("recompute", {**SHORT, "recompute": "full"}),
        case("lora", SHORT, recipe="lora_llama3"),
        case("bf16", {**SHORT, "precision": "bf16"}),
        case("stopped", SHORT, stop_at=4),
        case("again", SHORT, continue_copy_of="stopped"),
        *(case(name, {**LONG, "steps": 1, "warmup": 0}, recipe=recipe, model=name) for name, recipe in FAMILIES.items()),
    ]
    folder = train(one, 1)
    two = [
        case("long_tp2", {**LONG, "tp": 2, "sp": True}, stop_at=BEGINNING),
        case("once_tp2", {**LONG, "steps": BEGINNING, "tp": 2, "double_quant": False}),
        case("pp2_vp2", {**SHORT, "pp": 2, "vp": 2}),
        case("again_tp2", {**SHORT, "tp": 2}, continue_copy_of="stopped"),
    ]
    train(two, 2, into=folder)
    return folder


def quantized(hf, double_quant=True):
    """Hugging Face's model with the weights of bitsandbytes' Linear4bit, dequantized: its products are in fp32, those of
    Linear4bit's kernels on a CPU are not."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head", "gate"],
    )  # fmt: skip
    options = dict(attn_implementation="eager", dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(hf, quantization_config=config, device_map={"": "cpu"}, **options)
    model = AutoModelForCausalLM.from_pretrained(hf, **options)
    modules = [(name, module) for name, module in rounded.named_modules() if isinstance(module, Linear4bit)]
    assert len(modules) >= 4 * len(ALL)
    for name, module in modules:
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert not torch.equal(weight, model.get_submodule(name).weight)
        model.get_submodule(name).weight.data.copy_(weight)
    return model


@pytest.mark.parametrize(("name", "steps", "double_quant"), [("long", STEPS, True), ("once", BEGINNING, False)])
def test_steps_equal_peft_on_bitsandbytes(runs, models, chats, tokenizer, name, steps, double_quant):
    probe = torch.load(runs / name / "probe0.pt")
    model = peft_model(models["wide"]["hf"], probe, ALL, base=quantized(models["wide"]["hf"], double_quant))
    theirs = train_with_peft(model, rows(chats, tokenizer, steps * 8), steps)
    assert_follows(runs, name, theirs)
    assert_follows(runs, f"{name}_tp2", theirs[:BEGINNING])


def test_it_learns_something_else_than_lora(runs):
    ours, plain = losses(runs, "one")[0], losses(runs, "lora")[0]
    assert all(1e-4 < abs(ours[step] - plain[step]) < 0.1 for step in ours)
    long = losses(runs, "long")[0]
    assert min(long.values()) < long[1] - 0.5


@pytest.mark.parametrize("layout", ["recompute", "pp2_vp2"])
def test_layout_equals_one_process(runs, layout):
    assert_same(losses(runs, "one"), losses(runs, layout))


def test_resumes_exactly(runs):
    assert_same(losses(runs, "one"), losses(runs, "again"), tolerance=0)
    assert_same(losses(runs, "one"), losses(runs, "again_tp2"))


def test_bf16_follows_fp32(runs):
    ours, exact = losses(runs, "bf16")[0], losses(runs, "one")[0]
    assert all(ours[step] == pytest.approx(exact[step], abs=0.03) for step in exact)


@pytest.mark.parametrize("name", FAMILIES)
def test_first_loss_is_the_quantized_models(runs, models, chats, tokenizer, name):
    data = rows(chats, tokenizer, 8)
    tokens, labels, mask = (torch.stack([data[i][key] for i in range(8)]) for key in ("tokens", "labels", "loss_mask"))

    def loss(model):
        with torch.no_grad():
            each = torch.nn.functional.cross_entropy(
                model.eval()(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none"
            )
        return ((each * mask.flatten()).sum() / mask.sum()).item()

    from transformers import AutoModelForCausalLM

    ours = losses(runs, name)[0][1]
    assert ours == pytest.approx(loss(quantized(models[name]["hf"])), abs=1e-5)
    assert abs(ours - loss(AutoModelForCausalLM.from_pretrained(models[name]["hf"], attn_implementation="eager"))) > 1e-4


def test_no_full_weight_is_a_parameter_and_checkpoints_hold_the_adapter_alone(runs):
    from conversion.dist_checkpoint import read

    probe = torch.load(runs / "long" / "probe0.pt")
    assert not any(name.endswith("to_wrap.weight") for name in probe["sizes"])
    assert probe["trained"] == probe["with_gradient"] == set(probe["began"])
    _, checkpoint = run_folder.newest_checkpoint(runs / "long" / run_folder.CHECKPOINTS)
    assert all(".adapter." in name for name in read(checkpoint / "weights"))
