"""Checkpoints that NeMo 2's own recipes and importers wrote: which model their `context/` describes.

`context/model.yaml` is the model as NeMo's serialisation writes it (`_target_` is a class, the rest its arguments), read here as
plain data; `context/nemo_tokenizer/` is the tokenizer. NeMo does not record what length a model was made for: its `seq_length` is
taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemo_ext.architecture import Architecture, RopeScaling
from nemo_ext.errors import UserError

MODEL = "context/model.yaml"
TOKENIZER = "context/nemo_tokenizer"
# Families whose models NeMo computes as Hugging Face does; what is wrong in others is in docs/architecture.md
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "mistral": "mistral"}
SAME_NAMES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads layernorm_epsilon share_embeddings_and_output_weights "
    "add_qkv_bias qk_layernorm init_method_std softmax_scale rotary_percent"
).split()
# What an Architecture takes for granted of these families: anything else is another model
GRANTED = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False,
           "layernorm_zero_centered_gamma": False, "position_embedding_type": "rope", "rotary_interleaved": False,
           "num_moe_experts": None, "window_size": None, "seq_len_interpolation_factor": None,
           "multi_latent_attention": False}  # fmt: skip


def read_architecture(folder: Path) -> Architecture:
    """The architecture of the NeMo 2 checkpoint in `folder`, which has a `context/`.

    Raises UserError for a family that is not among `FAMILIES`, for options that they do not have, and for an unreadable file.
    """
    file = Path(folder) / MODEL
    try:
        model = yaml.safe_load(file.read_text())
        target, config = model["_target_"], model["config"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    module = target.removeprefix("nemo.collections.llm.gpt.model.").split(".")[0]
    if module not in FAMILIES:
        raise UserError(f"{file} is a {target}, which does not convert; known: {', '.join(FAMILIES)}")
    for name, value in GRANTED.items():
        if config.get(name, value) != value:
            raise UserError(f"{file} has {name}={config[name]}: a {module} model here has {value}")
    try:
        heads = config["num_attention_heads"]
        return Architecture(
            family=FAMILIES[module],
            num_query_groups=config.get("num_query_groups") or heads,
            kv_channels=config.get("kv_channels") or 0,
            vocab_size=config.get("vocab_size") or _tokenizer_size(folder),
            max_position_embeddings=config["seq_length"],
            rotary_base=float(config["rotary_base"]),
            rope_scaling=_scaling(config),
            **{name: config[name] for name in SAME_NAMES},
        )
    except KeyError as error:
        raise UserError(f"{file} lacks {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} does not describe a {module} model: {error}") from None


def _scaling(config: dict[str, Any]) -> RopeScaling | None:
    """Llama 3.1's RoPE, which NeMo has as a subclass of Llama's configuration."""
    if "scale_factor" not in config or config["scale_factor"] is None:
        return None
    return RopeScaling(
        factor=float(config["scale_factor"]),
        low_freq_factor=float(config["low_freq_factor"]),
        high_freq_factor=float(config["high_freq_factor"]),
        original_max_position_embeddings=config["old_context_len"],
    )


def _tokenizer_size(folder: Path) -> int:
    """What NeMo makes the vocabulary where the configuration leaves it to the tokenizer: all tokens, added ones included."""
    from tokenizers import Tokenizer

    file = Path(folder) / TOKENIZER / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder / MODEL} leaves the vocabulary to the tokenizer, and {file} is missing")
    return Tokenizer.from_file(str(file)).get_vocab_size()
