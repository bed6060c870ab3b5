"""Answers about images in tiles, as the summary of a run has them, against transformers' own processor."""

from __future__ import annotations

import pytest

from nemo_ext import platform

platform.activate()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers as tf  # noqa: E402
from PIL import Image  # noqa: E402

from launchers import answers  # noqa: E402


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """A small LLaVA-NeXT with its processor and the tests' tokenizer."""
    out = tmp_path_factory.mktemp("next")
    words = tf.AutoTokenizer.from_pretrained(small.tokenizer)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    token = words.convert_tokens_to_ids("<image>")
    torch.manual_seed(1)
    vision = tf.CLIPVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28,
                                 patch_size=14)  # fmt: skip
    text = tf.LlamaConfig(vocab_size=576, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
    grids = [[28, 56], [56, 28], [56, 56]]
    config = tf.LlavaNextConfig(vision, text, image_token_index=token, image_grid_pinpoints=grids)
    tf.LlavaNextForConditionalGeneration(config).save_pretrained(out)
    tf.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grids
    ).save_pretrained(out)
    words.save_pretrained(out)
    return out


def test_answers_about_tiles_are_transformers(folder):
    from conversion.hf_to_nemo import read_config
    from conversion.multimodal import senses_of
    from nemo_ext.data.multimodal import inputs

    (sense,) = senses_of(read_config(folder))
    source = inputs.read(sense, folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = tf.LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    processor = tf.LlavaNextImageProcessor.from_pretrained(folder)
    asked, wanted = [], []
    for number, sizes in enumerate([((60, 30),), ((30, 60),), ((50, 50), (90, 30)), ()]):
        noise = np.random.default_rng(number)
        images = [Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
        shapes = [(image.height, image.width) for image in images]
        ids = tokenizer("What?")["input_ids"]
        for shape in shapes:
            ids = [sense.token_id] * len(source.gather(shape)) + ids
        asked.append(answers._Asked(ids, [source.of_image(image) for image in images], shapes, "", "a class of things", None, ""))
        more = processor(images, return_tensors="pt") if images else {}
        with torch.no_grad():
            given = model.generate(torch.tensor([ids]), **more, do_sample=False, max_new_tokens=16, pad_token_id=0)
        wanted.append(given[0, len(ids) :].tolist())
    found = answers._generate(folder, asked, "pixel_values", True, lambda done: None)
    words = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in wanted]
    assert all(theirs.startswith(ours) or ours.startswith(theirs) for ours, theirs in zip(found, words, strict=True))
    assert all(found) and len(set(found)) > 1
