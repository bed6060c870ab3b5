"""Models composed of a text model, an encoder and a fresh projector: transformers loads them, each part computes as before."""

import json
from pathlib import Path

import pytest
import tiny_models
import tiny_multimodal
import torch
from safetensors.torch import load_file

from conversion import hf_to_nemo, nemo_folder, nemo_to_hf
from conversion.multimodal import senses_of
from conversion.multimodal.compose import compose
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Projector, Tiling

CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A tied llama whose tokenizer fills the vocabulary, so that the placeholder needs a row."""
    folder = tiny_models.save("llama_tied_scaled", tmp_path_factory.mktemp("text") / "text")
    return tiny_multimodal.save_tokenizer(folder, tiny_models.SIZES["vocab_size"], CHATML)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A whole CLIP, text part included, in shards."""
    import transformers as tf

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    config = tf.CLIPConfig(text_config=small, vision_config=tiny_multimodal.PATCHES, projection_dim=8)
    folder = tmp_path_factory.mktemp("clip") / "clip"
    torch.manual_seed(1)
    tf.CLIPModel(config).save_pretrained(folder, max_shard_size="40KB")
    tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def composed(text, clip, tmp_path_factory) -> Path:
    return compose(text, tmp_path_factory.mktemp("composed") / "llava", encoder=f"hf:{clip}")


def test_transformers_loads_it_and_its_parts_compute_as_before(text, clip, composed):
    import transformers as tf

    model, report = tf.LlavaForConditionalGeneration.from_pretrained(composed, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    model.eval()
    pixels, ids = torch.randn(2, 3, 28, 28), torch.randint(250, (1, 9))
    with torch.no_grad():
        assert torch.equal(model.vision_tower(pixels).last_hidden_state,
                           tf.CLIPVisionModel.from_pretrained(clip).eval()(pixels).last_hidden_state)  # fmt: skip
        logits, original = model(ids).logits, tf.LlamaForCausalLM.from_pretrained(text).eval()(ids).logits
    assert torch.equal(logits[..., :250], original)
    assert logits.shape[-1] == 256
    assert torch.allclose(logits[..., 250], original.mean(-1), atol=1e-5)  # the placeholder's row never gives the largest


def test_the_processor_expands_and_the_chat_template_takes_parts(composed):
    import numpy as np
    import transformers as tf
    from PIL import Image

    processor = tf.AutoProcessor.from_pretrained(composed)
    assert type(processor).__name__ == "LlavaProcessor"
    parts = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    chat = processor.apply_chat_template([{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}])
    assert chat == "<|user|><image>\nwhat is it?\n<|assistant|>a cat\n"
    (sense,) = senses_of(hf_to_nemo.read_config(composed))
    image = Image.fromarray(np.zeros((40, 30, 3), np.uint8))
    inputs = processor(images=[image], text=chat, return_tensors="pt")
    assert (inputs["input_ids"] == sense.token_id).sum() == sense.tokens == 4
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)


def test_it_converts_and_comes_back(composed, tmp_path):
    nemo = hf_to_nemo.convert(composed, tmp_path / "nemo")
    found = nemo_folder.find(nemo)
    assert found.senses == senses_of(hf_to_nemo.read_config(composed))
    assert found.architecture.vocab_size == 256  # of 251 tokens: a multiple of 64, so that training pads nothing
    back = nemo_to_hf.export(nemo, tmp_path / "back")
    names = {path.name for path in composed.iterdir()}
    assert {"processor_config.json", "preprocessor_config.json", "tokenizer.json"} <= names
    assert {path.name for path in back.iterdir()} == names | {"conversion.json"}
    assert all((back / name).read_bytes() == (composed / name).read_bytes() for name in names - {"config.json"})
    assert json.loads((back / "config.json").read_text()) == json.loads((composed / "config.json").read_text())


def test_seeds_decide_fresh_weights(text, tmp_path):
    config = {"model_type": "siglip_vision_model", **tiny_multimodal.PATCHES}
    first, again, other = (
        load_file(compose(text, tmp_path / name, encoder=config, seed=seed) / "model.safetensors")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {name for name in first if name.startswith(("vision", "multi")) and first[name].std() > 0}
    fc1 = first["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"]
    assert abs(fc1.std() - (2 / (32 + 48)) ** 0.5) < 0.01  # Xavier


def test_tiling_is_llava_next(text, clip, tmp_path):
    import numpy as np
    import transformers as tf
    from PIL import Image

    grids = Tiling(((28, 56), (56, 28)))
    folder = compose(text, tmp_path / "next", encoder=f"hf:{clip}", tiling=grids)
    model, report = tf.LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = tf.AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 70, 3), np.uint8))
    inputs = processor(images=[image], text="<image> x", return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert senses_of(hf_to_nemo.read_config(folder))[0].tiling == grids


def test_whisper_becomes_voxtral(text, tmp_path):
    import transformers as tf

    small = dict(d_model=24, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=96, decoder_layers=1,
                 decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=16, vocab_size=64,
                 pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    whisper = tf.WhisperForConditionalGeneration(tf.WhisperConfig(**small)).eval()
    whisper.save_pretrained(tmp_path / "whisper")
    folder = compose(text, tmp_path / "voxtral", encoder=f"hf:{tmp_path / 'whisper'}")
    model, report = tf.VoxtralForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    mel = torch.randn(1, 8, 32)
    with torch.no_grad():
        ours = model.eval().audio_tower(mel).last_hidden_state
        assert torch.allclose(ours, whisper.model.encoder(mel).last_hidden_state, atol=1e-6)
    (sense,) = senses_of(hf_to_nemo.read_config(folder))
    assert sense.tokens == 4 and sense.projector == Projector(downsample=4, bias=False)


def test_a_pair_without_a_class_has_a_config_of_its_own(text, tmp_path):
    import transformers as tf

    config = {"model_type": "siglip_vision_model", **tiny_multimodal.PATCHES}
    folder = compose(text, tmp_path / "own", encoder=config, projector=Projector("linear", downsample=2))
    (sense,) = senses_of(hf_to_nemo.read_config(folder))
    assert sense.tokens == 1 and sense.projector == Projector("linear", 2)
    assert load_file(folder / "model.safetensors")["multi_modal_projector.linear_1.weight"].shape == (64, 4 * 32)
    with pytest.raises(ValueError, match="llm_builder_llava"):
        tf.AutoConfig.from_pretrained(folder)
    nemo = hf_to_nemo.convert(folder, tmp_path / "nemo")
    back = nemo_to_hf.export(nemo, tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_an_existing_token_is_taken(text, tmp_path):
    token = "!"
    folder = compose(text, tmp_path / "model", encoder="random:glyphs", token=token)
    config = hf_to_nemo.read_config(folder)
    assert config["text_config"]["vocab_size"] == 250
    assert config["image_token_index"] == json.loads((text / "tokenizer.json").read_text())["model"]["vocab"][token]


@pytest.mark.parametrize(
    "encoder, message",
    [
        ("random:vit", "vit is no known shape: siglip-so400m-14-384"),
        ("hf:/nowhere", "neither a folder nor a model"),
        ("eyes", "unknown: give hf:FOLDER"),
    ],
)
def test_unknown_towers(text, tmp_path, encoder, message):
    refused(text, tmp_path, message, encoder=encoder)


def test_another_model_is_no_tower(text, tmp_path):
    refused(text, tmp_path, "model_type='llama', no encoder that is known; known: siglip, clip", encoder=f"hf:{text}")


def test_a_model_that_sees_already(composed, clip, tmp_path):
    refused(composed, tmp_path, "sees or hears already", encoder=f"hf:{clip}")


def test_a_family_that_does_not_convert(text, clip, tmp_path):
    copy = tmp_path / "falcon"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps({"model_type": "falcon"}))
    refused(copy, tmp_path, "model_type='falcon', which does not convert", encoder=f"hf:{clip}")


def test_a_tokenizer_without_room(text, clip, tmp_path):
    copy = tmp_path / "copy"
    tiny_models.save("llama_tied_scaled", copy)
    tiny_multimodal.save_tokenizer(copy, 260, CHATML)
    refused(copy, tmp_path, "tokenizer has 260 tokens, the model embeds 250: no room for <image>", encoder=f"hf:{clip}")


def test_downsampling_that_does_not_divide(text, tmp_path):
    refused(text, tmp_path, "downsample=3 does not divide", encoder="random:glyphs", projector=Projector(downsample=3))


def refused(text: Path, tmp_path: Path, message: str, **options) -> None:
    with pytest.raises(UserError, match=message) as error:
        compose(text, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
