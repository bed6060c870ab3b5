"""Floating-point operations of towers and projectors against torch's counter on the modules, and against a sum by hand."""

import pytest

from nemo_ext import platform

platform.activate()

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from nemo_ext.multimodal import adapter, encoder, flops  # noqa: E402
from nemo_ext.multimodal.description import Encoder, Projector, Sense  # noqa: E402
from nemo_ext.multimodal.freezing import Trained  # noqa: E402
from nemo_ext.multimodal.model import SenseModule  # noqa: E402

PATCHES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
SIGLIP = Encoder(dict(PATCHES, model_type="siglip_vision_model"), -2)
CLIP = Encoder(dict(PATCHES, model_type="clip_vision_model"), -1)
WHISPER = Encoder(dict(model_type="whisper", d_model=24, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=40,
                       num_mel_bins=8, max_source_positions=32), None)  # fmt: skip
INPUTS = {"vision": (3, 32, 32), "audio": (8, 64)}
HIDDEN, RANK, COUNT = 64, 4, 2
SENSES = {
    "siglip": Sense(SIGLIP, Projector(), 1),
    "clip_linear": Sense(CLIP, Projector("linear"), 1),
    "whisper": Sense(WHISPER, Projector(downsample=4), 1),
    "shuffled": Sense(SIGLIP, Projector(downsample=2), 1),
}


def made(sense: Sense, tower: str) -> SenseModule:
    module = SenseModule(sense, HIDDEN)
    module.encoder.config._attn_implementation = "eager"  # whose products the counter sees
    module.encoder.requires_grad_(tower == "full")
    for parameter in encoder.unused(module.encoder, sense.encoder):
        parameter.requires_grad_(False)
    if tower == "lora":
        adapter.put(encoder.computed_layers(module.encoder, sense.encoder), RANK, 1.0, 0.0, 1)
    return module.train()


@pytest.mark.parametrize("name", SENSES)
@pytest.mark.parametrize("tower", ["frozen", "full", "lora"])
def test_forward_and_backward_are_what_torch_counts(name, tower):
    sense = SENSES[name]
    module, inputs = made(sense, tower), torch.randn(COUNT, *INPUTS[sense.modality])
    with FlopCounterMode(display=False) as counter:
        module(inputs, torch.arange(COUNT * sense.tokens)).sum().backward()
    counted = counter.get_total_flops() / COUNT
    expected = flops.trained_flops(sense, HIDDEN, Trained("frozen", tower), RANK)
    if tower == "lora":  # the first adapted layer's queries, keys and values see an input without a gradient
        positions = sense.tokens * sense.projector.downsample ** len(sense.encoder.grid)
        positions = positions if name != "clip_linear" else positions + 1
        expected -= 2 * positions * 3 * (24 * 24 + 24 * RANK)
    assert counted == expected


@pytest.mark.parametrize("name", ["siglip", "whisper"])
def test_forward_is_what_torch_counts_of_transformers_module(name):
    sense = SENSES[name]
    sense = Sense(Encoder(sense.encoder.config, -1 if name == "siglip" else None), Projector(), 1)
    module = encoder.build(sense.encoder)
    module.config._attn_implementation = "eager"
    inputs = torch.randn(1, *INPUTS[sense.modality])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(inputs) if name == "whisper" else module.vision_model.encoder(module.vision_model.embeddings(inputs))
    assert counter.get_total_flops() == flops.encoder_flops(sense.encoder)


def test_so400m_by_hand():
    """SigLIP-so400m/14-384: 27 layers of 1152 and 4304 over 729 patches, the last not computed."""
    config = dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                  num_attention_heads=16, image_size=384, patch_size=14)  # fmt: skip
    linears = 729 * (4 * 1152**2 + 2 * 1152 * 4304)
    attention = 2 * 729**2 * 1152
    by_hand = 2 * (26 * (linears + attention) + 729 * 3 * 14 * 14 * 1152)
    assert flops.encoder_flops(Encoder(config, -2)) == by_hand
