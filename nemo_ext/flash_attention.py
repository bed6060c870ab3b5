"""What FlashAttention-4 needs, said without importing it, Megatron or, on a machine without a GPU, torch."""

from __future__ import annotations

import importlib.metadata

from nemo_ext.platform import hardware

PACKAGE, VERSION = "flash-attn-4", "4.0.0b36"  # its functions that are called are not public; requirements/flash_attention.txt
HEADS = (64, 128)  # sizes that were measured
HOPPER = 9  # major CUDA compute capability


def missing() -> str | None:
    """What this machine lacks, in words that follow "this machine"; None where nothing."""
    if not hardware.has_cuda():
        return "has no GPU"
    import torch

    major, minor = torch.cuda.get_device_capability()
    if major != HOPPER:
        return f"has a GPU of compute capability {major}.{minor}, not {HOPPER}.0"
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != VERSION:
        has = f"{PACKAGE} {found}" if found else f"no {PACKAGE}"
        return f"has {has}, and needs {VERSION}: pip install --no-deps -r requirements/flash_attention.txt"
    return None
