"""Models that Hugging Face's local cache holds; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path


def find(name: str) -> Path | None:
    """The folder of the cached model `name`, such as "meta-llama/Llama-3.2-1B"; None if it is not there or no name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
