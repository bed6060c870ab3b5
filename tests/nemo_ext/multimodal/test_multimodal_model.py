"""A GPTModel with senses computes what transformers' multimodal models compute; projectors what a computation by hand gives."""

import pytest
import torch

from nemo_ext import platform
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Encoder, Projector, Sense, Tiling

platform.activate()

TOKEN, VOCAB, HIDDEN = 7, 128, 32
TEXT = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4)
AUDIO = dict(d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=8, max_source_positions=20)


def decoder(text_model, folder):
    """Megatron's GPTModel, text alone, of a Hugging Face model. Megatron's parallel state must be there."""
    from conversion import nemo_folder
    from conversion.compare.megatron import load_megatron
    from conversion.hf_to_nemo import convert

    text_model.save_pretrained(folder / "hf")
    return load_megatron(nemo_folder.find(convert(folder / "hf", folder / "nemo")), 64)


def put_weights(module, tower, projector):
    """Weights of Hugging Face's tower and projector, by hand; nothing may be left over on either side."""
    module.encoder.load_state_dict(tower.state_dict())
    module.projector.load_state_dict(projector.state_dict())


@pytest.fixture(scope="module", params=["clip_vision_model", "siglip_vision_model", "clip_vision_model, class token, gemma2"])
def llava(request, tmp_path_factory):
    """(transformers' LLaVA, the GPTModel with the same weights)."""
    from transformers import (
        CLIPVisionConfig,
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    from conversion.compare.megatron import single_process
    from nemo_ext.multimodal.model import attach

    kind, *other = request.param.split(", ")
    torch.manual_seed(1)
    vision = (CLIPVisionConfig if kind.startswith("clip") else SiglipVisionConfig)(**VISION)
    text = LlamaConfig(**TEXT)
    if other:
        text = Gemma2Config(**TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
    full = kind.startswith("siglip") or bool(other)
    config = LlavaConfig(vision, text, image_token_index=TOKEN, vision_feature_layer=-2,
                         vision_feature_select_strategy="full" if full else "default")  # fmt: skip
    theirs = LlavaForConditionalGeneration(config).eval()
    alone = (Gemma2ForCausalLM if other else LlamaForCausalLM)(text)
    alone.model.load_state_dict(theirs.model.language_model.state_dict())
    alone.lm_head.load_state_dict(theirs.lm_head.state_dict())
    sense = Sense(Encoder(vision.to_dict(), -2, class_token=bool(other)), Projector(), TOKEN)
    with single_process():
        ours = decoder(alone, tmp_path_factory.mktemp("llava"))
        attach(ours, [sense])
        put_weights(ours.senses["vision"], theirs.model.vision_tower, theirs.model.multi_modal_projector)
        yield theirs, ours


def forward(model, tokens, **media):
    s = tokens.shape[1]
    mask = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None]
    return model(tokens, torch.arange(s).expand_as(tokens), mask, **media)[..., :VOCAB]


def tolerance(model):
    """Of logits. Gemma 2's are less exact: they and its scores go through a hyperbolic tangent."""
    return 1e-4 if getattr(model.config, "scales_inputs", False) else 1e-5


def text_with_images(counts, each, s=48):
    """Random tokens `[b, s]` in which row i has `counts[i]` images of `each` placeholders, with text between them."""
    tokens = torch.randint(8, VOCAB, (len(counts), s))
    for row, count in enumerate(counts):
        for image in range(count):
            start = 2 + row + image * (each + 2)
            tokens[row, start : start + each] = TOKEN
    return tokens


@pytest.mark.parametrize("counts", [(1,), (2, 0), (1, 2)])
def test_logits_on_text_and_images_are_transformers(llava, counts):
    theirs, ours = llava
    torch.manual_seed(2)
    each = ours.senses["vision"].sense.tokens
    tokens = text_with_images(counts, each)
    images = torch.randn(sum(counts), 3, 16, 16)
    with torch.no_grad():
        wanted = theirs(input_ids=tokens, pixel_values=images).logits
        found = forward(ours, tokens, vision_inputs=images, vision_gather=torch.arange(each * sum(counts)))
        other = forward(ours, tokens, vision_inputs=images + 1, vision_gather=torch.arange(each * sum(counts)))
    assert (found - wanted).abs().max() < tolerance(ours)
    assert (other - wanted).abs().max() > 1e-3


def test_text_alone_is_transformers_with_and_without_an_empty_batch_of_images(llava):
    theirs, ours = llava
    tokens = text_with_images((0, 0), 1)
    nothing = dict(vision_inputs=torch.zeros(0, 3, 16, 16), vision_gather=torch.zeros(0, dtype=torch.int64))
    with torch.no_grad():
        wanted = theirs(input_ids=tokens).logits
        assert (forward(ours, tokens) - wanted).abs().max() < tolerance(ours)
        assert (forward(ours, tokens, **nothing) - wanted).abs().max() < tolerance(ours)


def test_gradients_are_transformers_and_zero_without_images(llava):
    theirs, ours = llava
    torch.manual_seed(3)
    module = ours.senses["vision"]
    tokens, images = text_with_images((1, 1), module.sense.tokens), torch.randn(2, 3, 16, 16)
    theirs.zero_grad()
    theirs(input_ids=tokens, pixel_values=images).logits.square().mean().backward()
    names = dict(theirs.model.vision_tower.named_parameters())
    ours.zero_grad()
    gather = torch.arange(2 * module.sense.tokens)
    forward(ours, tokens, vision_inputs=images, vision_gather=gather).square().mean().backward()
    for name, parameter in module.encoder.named_parameters():
        assert (names[name].grad is None) == (parameter.grad is None) == (not parameter.requires_grad), name
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, names[name].grad, atol=1e-6, rtol=1e-4), name
    weight = theirs.model.multi_modal_projector.linear_1.weight
    assert torch.allclose(module.projector.linear_1.weight.grad, weight.grad, atol=1e-6, rtol=1e-4)

    ours.zero_grad()
    nothing = dict(vision_inputs=images[:0], vision_gather=gather[:0])
    forward(ours, text_with_images((0,), 1), **nothing).sum().backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_a_frozen_encoder_keeps_nothing_for_a_backward_pass(llava):
    _, ours = llava
    module = ours.senses["vision"]
    wanted = [p.requires_grad for p in module.encoder.parameters()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        module(torch.randn(1, 3, 16, 16), torch.arange(4))
        of_all = len(kept)
        module.encoder.requires_grad_(False)
        module(torch.randn(1, 3, 16, 16), torch.arange(4))
    assert module.train().encoder.training is False
    for parameter, value in zip(module.encoder.parameters(), wanted, strict=True):
        parameter.requires_grad_(value)
    assert module.train().encoder.training is True
    assert len(kept) - of_all < of_all / 4


def test_placeholders_without_features_are_refused(llava):
    _, ours = llava
    tokens = text_with_images((1,), ours.senses["vision"].sense.tokens)
    with pytest.raises(ValueError, match="placeholders for 3 embeddings"):
        forward(ours, tokens, vision_inputs=torch.zeros(1, 3, 16, 16), vision_gather=torch.arange(3))


def module_of(encoder, projector, tiling=None):
    from nemo_ext.multimodal.model import SenseModule

    torch.manual_seed(4)
    return SenseModule(Sense(encoder, projector, TOKEN, tiling), HIDDEN).eval()


SIGLIP = Encoder({"model_type": "siglip_vision_model", **VISION}, None)


def test_last_hidden_state_after_the_final_norm_is_siglips():
    module = module_of(SIGLIP, Projector())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = module.projector(module.encoder(images).last_hidden_state).flatten(0, 1)
        assert torch.allclose(module(images, torch.arange(32)), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_pixel_shuffle_by_hand(kind):
    """Two by two of the sixteen patches, in reading order, and blocks in reading order."""
    module = module_of(SIGLIP, Projector(kind, downsample=2))
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        patches = module.encoder(images).last_hidden_state[0]
        blocks = [
            torch.cat([patches[4 * (2 * i + a) + 2 * j + b] for a in (0, 1) for b in (0, 1)]) for i in (0, 1) for j in (0, 1)
        ]
        p = module.projector
        wanted = torch.stack(blocks) @ p.linear_1.weight.T + p.linear_1.bias
        if kind != "linear":
            wanted = torch.nn.functional.gelu(wanted) @ p.linear_2.weight.T + p.linear_2.bias
        found = module(images, torch.arange(4))
    assert module.sense.tokens == 4 and torch.allclose(found, wanted, atol=1e-6)
    assert {n.split(".")[0] for n, _ in p.named_parameters()} == ({"linear_1"} if kind == "linear" else {"linear_1", "linear_2"})


def test_gather_takes_any_order_and_the_newline():
    module = module_of(SIGLIP, Projector(), Tiling(((16, 32),)))
    images = torch.randn(2, 3, 16, 16)
    whole = module(images, torch.arange(32))
    assert torch.equal(module(images, torch.tensor([32, 5, 5])), torch.stack([module.newline, whole[5], whole[5]]))


def test_whisper_with_stacked_frames_is_voxtral():
    from transformers import LlamaConfig, VoxtralConfig, VoxtralForConditionalGeneration
    from transformers.models.voxtral.configuration_voxtral import VoxtralEncoderConfig

    torch.manual_seed(5)
    audio = VoxtralEncoderConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_mel_bins=8,
                                 max_source_positions=20)  # fmt: skip
    theirs = VoxtralForConditionalGeneration(
        VoxtralConfig(audio.to_dict(), {**LlamaConfig(**TEXT).to_dict(), "model_type": "llama"})
    ).eval()
    encoder = Encoder({"model_type": "whisper", **{**AUDIO, "encoder_ffn_dim": 64}}, None)
    module = module_of(encoder, Projector(downsample=4, bias=False))
    put_weights(module, theirs.audio_tower, theirs.multi_modal_projector)
    windows = torch.randn(2, 8, 40)
    with torch.no_grad():
        assert torch.allclose(module(windows, torch.arange(10)), theirs.get_audio_features(windows), atol=1e-6)


def test_recomputed_encoder_has_the_same_gradients():
    from nemo_ext.multimodal.encoder import computed_layers

    module = module_of(SIGLIP, Projector()).train()
    images = torch.randn(2, 3, 16, 16)
    found, passes = [], []
    computed_layers(module.encoder, SIGLIP)[0].register_forward_pre_hook(lambda *_: passes.append(module.recompute))
    for module.recompute in (False, True):
        module.zero_grad()
        module(images, torch.arange(32)).square().sum().backward()
        found.append([p.grad.clone() for p in module.parameters() if p.requires_grad])
    assert passes == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(encoder=dict(model_type="resnet")), "model_type='resnet' is not known"),
        (dict(encoder=dict(model_type="siglip_vision_model", **VISION), class_token=True), "class_token=true: a siglip"),
        (dict(encoder=dict(model_type="siglip_vision_model", **VISION), feature_layer=-5), "feature_layer=-5"),
        (
            dict(encoder=dict(model_type="clip_vision_model", **VISION), class_token=True, downsample=2),
            "downsample=2 joins patches",
        ),
        (dict(encoder=dict(model_type="clip_vision_model", **VISION), downsample=3), "downsample=3 does not divide"),
        (dict(encoder=dict(model_type="clip_vision_model", **VISION), kind="qformer"), "projector=qformer is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        encoder = Encoder(settings["encoder"], settings.get("feature_layer", -2), settings.get("class_token", False))
        Sense(encoder, Projector(settings.get("kind", "linear"), settings.get("downsample", 1)), TOKEN)
