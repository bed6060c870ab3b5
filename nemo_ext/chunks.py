"""How many tokens' logits exist at once where they need not all be kept. Pure arithmetic, for the planner too."""

from __future__ import annotations

LOGITS = 2**28  # 512 MiB in bf16


def chunk_tokens(vocabulary: int) -> int:
    """A multiple of 128, of so many tokens the kernels' tiles are."""
    return max(1, LOGITS // vocabulary // 128) * 128
