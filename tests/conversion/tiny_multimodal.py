"""Small random models with senses, as transformers writes them: LLaVA with CLIP or SigLIP, LLaVA-NeXT, Voxtral."""

from __future__ import annotations

from pathlib import Path

from tiny_models import SIZES

IMAGE = 249  # the placeholder, the last id
PATCHES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)
NAMES = ["llava_clip", "llava_clip_full", "llava_siglip_qwen2", "llava_siglip_headless", "llava_next", "voxtral"]


def configs() -> dict:
    """{name: transformers configuration}."""
    import transformers as tf

    text = tf.LlamaConfig(**SIZES)
    clip, siglip = tf.CLIPVisionConfig(**PATCHES), tf.SiglipVisionConfig(**PATCHES)
    tied = tf.Qwen2Config(**SIZES, tie_word_embeddings=True)
    headless = tf.SiglipVisionConfig(**PATCHES, vision_use_head=False)
    token, full = dict(image_token_index=IMAGE), dict(vision_feature_select_strategy="full")
    whisper = dict(hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_mel_bins=8)
    return {
        "llava_clip": tf.LlavaConfig(clip, text, **token, image_seq_length=4),
        "llava_clip_full": tf.LlavaConfig(clip, text, **token, **full, image_seq_length=5, vision_feature_layer=-1),
        "llava_siglip_qwen2": tf.LlavaConfig(siglip, tied, **token, **full, image_seq_length=4, multimodal_projector_bias=False),
        "llava_siglip_headless": tf.LlavaConfig(headless, text, **token, **full, image_seq_length=4),
        "llava_next": tf.LlavaNextConfig(clip, text, **token, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]),
        "voxtral": tf.VoxtralConfig(
            tf.VoxtralEncoderConfig(**whisper, max_source_positions=16), text, audio_token_id=IMAGE
        ),
    }  # fmt: skip


def model(name: str):
    """The model `name` of `configs` with random weights that make mistakes visible, fp32."""
    import torch
    import transformers as tf

    config = configs()[name]
    torch.manual_seed(0)
    built = getattr(tf, type(config).__name__.replace("Config", "ForConditionalGeneration"))(config)
    with torch.no_grad():
        for tensor_name, parameter in built.named_parameters():
            if "norm" in tensor_name and "layrnorm" not in tensor_name or parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "vision" not in tensor_name and "audio" not in tensor_name:
                parameter.mul_(3.0)
    return built.float().eval()


def save(name: str, folder: Path, **options) -> Path:
    """Write the model; `options` go to save_pretrained."""
    model(name).save_pretrained(folder, **options)
    return folder


def save_tokenizer(folder: Path, size: int, template: str | None = None) -> Path:
    """Put a tokenizer of so many tokens into `folder`: single bytes, and words that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - len(special)]
    words = [f"word{i}" for i in range(size - len(special) - len(letters))]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder
