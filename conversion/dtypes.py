"""The dtypes that convert, and casts that do not lose a value's size silently."""

from __future__ import annotations

import torch

from nemo_ext.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parse(name: str | None) -> torch.dtype | None:
    """The dtype that an option names, None for None; UserError for another one."""
    if name is not None and name not in DTYPES:
        raise UserError(f"dtype={name} is not one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` as `dtype`. Raises UserError naming it where a finite value is too large for that."""
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and tensor.numel():
        largest = max(abs(bound.item()) for bound in tensor.aminmax())
        if torch.finfo(dtype).max < largest < float("inf") and converted.isinf().any():
            raise UserError(f"{name} has {largest:.4g}, more than {NAMES[dtype]} can hold: choose bfloat16 or float32")
    return converted
