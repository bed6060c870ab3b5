"""What a sense looks like: an encoder, a projector, and the placeholder token whose embeddings they make, as plain data.

The shape follows LLaVA (Liu et al. 2023, arXiv:2304.08485; 1.5: arXiv:2310.03744), which NeVA is NVIDIA's name for. Nothing here
imports torch, NeMo or transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ext.errors import UserError

VISION, AUDIO = "vision", "audio"
MODALITIES = {"siglip_vision_model": VISION, "clip_vision_model": VISION, "whisper": AUDIO}  # of each kind of encoder
PROJECTORS = ("linear", "mlp2x_gelu")
TOWER_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # of an encoder's layer: what an adapter adapts


@dataclass(frozen=True)
class Encoder:
    """An encoder of Hugging Face's.

    `config` is its own config.json, whose `model_type` is a key of MODALITIES. `feature_layer` is the entry of `hidden_states`
    (0: the embeddings, -1: the last layer's output) that the projector sees; None takes the encoder's last hidden state after its
    final norm. `class_token` keeps CLIP's first position among the features.
    """

    config: Mapping[str, Any]
    feature_layer: int | None = -2
    class_token: bool = False

    def __post_init__(self) -> None:
        if self.config.get("model_type") not in MODALITIES:
            known = ", ".join(MODALITIES)
            raise UserError(f"an encoder of model_type={self.config.get('model_type')!r} is not known; known: {known}")
        if self.class_token and not self.has_class_token:
            raise UserError(f"class_token=true: a {self.config['model_type']} has none")
        if self.feature_layer is not None and not -self.num_layers - 1 <= self.feature_layer <= self.num_layers:
            raise UserError(f"feature_layer={self.feature_layer}, but the encoder has {self.num_layers} layers")

    @property
    def modality(self) -> str:
        return MODALITIES[self.config["model_type"]]

    @property
    def hidden_size(self) -> int:
        return self.config["d_model" if self.modality == AUDIO else "hidden_size"]

    @property
    def has_class_token(self) -> bool:
        """Whether its first position is no patch."""
        return self.config["model_type"] == "clip_vision_model"

    @property
    def num_layers(self) -> int:
        return self.config["encoder_layers" if self.modality == AUDIO else "num_hidden_layers"]

    @property
    def num_computed_layers(self) -> int:
        """Layers below and including the one whose output the projector sees."""
        if self.feature_layer is None:
            return self.num_layers
        return self.feature_layer % (self.num_layers + 1)

    def num_parameters(self) -> int:
        """All parameters of Hugging Face's module, those that features do not need included."""
        c, h = self.config, self.hidden_size
        if self.modality == AUDIO:
            ffn, mel = c["encoder_ffn_dim"], c["num_mel_bins"]
            layer = 4 * h * h + 3 * h + 2 * h * ffn + ffn + h + 4 * h  # keys have no bias
            return 3 * mel * h + h + 3 * h * h + h + c["max_source_positions"] * h + self.num_layers * layer + 2 * h
        ffn, patch = c["intermediate_size"], c.get("num_channels", 3) * c["patch_size"] ** 2
        positions = self.grid[0] * self.grid[1]
        attention, mlp = 4 * h * h + 4 * h, 2 * h * ffn + ffn + h
        layers = self.num_layers * (attention + mlp + 4 * h)
        if self.has_class_token:  # and a position of its own; norms before and after the layers
            return patch * h + h + (positions + 1) * h + layers + 4 * h
        head = h + attention + 2 * h + mlp if c.get("vision_use_head", True) else 0  # pools what no feature is
        return patch * h + h + positions * h + layers + 2 * h + head

    def adapter_parameters(self, rank: int) -> int:
        """Of a LoRA of every linear in the layers that are computed."""
        h, ffn = self.hidden_size, self.config["encoder_ffn_dim" if self.modality == AUDIO else "intermediate_size"]
        return self.num_computed_layers * rank * (4 * 2 * h + 2 * (h + ffn))

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions of one input: (rows, columns) of patches, or (frames,)."""
        if self.modality == AUDIO:
            return (self.config["max_source_positions"],)
        side = self.config["image_size"] // self.config["patch_size"]
        return (side, side)


@dataclass(frozen=True)
class Projector:
    """From an encoder's features to embeddings.

    `kind`: "linear", or "mlp2x_gelu", two linears of the decoder's width with a GELU between them. `downsample` joins that many
    neighbours along every dimension of the grid into one feature before: pixel shuffle for images, stacked frames for sounds.
    """

    kind: str = "mlp2x_gelu"
    downsample: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        if self.kind not in PROJECTORS:
            raise UserError(f"projector={self.kind} is unknown: {', '.join(PROJECTORS)}")
        if self.downsample < 1:
            raise UserError(f"downsample={self.downsample} must be 1 or more")


@dataclass(frozen=True)
class Tiling:
    """Images at their own aspect (AnyRes of LLaVA-NeXT): the whole image resized, then tiles of the best fitting grid.

    `grids` are (height, width) in pixels, multiples of the encoder's image size. Rows of the tiles' features each end with one
    learnt embedding, and the padding's features are left out, as LLaVA-NeXT's `spatial_unpad` does.
    """

    grids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", tuple(tuple(grid) for grid in self.grids))


@dataclass(frozen=True)
class Sense:
    """One modality of a model. `token_id` is the placeholder that stands, repeated, for an input's embeddings."""

    encoder: Encoder
    projector: Projector
    token_id: int
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        if any(side % self.projector.downsample for side in self.encoder.grid):
            grid = "x".join(map(str, self.encoder.grid))
            raise UserError(f"downsample={self.projector.downsample} does not divide the encoder's grid of {grid}")
        if self.encoder.class_token and self.projector.downsample > 1:
            raise UserError(f"class_token=true: downsample={self.projector.downsample} joins patches, and a class token is none")

    @property
    def modality(self) -> str:
        return self.encoder.modality

    @property
    def tokens(self) -> int:
        """Embeddings that one input of the encoder (an image, a tile, a window) gives."""
        positions = 1
        for side in self.encoder.grid:
            positions *= side // self.projector.downsample
        return positions + self.encoder.class_token

    def projector_parameters(self, hidden_size: int) -> int:
        """Parameters of the projector to a decoder of this width, and of the newline's embedding."""
        projector = self.projector
        inputs = self.encoder.hidden_size * projector.downsample ** len(self.encoder.grid)
        count = inputs * hidden_size + projector.bias * hidden_size
        if projector.kind == "mlp2x_gelu":
            count += hidden_size * hidden_size + projector.bias * hidden_size
        return count + (hidden_size if self.tiling is not None else 0)

    def num_parameters(self, hidden_size: int) -> int:
        """All of them, with a decoder of this width."""
        return self.encoder.num_parameters() + self.projector_parameters(hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `Sense.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sense:
        """From `to_dict`'s form. Raises UserError for what does not fit together."""
        tiling = data.get("tiling")
        return cls(
            Encoder(**data["encoder"]), Projector(**data["projector"]), data["token_id"], Tiling(**tiling) if tiling else None
        )
