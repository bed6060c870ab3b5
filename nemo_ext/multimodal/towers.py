"""Published shapes of encoders, as their Hugging Face config.json has them, and a small one for images of single characters.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

from typing import Any

from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import AUDIO, MODALITIES, VISION, Encoder, Projector, Sense


def _vision(kind: str, hidden: int, ffn: int, layers: int, heads: int, image: int, patch: int, **more: Any) -> dict[str, Any]:
    return dict(model_type=kind, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                image_size=image, patch_size=patch, num_channels=3, **more)  # fmt: skip


def _siglip(*sizes: int, **more: Any) -> dict[str, Any]:
    return _vision("siglip_vision_model", *sizes, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, **more)


def _clip(*sizes: int) -> dict[str, Any]:
    return _vision("clip_vision_model", *sizes, hidden_act="quick_gelu", layer_norm_eps=1e-5)


def _whisper(width: int, layers: int, heads: int, mel: int = 80) -> dict[str, Any]:
    return dict(model_type="whisper", d_model=width, encoder_layers=layers, encoder_attention_heads=heads,
                encoder_ffn_dim=4 * width, num_mel_bins=mel, max_source_positions=1500, activation_function="gelu",
                scale_embedding=False)  # fmt: skip


SHAPES = {
    "siglip-so400m-14-384": _siglip(1152, 4304, 27, 16, 384, 14),
    "siglip-base-16-224": _siglip(768, 3072, 12, 12, 224, 16),
    "siglip-base-16-384": _siglip(768, 3072, 12, 12, 384, 16),
    "clip-vit-large-14-336": _clip(1024, 4096, 24, 16, 336, 14),
    "clip-vit-large-14": _clip(1024, 4096, 24, 16, 224, 14),
    "clip-vit-base-16": _clip(768, 3072, 12, 12, 224, 16),
    "glyphs": _siglip(192, 768, 2, 6, 32, 16, vision_use_head=False),
    "whisper-large-v3": _whisper(1280, 32, 20, 128),
    "whisper-medium": _whisper(1024, 24, 16),
    "whisper-small": _whisper(768, 12, 12),
    "whisper-base": _whisper(512, 6, 8),
    "whisper-tiny": _whisper(384, 4, 6),
}
DEFAULT = {VISION: "siglip-so400m-14-384", AUDIO: "whisper-large-v3"}


def shape(name: str) -> dict[str, Any]:
    """The configuration of a published shape. Raises UserError that lists them."""
    if name not in SHAPES:
        raise UserError(f"tower=random:{name} is no known shape: {', '.join(SHAPES)}")
    return dict(SHAPES[name])


def sense(config: dict[str, Any], *, feature_layer: int | None = None, class_token: bool = False, projector: str = "mlp2x_gelu",
          downsample: int = 1, token_id: int = 0) -> Sense:  # fmt: skip
    """The sense of an encoder of this configuration, with Voxtral's form for sounds. `feature_layer` None: LLaVA's -2, and a
    Whisper encoder's normed last. Raises UserError where the parts do not fit."""
    heard = MODALITIES.get(config.get("model_type")) == AUDIO
    layer = feature_layer if feature_layer is not None or heard else -2
    return Sense(Encoder(config, layer, class_token), Projector(projector, downsample, bias=not heard), token_id)
