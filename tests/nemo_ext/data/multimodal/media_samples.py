"""Images, senses and a tokenizer for the tests of this room."""

import io
import json

import numpy as np
from PIL import Image

from nemo_ext.data.multimodal.image import ImageSettings
from nemo_ext.data.multimodal.inputs import ImageInput
from nemo_ext.multimodal.description import Encoder, Projector, Sense, Tiling


def write_tokenizer(folder):
    import chat_samples
    from transformers import AutoTokenizer

    chat_samples.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|sound|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def token_id(folder, token):
    values = json.loads((folder / "tokenizer.json").read_text())
    return next(each["id"] for each in values["added_tokens"] if each["content"] == token)


def vision(folder, side=28, patch=14, downsample=1, grids=None):
    """A SigLIP sense: (side / patch / downsample)^2 embeddings an image."""
    config = {"model_type": "siglip_vision_model", "hidden_size": 8, "image_size": side, "patch_size": patch,
              "num_hidden_layers": 2}  # fmt: skip
    tiling = Tiling(grids) if grids else None
    sense = Sense(Encoder(config), Projector(downsample=downsample), token_id(folder, "<image>"), tiling)
    return ImageInput(sense, ImageSettings.of_encoder(config))


def picture(seed=0, width=40, height=30, mode="RGB"):
    """A smooth random picture."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, channels), np.uint8)
    image = Image.fromarray(noise[..., 0] if channels == 1 else noise, mode)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()
