"""A model with eyes, trained by the recipe: transformers' losses, the same at every layout, exact when resumed, nothing changed
but what the stage trains.

fp32 on gloo; a Llama of four layers, a SigLIP of three, and sixty conversations with none, one or two images.
"""

import json
import random

import layouts
import pytest
import torch
from test_layouts import LAYOUTS, assert_follows, assert_same, losses

from nemo_ext.multimodal.description import Encoder, Projector, Sense
from nemo_ext.schedule import schedule_factor

SEQ, STEPS, LR = (layouts.KEYS[name] for name in ("seq", "steps", "lr"))
VISION = dict(model_type="siglip_vision_model", hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
              image_size=16, patch_size=4)  # fmt: skip
INSTRUCT = dict(stage="instruct", train_tower="full")  # all weights learn
# Where a gradient is nothing but rounding, Adam takes whole steps in its direction: not with a larger epsilon
LARGE_EPSILON = dict(pack=False, eps=1e-5)
ADAPTER = dict(LARGE_EPSILON, stage="instruct", rank=4, alpha=8.0, lr=1e-2)
LORA = {**ADAPTER, "train_language": "lora"}
TOWER_LORA = {**ADAPTER, "train_language": "frozen", "train_tower": "lora"}
RATES = {**INSTRUCT, **LARGE_EPSILON, "tower_lr": 4e-3, "projector_lr": 2e-3}
# and many micro batches without an image
LAYOUTS = {**LAYOUTS, "dp2_micro1": dict(micro_batch=1, pack=False, eps=1e-5, overlap=True)}


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """`hf`, a LLaVA folder; `weights`, the same for Megatron; `senses`, `architecture`, `tokenizer` with <image> in it."""
    from transformers import AutoTokenizer, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    from conversion.hf_to_nemo import convert
    from nemo_ext.data.multimodal.image import ImageSettings
    from nemo_ext.data.multimodal.inputs import ImageInput

    folder = tmp_path_factory.mktemp("neva")
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.save_pretrained(folder / "tokenizer")
    token = words.convert_tokens_to_ids("<image>")
    text = LlamaConfig(vocab_size=576,  # a multiple of 64: padding would take part in Megatron's softmax
                       hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(1)
    vision = SiglipVisionConfig(**VISION)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision, text, image_token_index=token, vision_feature_layer=-2, vision_feature_select_strategy="full",
                    tie_word_embeddings=True)
    )  # fmt: skip
    llava.save_pretrained(folder / "hf")
    sense = Sense(Encoder({**vision.to_dict()}, -2), Projector(), token)
    weights = convert(folder / "hf", folder / "nemo")
    source = ImageInput(sense, ImageSettings.of_encoder(VISION))
    architecture = json.loads((weights / "architecture.json").read_text())
    return {"hf": str(folder / "hf"), "weights": str(weights), "senses": [source.to_dict()], "input": source,
            "architecture": architecture, "tokenizer": str(folder / "tokenizer")}  # fmt: skip


@pytest.fixture(scope="module")
def chats(model, tmp_path_factory):
    """Sixty conversations about pictures of one colour."""
    from PIL import Image

    from nemo_ext.data.chat.render import Settings
    from nemo_ext.data.multimodal.store import prepare
    from nemo_ext.data.sources import MEDIA, parse

    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(1)
    records = []
    for number in range(60):
        count = (0, 1, 2, 0)[number % 4]
        names = [f"{number}-{i}.png" for i in range(count)]
        for name in names:
            Image.new("RGB", (20, 24), tuple(rng.randrange(256) for _ in range(3))).save(folder / name)
        asked = "<image>" * count + rng.choice(["value", "class list", "of"])
        said = " ".join(rng.choices("a the of in string not".split(), k=rng.randint(1, 4)))
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        records.append({"id": str(number), **({"image": names} if names else {}), "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return prepare(parse(str(folder / "data.json"), MEDIA), model["tokenizer"], folder / "cache", Settings(SEQ), [model["input"]],
                   heldout=0.2, workers=1)  # fmt: skip


def train(cases, processes, out, model, chats):
    cases = [
        dict(case, recipe="neva_llama3", model="neva", probe=True, keys={"data": "data.json", **case["keys"]}) for case in cases
    ]
    models = {"neva": {name: model[name] for name in ("weights", "senses", "architecture")}}
    layouts.train(cases, processes, out, models, model["tokenizer"], chats.blend())


@pytest.fixture(scope="module")
def runs(model, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train(
        [
            dict(name="one", keys=INSTRUCT),
            dict(name="one_unpacked", keys={**INSTRUCT, **LARGE_EPSILON}),
            dict(name="recompute", keys={**INSTRUCT, "recompute": "full"}),
            dict(name="align", keys=dict(stage="align")),
            dict(name="instruct", keys=dict(stage="instruct")),
            dict(name="lora", keys=LORA),
            dict(name="tower_lora", keys=TOWER_LORA),
            dict(name="stopped_tower_lora", keys=TOWER_LORA, stop_at=4),
            dict(name="rates", keys=RATES),
            dict(name="stopped_rates", keys=RATES, stop_at=4),
            dict(name="stopped", keys=INSTRUCT, stop_at=4),
            dict(name="again", keys=INSTRUCT, continue_copy_of="stopped"),
        ],
        1, out, model, chats,
    )  # fmt: skip
    two = [dict(name=name, keys={**INSTRUCT, **keys}) for name, keys in LAYOUTS.items()]
    two += [dict(name="lora_tp2_sp", keys={**LORA, "tp": 2, "sp": True}), dict(name="lora_pp2", keys={**LORA, "pp": 2}),
            dict(name="tower_lora_tp2_sp", keys={**TOWER_LORA, "tp": 2, "sp": True}),
            dict(name="again_tower_lora_pp2", keys={**TOWER_LORA, "pp": 2}, continue_copy_of="stopped_tower_lora")]  # fmt: skip
    two += [
        dict(name="rates_dp2", keys=RATES),
        dict(name="again_rates_pp2", keys={**RATES, "pp": 2}, continue_copy_of="stopped_rates"),
    ]
    two += [dict(name="align_pp2", keys=dict(stage="align", pp=2)),
            dict(name="align_tp2_sp", keys=dict(stage="align", tp=2, sp=True)),
            dict(name="again_pp2", keys={**INSTRUCT, "pp": 2}, continue_copy_of="stopped"),
            dict(name="align_stopped_pp2", keys=dict(stage="align", pp=2), stop_at=4),
            dict(name="align_pp2_to_dp2", keys=dict(stage="align"), continue_copy_of="align_stopped_pp2")]  # fmt: skip
    train(two, 2, out, model, chats)
    return out


@pytest.mark.parametrize("layout", ["recompute", *LAYOUTS])
def test_layout_equals_one_process(runs, layout):
    one = losses(runs, "one_unpacked" if layout == "dp2_micro1" else "one")
    assert_same(one, losses(runs, layout))
    assert one[0][STEPS] < one[0][1] - 0.05  # and it learns


@pytest.mark.parametrize("layout", ["align_pp2", "align_tp2_sp", "align_pp2_to_dp2"])
def test_aligning_equals_one_process(runs, layout):
    """With two stages, the second has nothing to train."""
    assert_same(losses(runs, "align"), losses(runs, layout))


@pytest.mark.parametrize(
    ("one", "other"),
    [("lora", "lora_tp2_sp"), ("lora", "lora_pp2"), ("tower_lora", "tower_lora_tp2_sp"), ("tower_lora", "again_tower_lora_pp2")],
)
def test_adapters_equal_one_process(runs, one, other):
    assert_same(losses(runs, one), losses(runs, other))


@pytest.mark.parametrize("layout", ["rates_dp2", "again_rates_pp2"])
def test_rates_of_the_parts_equal_one_process(runs, layout):
    assert_same(losses(runs, "rates"), losses(runs, layout))


@pytest.mark.parametrize("name", ["again", "again_pp2"])
def test_resumed_run_equals_the_one_that_was_not(runs, name):
    assert_same(losses(runs, "one"), losses(runs, name))


TRAINED = {
    "align": lambda name: ".projector." in name,
    "lora": lambda name: ".adapter." in name or ".projector." in name,
    "tower_lora": lambda name: ".adapter." in name or ".projector." in name,
    "instruct": lambda name: "senses." not in name or ".projector." in name,
    "one": lambda name: (
        not any(f"encoder.{part}" in name for part in ("vision_model.encoder.layers.2", "vision_model.post", "vision_model.head"))
    ),
}


@pytest.mark.parametrize(
    ("name", "stage"), [*((stage, stage) for stage in TRAINED), ("align_tp2_sp", "align"), ("lora_tp2_sp", "lora")]
)
def test_only_what_the_stage_trains_changes(runs, name, stage):
    """Bit for bit; the rest has no gradient, no buffer for one, and no optimizer state."""
    probe = torch.load(runs / name / "probe0.pt")
    wanted = {n for n in probe["sizes"] if TRAINED[stage](n)}
    assert probe["trained"] == probe["with_gradient"] == wanted
    elements = sum(probe["sizes"][n] for n in wanted)
    assert elements <= probe["gradient_elements"] < 1.1 * elements + 4096
    assert 2 * elements <= probe["optimizer_elements"] < 3.3 * elements + 4096 * 3  # two moments, and perhaps an fp32 copy
    assert any(n.endswith("vision.encoder") for n in probe["in_use"]) == (stage not in ("one", "tower_lora"))
    assert any(".decoder." in f".{n}" and ".adapter." in n for n in wanted) == (stage == "lora")
    assert any("senses." in n and ".adapter." in n for n in wanted) == (stage == "tower_lora")


def test_a_stage_with_nothing_to_train_keeps_nothing(runs):
    probe = torch.load(runs / "align_pp2" / "probe1.pt")
    assert not probe["trained"] and not probe["with_gradient"] and not any("senses" in n for n in probe["sizes"])
    assert probe["gradient_elements"] == probe["optimizer_elements"] == 0


def rows(model, chats):
    """The micro batches of eight rows that the runs without packing train on, in order."""
    from transformers import AutoTokenizer

    from nemo_ext.data.chat.module import TrainingRows
    from nemo_ext.data.multimodal.module import Collate, RowBuilder
    from nemo_ext.data.multimodal.store import Samples

    samples = [Samples(prefix) for _, prefix, _ in chats.blend()]
    eod = AutoTokenizer.from_pretrained(model["tokenizer"]).eos_token_id
    builder = RowBuilder(SEQ, eod, samples[0].unit, "none", [model["input"]], False, True)
    found = TrainingRows(samples, [None], builder, False, 8 * STEPS, 1234)
    for step in range(STEPS):
        yield Collate([model["input"]])([found[8 * step + i] for i in range(8)])


def train_theirs(theirs, batches, lr, tower_lr=None, projector_lr=None):
    """(loss, gradient norm) of each step of a plain loop with torch's AdamW."""
    trained = [p for p in theirs.parameters() if p.requires_grad]
    parts = {"vision_tower": tower_lr or lr, "multi_modal_projector": projector_lr or lr, "language_model": lr, "lm_head": lr}
    groups = [
        {
            "params": [p for name, p in theirs.named_parameters() if p.requires_grad and f"{part}." in name],
            "lr": rate,
            "peak": rate,
        }
        for part, rate in parts.items()
    ]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for step, batch in enumerate(batches):
        images = dict(pixel_values=batch["vision_inputs"]) if len(batch["vision_inputs"]) else {}
        logits = theirs(input_ids=batch["tokens"], **images).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        loss = (each * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
        if loss.requires_grad:  # not where only eyes learn, and no row has an image
            loss.backward()
        for p in trained:  # a gradient of zero is no step that Adam leaves out
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        factor = schedule_factor(step, schedule="cosine", max_steps=STEPS, warmup_steps=2, floor=0.1, decay_fraction=0.2)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), norm.item()


def test_losses_and_gradient_norms_are_transformers(runs, model, chats):
    from transformers import LlavaForConditionalGeneration

    for name, rates in {"one_unpacked": {}, "rates": {key: RATES[key] for key in ("tower_lr", "projector_lr")}}.items():
        theirs = LlavaForConditionalGeneration.from_pretrained(model["hf"]).float().train()
        assert_follows(runs, name, list(train_theirs(theirs, rows(model, chats), LR, **rates)), loss=1e-5, norm=1e-4)


def test_an_adapter_of_the_tower_is_pefts(runs, model, chats):
    """With the A that the run began with, the projector trained too."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(model["hf"]).float()
    targets = r".*vision_tower.*encoder\.layers\.[01]\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    began, count = torch.load(runs / "tower_lora" / "probe0.pt")["began"], 0
    for name, parameter in theirs.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
        elif parameter.requires_grad:
            module = name.split("vision_model.")[1].split(".lora_")[0]
            side = "linear_in" if "lora_A" in name else "linear_out"
            parameter.data.copy_(began[f"0.senses.vision.encoder.vision_model.{module}.adapter.{side}.weight"])
            count += 1
    assert count == len(began) == 2 * 6 * 2
    assert_follows(runs, "tower_lora", list(train_theirs(theirs, rows(model, chats), 1e-2)))
