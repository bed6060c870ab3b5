"""Models with senses between Hugging Face and NeMo: byte for byte there and back, in every spelling, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_multimodal
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversion import dist_checkpoint, families, hf_to_nemo, nemo_folder, nemo_to_hf
from conversion.checkpoint import Checkpoint
from conversion.compare import tensors
from conversion.multimodal import senses_of
from conversion.multimodal.rows import encoder_shapes
from nemo_ext.errors import UserError
from nemo_ext.multimodal import towers
from nemo_ext.multimodal.description import Encoder, Projector, Tiling
from nemo_ext.multimodal.encoder import build

SPELLINGS = {
    "transformers 4, in memory": {
        "language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "transformers 5": {"vision_tower.vision_model.": "vision_tower."},
}  # fmt: skip


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return tiny_multimodal.save("llava_clip", tmp_path_factory.mktemp("llava") / "hf")


@pytest.fixture
def broken(hf, tmp_path):
    """A copy of the model to break, and a check that conversion says so and leaves nothing."""
    copy = Path(shutil.copytree(hf, tmp_path / "hf"))

    def refused(message: str, **configuration) -> None:
        config = json.loads((copy / "config.json").read_text()) | configuration
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message) as error:
            hf_to_nemo.convert(copy, tmp_path / "nemo")
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    def change(edit) -> None:
        weights = load_file(copy / "model.safetensors")
        edit(weights)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    refused.folder, refused.change = copy, change
    return refused


def same_files(a: Path, b: Path) -> None:
    names = {path.name for path in a.iterdir()}
    assert {path.name for path in b.iterdir()} - {nemo_folder.RECORD} == names
    for name in names - {"config.json"}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert json.loads((a / "config.json").read_text()) == json.loads((b / "config.json").read_text())


@pytest.mark.parametrize("name", tiny_multimodal.NAMES)
def test_a_round_trip_gives_the_same_files(tmp_path, name):
    folder = tiny_multimodal.save(name, tmp_path / "hf", max_shard_size="60KB")
    nemo = hf_to_nemo.convert(folder, tmp_path / "nemo")
    same_files(folder, nemo_to_hf.export(nemo, tmp_path / "back", workers=3))
    assert nemo_folder.find(nemo).senses == senses_of(hf_to_nemo.read_config(folder))
    assert tensors.compare(*(tensors.hf_tensors(Checkpoint.parse(path)) for path in (folder, nemo))).passed


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_names(hf, tmp_path, spelling):
    """They convert to the same checkpoint, and come back as they were spelled."""
    other = Path(shutil.copytree(hf, tmp_path / "hf"))
    renamed = {}
    for name, tensor in load_file(hf / "model.safetensors").items():
        old, new = next(((o, n) for o, n in SPELLINGS[spelling].items() if name.startswith(o)), ("", ""))
        renamed[new + name.removeprefix(old)] = tensor
    save_file(renamed, other / "model.safetensors", metadata={"format": "pt"})
    nemo = hf_to_nemo.convert(other, tmp_path / "nemo")
    same_files(other, nemo_to_hf.export(nemo, tmp_path / "back"))
    assert tensors.compare(*(tensors.hf_tensors(Checkpoint.parse(path)) for path in (hf, nemo))).passed


def test_what_the_folder_holds(hf, tmp_path):
    """Every tensor of the senses whole under Hugging Face's name, and the description that the model is built from."""
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    weights, saved = load_file(hf / "model.safetensors"), dist_checkpoint.read(nemo / "weights")
    for name, tensor in weights.items():
        if name.startswith("vision_tower."):
            assert torch.equal(saved[f"module.senses.vision.encoder.{name.removeprefix('vision_tower.')}"].read(), tensor)
        if name.startswith("multi_modal_projector."):
            assert torch.equal(saved[f"module.senses.vision.projector.{name.split('.', 1)[1]}"].read(), tensor)
    (sense,) = json.loads((nemo / nemo_folder.SENSES).read_text())
    assert sense["token_id"] == tiny_multimodal.IMAGE and sense["encoder"]["feature_layer"] == -2
    assert families.architecture(hf_to_nemo.read_config(hf)) == nemo_folder.find(nemo).architecture


def test_a_trained_model_without_its_record_comes_back_whole(hf, tmp_path):
    """What a run from random weights leaves: no original files and no config.json. transformers loads the export."""
    import transformers as tf

    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    (nemo / nemo_folder.RECORD).unlink()
    back = nemo_to_hf.export(nemo, tmp_path / "back")
    model, report = tf.LlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    original = tf.LlavaForConditionalGeneration.from_pretrained(hf)
    ids, pixels = torch.tensor([[5, *[tiny_multimodal.IMAGE] * 4, 7, 8]]), torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(model(ids, pixels).logits, original(ids, pixels).logits)


def test_dtype_holds_for_the_tower(hf, tmp_path):
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo", dtype="bfloat16")
    assert {tensor.dtype for tensor in dist_checkpoint.read(nemo / "weights").values()} == {torch.bfloat16}
    with safe_open(nemo_to_hf.export(nemo, tmp_path / "back") / "model.safetensors", "pt") as file:
        assert file.get_tensor("vision_tower.vision_model.post_layernorm.bias").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["siglip-base-16-224", "clip-vit-base-16", "glyphs", "whisper-tiny"])
def test_names_and_shapes_are_transformers(name):
    config = towers.shape(name)
    with torch.device("meta"):
        module = build(Encoder(config, None))
    assert encoder_shapes(config) == {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_published_llava_1_5_leaves_sizes_to_its_classes():
    """config.json of llava-hf/llava-1.5-7b-hf, as published."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
        "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
            "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064},
        "tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
    }  # fmt: skip
    a, (sense,) = families.architecture(config), senses_of(config)
    assert (a.num_layers, a.hidden_size, a.ffn_hidden_size, a.vocab_size) == (32, 4096, 11008, 32064)
    assert (sense.tokens, sense.token_id, sense.encoder.class_token) == (576, 32000, False)
    # https://huggingface.co/llava-hf/llava-1.5-7b-hf: 7.06 billion parameters
    total = a.num_parameters() + sense.encoder.num_parameters() + sense.projector_parameters(4096)
    assert round(total / 1e9, 2) == 7.06


def test_forms_of_a_sense_have_one_configuration():
    """Sense -> config.json -> Sense, in the class of transformers that computes it, else in our own."""
    from conversion import multimodal

    text = {"model_type": "llama", "hidden_size": 64, "vocab_size": 250}
    clip = {"model_type": "clip_vision_model", "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
            **tiny_multimodal.PATCHES}  # fmt: skip
    from nemo_ext.multimodal.description import Sense

    forms = {
        "llava": Sense(Encoder(clip), Projector(), 9),
        "llava_next": Sense(Encoder(clip, -1), Projector(bias=False), 9, Tiling(((28, 56),))),
        "voxtral": Sense(Encoder({"model_type": "whisper", "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2,
                                  "encoder_ffn_dim": 96, "num_mel_bins": 8, "max_source_positions": 16,
                                  "activation_function": "gelu"}, None), Projector(downsample=4, bias=False), 9),
        multimodal.OWN_TYPE: Sense(Encoder(clip), Projector(downsample=2), 9),
    }  # fmt: skip
    forms2 = [Sense(Encoder(clip), Projector("linear"), 9), Sense(Encoder(clip, None), Projector(), 9)]
    for kind, sense in [*forms.items(), *((multimodal.OWN_TYPE, sense) for sense in forms2)]:
        config = json.loads(json.dumps(multimodal.hf_config(text, (sense,), "float32")))
        assert config["model_type"] == kind
        assert senses_of(config) == (sense,)


def test_qwen2_vl_is_refused_with_the_reason(broken):
    broken(r"'qwen2_vl', which does not convert: its rotary positions have three axes \(M-RoPE\)", model_type="qwen2_vl")


def test_another_way_of_choosing_features(broken):
    broken("features of one layer only", vision_feature_layer=[-2, -1])


def test_another_activation(broken):
    broken("projector_hidden_act='relu'; only 'gelu' converts", projector_hidden_act="relu")


def test_siglip_has_no_class_token_to_leave_out(broken):
    vision = {"model_type": "siglip_vision_model", **tiny_multimodal.PATCHES}
    broken("would leave out the first patch", vision_config=vision)


def test_an_unknown_tower(broken):
    broken("model_type='pixtral' is not known; known: clip_vision_model", vision_config={"model_type": "pixtral"})


def test_a_projector_of_another_width(broken):
    name = "multi_modal_projector.linear_1.weight"
    broken.change(lambda weights: weights.update({name: torch.zeros(64, 48)}))
    broken(r"multi_modal_projector.linear_1.weight has shape \[64, 48\], config.json asks for \[64, 32\]")


def test_a_tower_without_a_tensor(broken):
    broken.change(lambda weights: weights.pop("vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"))
    broken("lacks 1 of its 98 tensors, first vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias")


def test_a_description_that_cannot_be_read(hf, tmp_path):
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    (nemo / nemo_folder.SENSES).write_text('[{"encoder": {}}]')
    with pytest.raises(UserError, match="senses.json cannot be read"):
        nemo_folder.find(nemo)


def test_gguf_holds_text_models_alone(hf, tmp_path):
    from conversion.gguf import writer

    with pytest.raises(UserError, match="sees or hears: a GGUF file holds a text model alone"):
        writer.from_hf(hf, tmp_path / "model.gguf", "f16", None)


def test_only_text_models_are_quantized(hf, tmp_path):
    from conversion import quantize

    with pytest.raises(UserError, match="sees or hears: only text models are quantized"):
        quantize.command(quantize.Options(model=f"hf:{hf}", out=str(tmp_path / "out"), method="fp8"))
