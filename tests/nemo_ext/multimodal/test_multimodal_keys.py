"""Keys of recipes that give a model eyes or ears: what a stage decides, what is planned, what is refused."""

import pytest

import recipes
from launchers import layout, plan, senses
from nemo_ext import platform
from nemo_ext.errors import UserError
from nemo_ext.multimodal import towers

platform.activate()

SO400M = dict(tower="random:siglip-so400m-14-384", gpu_memory=80.0, gpus=1, micro_batch=1)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ("frozen", "frozen", 1e-3)),
        ({"stage": "instruct"}, ("full", "frozen", 2e-5)),
        ({"stage": "instruct", "train_language": "lora"}, ("lora", "frozen", 2e-4)),
        ({"train_tower": "lora"}, ("frozen", "lora", 2e-4)),
        ({"stage": "instruct", "lr": 5e-5, "train_tower": "full"}, ("full", "full", 5e-5)),
    ],
)
def test_a_stage_says_what_is_trained_and_how_fast(given, wanted):
    keys = recipes.resolve("neva_llama3", {"data": "chats.json", **given}, cuda=False)
    assert (keys["train_language"], keys["train_tower"], keys["lr"]) == wanted
    assert keys["tower_lr"] is keys["projector_lr"] is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ("glyphs:10", "random:glyphs", "full", 2e-3, None, None)),
        ({"data": "glyphs", "lr": 1e-4}, ("glyphs", "random:glyphs", "full", 1e-4, None, None)),
        ({"stage": "instruct"}, ("glyphs:10", "random:glyphs", "full", 2e-5, 2e-3, 2e-3)),
        ({"train_language": "lora", "train_tower": "frozen"}, ("glyphs:10", "random:glyphs", "frozen", 2e-4, None, 2e-3)),
        ({"data": "glyphs", "model": "hf:own"}, ("glyphs", None, "frozen", 1e-3, None, None)),
        ({"data": "glyphs", "tower": "hf:own"}, ("glyphs", "hf:own", "frozen", 1e-3, None, None)),
    ],
)
def test_glyphs_on_a_cpu_have_what_learns_them(given, wanted):
    """With the model and the tower that come along, and with nothing else."""
    keys = recipes.resolve("neva_llama3", given, cuda=False)
    assert tuple(keys[name] for name in ("data", "tower", "train_tower", "lr", "tower_lr", "projector_lr")) == wanted
    assert recipes.resolve("neva_llama3", keys, cuda=False) == keys


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("neva_llama3", {"stage": "both"}, "stage=both"),
        ("neva_llama3", {"stage": "instruct", "train_tower": "lora"}, "train_tower=lora goes with train_language=frozen or lora"),
        ("neva_llama3", {"tower": "random:vgg"}, "tower=random:vgg is no known shape: siglip-so400m-14-384"),
        ("neva_llama3", {"tower": "random:whisper-tiny"}, "tower=random:whisper-tiny is of audio"),
        ("neva_llama3", {"tower": "random:glyphs", "downsample": 0}, "downsample=0"),
        ("neva_llama3", {"cp": 2}, "cp=2: embeddings of media"),
        ("neva_llama3", {"stage": "instruct", "export": "lora"}, "trains no adapter: train_language=lora"),
        ("neva_llama3", {"data": "chats.json", "tower_lr": 1e-3}, "tower_lr=0.001: the tower is frozen: train_tower=full"),
        ("neva_llama3", {"projector_lr": 0.0}, "projector_lr=0.0 must be above 0"),
        ("sft_llama3", {"projector_lr": 1e-3}, "projector_lr= is for recipe=neva_llama3"),
        ("alm_llama3", {"tiling": "1x2"}, "tiling= is of images"),
        ("sft_llama3", {"tower": "random:glyphs"}, "tower= is for recipe=neva_llama3, not for sft_llama3"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe, given, message):
    with pytest.raises(UserError, match=message):
        recipes.resolve(recipe, given, cuda=False)


@pytest.mark.parametrize("name", ["glyphs", "clip-vit-base-16", "siglip-base-16-224", "whisper-tiny"])
def test_published_shapes_have_the_parameters_that_are_counted(name):
    """On torch's meta device: nothing is allocated."""
    import torch

    from nemo_ext.multimodal.model import SenseModule

    sense = towers.sense(towers.shape(name), downsample=2)
    with torch.device("meta"):
        module = SenseModule(sense, 64)
    encoder, projector = (sum(p.numel() for p in part.parameters()) for part in (module.encoder, module.projector))
    assert encoder == sense.encoder.num_parameters() and projector == sense.projector_parameters(64)


def test_so400m_is_as_large_as_it_is_called():
    """428 million parameters with the head that pools, as google/siglip-so400m-patch14-384 counts its vision model."""
    sense = towers.sense(towers.shape("siglip-so400m-14-384"))
    assert sense.encoder.num_parameters() == 428_225_600 and sense.tokens == 729


def plan_of(**given):
    method, _ = recipes.split("neva_llama3")
    keys = recipes.resolve("neva_llama3", {**SO400M, **given}, cuda=True)
    architecture = recipes.architecture("neva_llama3", keys)
    return plan.plan(architecture, senses.request(method, keys, None, None, architecture))


def test_the_plan_counts_tower_and_projector():
    align, whole = plan_of(), plan_of(train_tower="full")
    sense = towers.sense(towers.shape("siglip-so400m-14-384"))
    tower, projector = sense.encoder.num_parameters(), sense.projector_parameters(4096)
    assert align.parameters == 8_030_261_248 + tower + projector
    assert align.memory.gradients == 4 * projector and align.memory.optimizer == 12 * projector
    assert whole.memory.gradients == 4 * (tower + projector)
    assert whole.memory.activations > align.memory.activations
    text = "\n".join(align.lines())
    assert f"projector {projector:,}; {projector:,} trained; 729 embeddings an input" in text
    text_alone = layout.request(
        {**recipes.resolve("sft_llama3", {"gpu_memory": 80.0, "gpus": 1}, cuda=True), "tp": 1, "pp": 1}, None, 0.0, False
    )
    assert plan.plan(recipes.models.size("llama3", "8b").architecture, text_alone).memory.weights == (
        align.memory.weights - 2 * (tower + projector)
    )


def test_grids_of_tiles():
    sense = towers.sense(towers.shape("siglip-base-16-224"))
    assert senses.parse_tiling("1x2,2x1", sense).grids == ((224, 448), (448, 224))
    assert senses.parse_tiling(["448x448"], sense).grids == ((448, 448),)
    assert senses.parse_tiling(None, sense) is None
    for bad in ("2", "0x2", "axb", "300x448"):
        with pytest.raises(UserError, match="tiling="):
            senses.parse_tiling(bad, sense)


def test_random_encoders_are_hugging_faces_classes():
    from nemo_ext.multimodal.encoder import build

    found = {name: type(build(towers.sense(towers.shape(name)).encoder)).__name__ for name in ("glyphs", "whisper-tiny")}
    assert found == {"glyphs": "SiglipVisionModel", "whisper-tiny": "WhisperEncoder"}


def test_layerwise_decay_slows_the_tower_as_the_embedding_and_not_the_projector():
    from nemo_ext.optim import depth_of

    names = {"senses.vision.encoder.vision_model.encoder.layers.3.mlp.fc1.weight": 0, "senses.vision.projector.linear_1.bias": 9}
    assert {name: depth_of(name, 0, 8, False) for name in names} == names
