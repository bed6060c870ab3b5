"""Models with senses compute in Megatron what transformers computes, images and sounds included; where they part is said."""

import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_multimodal
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_nemo, nemo_to_hf, verify
from conversion.multimodal.compose import compose
from nemo_ext.multimodal.description import Projector

CLOSE = 1e-5


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A folder with hf/ and nemo/."""
    folder = tmp_path_factory.mktemp("llava")
    hf_to_nemo.convert(tiny_multimodal.save("llava_clip", folder / "hf"), folder / "nemo")
    return folder


def of_media(report: verify.Report) -> float:
    """The largest difference of the prompt with media, which is the last."""
    assert report.passed, report.failure
    assert "random image" in report.prompts[-1].label or "random sound" in report.prompts[-1].label
    return report.prompts[-1].difference.max_abs


@pytest.mark.parametrize("name", [name for name in tiny_multimodal.NAMES if name != "llava_clip"])
def test_logits_equal_transformers(tmp_path, name):
    hf = tiny_multimodal.save(name, tmp_path / "hf")
    assert of_media(verify.check(hf, hf_to_nemo.convert(hf, tmp_path / "nemo"))) < CLOSE


@pytest.mark.parametrize("projector", [Projector("linear", 2), Projector(downsample=2, bias=False)], ids=["linear", "mlp"])
def test_a_pair_without_a_class_equals_its_assembled_parts(tmp_path, projector):
    text = tiny_multimodal.save_tokenizer(tiny_models.save("qwen2", tmp_path / "text"), 250)
    config = {"model_type": "siglip_vision_model", **tiny_multimodal.PATCHES, "image_size": 56}
    hf = compose(text, tmp_path / "hf", encoder=config, projector=projector)
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    assert of_media(verify.check(hf, nemo)) < CLOSE


@pytest.mark.parametrize(
    "tensor, point",
    [
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight", "encoder.layers.1"),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", "encoder.layers.0"),
        ("multi_modal_projector.linear_2.bias", "projector"),
    ],
)
def test_the_first_part_that_differs_is_named(llava, tmp_path, tensor, point):
    other = Path(shutil.copytree(llava / "hf", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights[tensor] = weights[tensor].flip(0) + 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    report = verify.check(other, llava / "nemo")
    assert not report.passed
    assert [prompt.passed for prompt in report.prompts] == [True, True, True, False]
    assert report.first_difference["point"] == point
    assert [each["name"] for each in report.first_difference["tensors"]] == [tensor]
    assert tensor in report.failure


def test_greedy_answers_after_an_export(llava, tmp_path):
    """Token for token, from the files that came back."""
    import transformers as tf

    back = nemo_to_hf.export(llava / "nemo", tmp_path / "back")
    answers = []
    for folder in (llava / "hf", back):
        model = tf.LlavaForConditionalGeneration.from_pretrained(folder).eval()
        torch.manual_seed(3)
        given = dict(input_ids=torch.tensor([[5, *[tiny_multimodal.IMAGE] * 4, 7]]), pixel_values=torch.randn(1, 3, 28, 28))
        answers.append(model.generate(**given, max_new_tokens=12, do_sample=False).tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("target", [r"model\.language_model\.layers\.\d+\.self_attn\.q_proj", "q_proj"], ids=["text", "both"])
def test_an_adapter_merges_into_the_model_with_its_tower(llava, tmp_path, target):
    """PEFT's LoRA of the language model, and of tower and language model, against PEFT's own answers to an image."""
    import peft
    import transformers as tf

    from conversion.lora import merge

    torch.manual_seed(5)
    base = tf.LlavaForConditionalGeneration.from_pretrained(llava / "hf")
    targets = target if "model" in target else [target]
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "lora")
    merged = merge.merge(llava / "hf", tmp_path / "lora", tmp_path / "merged")
    assert merged.tensors == (4 if "model" in target else 7) and merged.difference.max_abs < CLOSE < merged.effect.max_abs
    given = dict(input_ids=torch.tensor([[5, *[tiny_multimodal.IMAGE] * 4, 7]]), pixel_values=torch.randn(1, 3, 28, 28))
    result = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(result(**given).logits, adapted(**given).logits, atol=CLOSE)
