"""Models that see or hear: Hugging Face's LLaVA, LLaVA-NeXT and Voxtral, as a language model and its senses, and back."""

from conversion.multimodal.configuration import OWN_TYPE, hf_config, language_model, refusal, senses_of

__all__ = ["OWN_TYPE", "hf_config", "language_model", "refusal", "senses_of"]
