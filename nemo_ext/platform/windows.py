"""Attention windows beside a mask, which Megatron's unfused softmax applies one instead of the other."""

from __future__ import annotations

from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.utils import get_sliding_window_causal_mask
from torch import Tensor


class WindowedSoftmax(FusedScaleMaskSoftmax):
    """Softmax of scores `[b, heads, s, s]` under the given mask (True: not seen) and the layer's window, both."""

    @classmethod
    def adopt(cls, softmax: FusedScaleMaskSoftmax) -> None:
        """Make an attention layer's softmax one of these, in place."""
        softmax.__class__ = cls

    def forward_torch_softmax(self, scores: Tensor, mask: Tensor | None, softmax_offset: Tensor | None = None) -> Tensor:
        window = self.window_size
        if window is None or mask is None:
            return super().forward_torch_softmax(scores, mask, softmax_offset)
        self.window_size = None  # else the mask is thrown away
        try:
            mask = mask | get_sliding_window_causal_mask(scores.size(2), scores.size(3), window)
            return super().forward_torch_softmax(scores, mask, softmax_offset)
        finally:
            self.window_size = window
