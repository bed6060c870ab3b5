"""From an encoder's features to embeddings of the decoder's width."""

from __future__ import annotations

from torch import Tensor, nn

from nemo_ext.multimodal.description import Projector


class ProjectorModule(nn.Module):
    """`linear_1`, and for mlp2x_gelu a GELU and `linear_2`: LLaVA's names in Hugging Face's form. `[n, positions, in]` to
    `[n, fewer positions, out]`, with `grid` the positions' rows and columns, or (frames,)."""

    def __init__(self, projector: Projector, grid: tuple[int, ...], in_features: int, out_features: int):
        super().__init__()
        self.downsample, self.grid = projector.downsample, grid
        self.linear_1 = nn.Linear(in_features * projector.downsample ** len(grid), out_features, bias=projector.bias)
        if projector.kind == "mlp2x_gelu":
            self.act = nn.GELU()
            self.linear_2 = nn.Linear(out_features, out_features, bias=projector.bias)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.linear_1(join(features, self.grid, self.downsample) if self.downsample > 1 else features)
        return self.linear_2(self.act(hidden)) if hasattr(self, "linear_2") else hidden


def join(features: Tensor, grid: tuple[int, ...], downsample: int) -> Tensor:
    """Blocks of neighbours as one feature: `[n, rows columns, h]` to `[n, rows columns / d^2, d^2 h]`, in a block row by row
    (pixel shuffle), and `[n, frames, h]` to `[n, frames / d, d h]`. Blocks stay in their order."""
    n, _, h = features.shape
    if len(grid) == 1:
        return features.reshape(n, grid[0] // downsample, downsample * h)
    rows, columns = (side // downsample for side in grid)
    blocks = features.reshape(n, rows, downsample, columns, downsample, h).transpose(2, 3)
    return blocks.reshape(n, rows * columns, downsample * downsample * h)
