"""One table per model family, for both directions between Hugging Face and Megatron: a `Family` and a test add one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from conversion.families.gemma import GEMMA2, GEMMA3
from conversion.families.llama import LLAMA
from conversion.families.mistral import MISTRAL
from conversion.families.mixtral import MIXTRAL
from conversion.families.phi import PHI, PHI3
from conversion.families.qwen import QWEN2, QWEN3
from conversion.families.stablelm import STABLELM
from conversion.families.table import WRAPPED, Config, Family, Row, shape
from conversion.multimodal import language_model, refusal
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

__all__ = ["FAMILIES", "Family", "Row", "architecture", "base_prefix", "family_of", "hf_config", "hf_name", "shape"]

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI, PHI3, GEMMA2, GEMMA3, STABLELM, MIXTRAL)}

# transformers' common defaults; sizes of a model are never guessed
_DEFAULTS = {"tie_word_embeddings": False, "initializer_range": 0.02, "rms_norm_eps": 1e-6}


def family_of(hf_config: Config) -> Family:
    """The family of a Hugging Face configuration, its language model's where it has senses; UserError listing the known ones."""
    if reason := refusal(hf_config):
        raise UserError(reason)
    model_type = language_model(hf_config).get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES.values() for kind in family.model_types)
    raise UserError(f"config.json has model_type={model_type!r}, which does not convert; known: {known}")


def architecture(hf_config: Config) -> Architecture:
    """What a Hugging Face configuration describes; of a model with senses the language model.

    Raises UserError for an unknown architecture, a quantized checkpoint, or an option that NeMo's model does not have.
    """
    family = family_of(hf_config)
    if quantization := hf_config.get("quantization_config"):
        raise UserError(
            f"the checkpoint is quantized ({quantization.get('quant_method', 'unknown method')}): convert the original"
        )
    config = _text_part(family, language_model(hf_config))
    try:
        heads = config["num_attention_heads"]
        return Architecture(
            family=family.name,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            vocab_size=config["vocab_size"],
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config["max_position_embeddings"],
            layernorm_epsilon=config[family.epsilon],
            share_embeddings_and_output_weights=config["tie_word_embeddings"],
            init_method_std=config["initializer_range"],
            **family.read(config),
        )
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json does not describe a {family.name} model: {error}") from error


def _text_part(family: Family, hf_config: Config) -> dict[str, Any]:
    """The language model's configuration, with the family's defaults for what it leaves out."""
    config = dict(hf_config)
    if family.text_config and "text_config" in config:
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        config = tied | dict(config["text_config"])
    return {**_DEFAULTS, **family.defaults, **config}


def hf_config(
    architecture: Architecture, torch_dtype: str = "bfloat16", special_ids: Mapping[str, int | list[int] | None] | None = None
) -> dict[str, Any]:
    """A config.json for this architecture, for a model that was not imported from one.

    `special_ids` gives "bos", "eos" and "pad" of the tokenizer; one left out is written as null, so that transformers does
    not put in the id of the family's published model.
    """
    family = FAMILIES[architecture.family]
    a = architecture
    return {
        "architectures": [family.causal_lm],
        "model_type": family.model_types[0],
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.kv_channels,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        family.epsilon: a.layernorm_epsilon,
        "tie_word_embeddings": a.share_embeddings_and_output_weights,
        "initializer_range": a.init_method_std,
        "torch_dtype": torch_dtype,
        **{f"{name}_token_id": (special_ids or {}).get(name) for name in ("bos", "eos", "pad")},
        **family.write(a),
    }


def base_prefix(family: Family, names: Iterable[str]) -> str:
    """What stands for "model." in a checkpoint with these tensor names."""
    present = set(names)
    prefixes = (*family.prefixes, *WRAPPED)
    return next((p for p in prefixes if f"{p}embed_tokens.weight" in present), family.prefixes[0])


def hf_name(canonical: str, prefix: str) -> str:
    """The checkpoint's own name of a row's tensor: "model.x" -> prefix + "x", and lm_head and senses beside the wrapped model."""
    if canonical.startswith("model."):
        return prefix + canonical.removeprefix("model.")
    if canonical.startswith("lm_head."):
        return prefix.removesuffix("model.") + canonical if prefix == "language_model.model." else canonical
    return f"model.{canonical}" if prefix == "model.language_model." else canonical  # a sense's
