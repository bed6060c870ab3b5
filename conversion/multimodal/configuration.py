"""Configurations of models with senses: Hugging Face's config.json <-> the language model's part and `Sense`s.

transformers writes of a nested configuration only what differs from its class, so that published files leave sizes out: the
classes' values stand in here. A pair of encoder and projector that no class of transformers computes has a config.json of our
own, with `model_type` `OWN_TYPE`, which transformers refuses instead of loading half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import AUDIO, VISION, Encoder, Projector, Sense, Tiling

Config = Mapping[str, Any]
LLAVA, LLAVA_NEXT, VOXTRAL, OWN_TYPE = "llava", "llava_next", "voxtral", "llm_builder_llava"
CLASSES = {
    LLAVA: "LlavaForConditionalGeneration",
    LLAVA_NEXT: "LlavaNextForConditionalGeneration",
    VOXTRAL: "VoxtralForConditionalGeneration",
}
WRAPPERS = (*CLASSES, OWN_TYPE)
_OTHER_ROPE = "its rotary positions have three axes (M-RoPE) and its tower takes any number of patches: our models have neither"
_SEVERAL = "its projector or its tower is another than LLaVA's"
REFUSED = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _OTHER_ROPE)
REFUSED |= dict.fromkeys(("llava_onevision", "llava_next_video", "vipllava", "paligemma", "idefics3", "mllama"), _SEVERAL)

# What transformers' classes have where a nested configuration leaves it out
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "max_position_embeddings": 2048},
    "mistral": {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32_768},
}  # fmt: skip
_VOXTRAL_TEXT = {"vocab_size": 131_072, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 30,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
                 "rope_theta": 1e8, "head_dim": 128}  # fmt: skip
ENCODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                          "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
                          "layer_norm_eps": 1e-5},
    "siglip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                            "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
                            "layer_norm_eps": 1e-6, "vision_use_head": True},
    "whisper": {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536, "num_mel_bins": 80,
                "max_source_positions": 1500, "activation_function": "gelu"},
}  # fmt: skip
# Voxtral's names of what Whisper's configuration calls otherwise, and its values where they are left out
_VOXTRAL_ENCODER = {"d_model": ("hidden_size", 1280), "encoder_layers": ("num_hidden_layers", 32),
                    "encoder_attention_heads": ("num_attention_heads", 20), "encoder_ffn_dim": ("intermediate_size", 5120),
                    "num_mel_bins": ("num_mel_bins", 128), "max_source_positions": ("max_source_positions", 1500),
                    "activation_function": ("activation_function", "gelu")}  # fmt: skip


def language_model(config: Config) -> Config:
    """The language model's part of a config.json; another model's configuration as it is."""
    kind = config.get("model_type")
    if kind not in WRAPPERS:
        return config
    text = dict(_part(config, "text_config"))
    text.setdefault("model_type", "llama")
    defaults = _VOXTRAL_TEXT if kind == VOXTRAL else _TEXT_DEFAULTS.get(text["model_type"], {})
    return {**defaults, **text}


def refusal(config: Config) -> str | None:
    """Why a model that is known does not convert, in one line; None for all others."""
    reason = REFUSED.get(config.get("model_type"))
    return reason and f"config.json has model_type={config['model_type']!r}, which does not convert: {reason}"


def senses_of(config: Config) -> tuple[Sense, ...]:
    """The senses that a config.json describes, none for a text model.

    Raises UserError for an encoder that is not known and for options that the model here does not have.
    """
    kind = config.get("model_type")
    try:
        if kind == OWN_TYPE:
            return tuple(Sense.from_dict(entry) for entry in config["senses"])
        if kind in (LLAVA, LLAVA_NEXT):
            return (_eyes(config),)
        return (_ears(config),) if kind == VOXTRAL else ()
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json does not describe a {kind} model: {error}") from error


def hf_config(text: Config, senses: Sequence[Sense], torch_dtype: str) -> dict[str, Any]:
    """A config.json for a language model, described by its own config.json `text`, with these senses.

    It is LLaVA's, LLaVA-NeXT's or Voxtral's where that class computes the same, else one of our own.
    """
    text = {key: value for key, value in text.items() if key != "architectures"} | {"torch_dtype": torch_dtype}
    outside = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in text}
    tied = text.get("tie_word_embeddings", False)
    common = {"text_config": text, "tie_word_embeddings": tied, "torch_dtype": torch_dtype, **outside}
    kind, settings = OWN_TYPE, {"senses": [sense.to_dict() for sense in senses]}
    if len(senses) == 1:
        kind, settings = _published(senses[0], text) or (kind, settings)
    return {"architectures": [CLASSES[kind]] if kind in CLASSES else [], "model_type": kind, **settings, **common}


def _published(sense: Sense, text: Config) -> tuple[str, dict[str, Any]] | None:
    """model_type and settings of transformers' class for this sense; None where there is none."""
    encoder, projector = sense.encoder, sense.projector
    if projector.kind != "mlp2x_gelu":
        return None
    if sense.modality == AUDIO:
        config = encoder.config
        fits = (
            encoder.feature_layer is None
            and not projector.bias
            and projector.downsample * config["d_model"] == config["encoder_ffn_dim"]
            and text.get("model_type") == "llama"
        )
        audio = {theirs: config.get(ours, value) for ours, (theirs, value) in _VOXTRAL_ENCODER.items()}
        settings = {
            "audio_config": {"model_type": "voxtral_encoder", **audio},
            "audio_token_id": sense.token_id,
            "projector_hidden_act": "gelu",
        }
        return (VOXTRAL, settings) if fits else None
    if projector.downsample != 1 or encoder.feature_layer is None or (sense.tiling and encoder.class_token):
        return None
    settings = {
        "image_token_index": sense.token_id,
        "image_seq_length": sense.tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": projector.bias,
        "vision_feature_layer": encoder.feature_layer,
        "vision_feature_select_strategy": select_strategy(encoder),
        "vision_config": dict(encoder.config),
    }
    if sense.tiling is None:
        return LLAVA, settings
    return LLAVA_NEXT, settings | {"image_grid_pinpoints": [list(grid) for grid in sense.tiling.grids]}


def select_strategy(encoder: Encoder) -> str:
    """transformers' `vision_feature_select_strategy`: "default" leaves the first position, CLIP's class token, out."""
    return "default" if encoder.has_class_token and not encoder.class_token else "full"


def complete(config: Config) -> dict[str, Any]:
    """An encoder's configuration with what its class has for what it leaves out. Raises UserError for an unknown encoder."""
    kind = config.get("model_type")
    if kind not in ENCODER_DEFAULTS:
        raise UserError(f"an encoder of model_type={kind!r} is not known; known: {', '.join(ENCODER_DEFAULTS)}")
    return {**ENCODER_DEFAULTS[kind], **config}


def _eyes(config: Config) -> Sense:
    vision = dict(_part(config, "vision_config"))
    vision.setdefault("model_type", "clip_vision_model")
    vision = complete(vision)
    clip = vision["model_type"] == "clip_vision_model"  # its first position is the class token
    layer, strategy = config.get("vision_feature_layer", -2), config.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        raise UserError(f"config.json has vision_feature_layer={layer}: features of one layer only convert")
    _only(config, "projector_hidden_act", "gelu")
    if strategy == "default" and not clip:
        raise UserError(
            f"config.json has vision_feature_select_strategy='default', which would leave out the first patch: a "
            f"{vision['model_type']} has no class token ('full' keeps all)"
        )
    default_token = 32_000
    token = config.get("image_token_index", config.get("image_token_id", default_token))
    pinpoints = config["image_grid_pinpoints"] if config["model_type"] == LLAVA_NEXT else None
    return Sense(
        Encoder(vision, layer, class_token=clip and strategy == "full"),
        Projector(bias=config.get("multimodal_projector_bias", True)),
        token,
        Tiling(tuple(map(tuple, pinpoints))) if pinpoints else None,
    )


def _ears(config: Config) -> Sense:
    audio = _part(config, "audio_config")
    _only(config, "projector_hidden_act", "gelu")
    whisper = {ours: audio.get(theirs, value) for ours, (theirs, value) in _VOXTRAL_ENCODER.items()}
    if whisper["encoder_ffn_dim"] % whisper["d_model"]:
        raise UserError("config.json's audio_config has an intermediate_size that is no multiple of hidden_size")
    stack = whisper["encoder_ffn_dim"] // whisper["d_model"]  # Voxtral's projector takes frames of this width together
    projector = Projector(downsample=stack, bias=False)
    return Sense(Encoder({"model_type": "whisper", **whisper}, feature_layer=None), projector, config["audio_token_id"])


def _part(config: Config, name: str) -> Config:
    part = config.get(name)
    if not isinstance(part, Mapping):
        raise UserError(f"config.json lacks {name}")
    return part


def _only(config: Config, key: str, value: Any) -> None:
    if config.get(key, value) != value:
        raise UserError(f"config.json has {key}={config[key]!r}; only {value!r} converts to NeMo")


MODALITY_TOWERS = {VISION: "vision_tower", AUDIO: "audio_tower"}  # what transformers' classes call the encoder
