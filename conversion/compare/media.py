"""Images and sounds for a comparison: random inputs of the encoder with their placeholders, for both models the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from conversion.compare.activations import first_output
from nemo_ext.multimodal.description import AUDIO, Sense

_ENCODER_LAYER = re.compile(
    r"(?:(?:model\.)?(?:vision|audio)_tower|tower|senses\.(?:vision|audio)\.encoder)\.(?:vision_model\.encoder\.)?layers\.(\d+)"
)
_PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector|senses\.(?:vision|audio)\.projector|projector")
FEW = 256  # placeholders of an input up to which a prompt has two of them


@dataclass(frozen=True)
class Media:
    """The encoder's `inputs` `[n, ...]` fp32, and for each placeholder of a prompt the row of the projected features, `gather`
    `[p]`; `size` (height, width) is that of the one image that tiles are of."""

    modality: str
    inputs: torch.Tensor
    gather: torch.Tensor
    size: tuple[int, int] | None = None

    def for_megatron(self, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """Keywords of our model."""
        return {
            f"{self.modality}_inputs": self.inputs.to(device, dtype),
            f"{self.modality}_gather": self.gather.to(device),
        }

    def for_huggingface(self, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """Keywords of transformers' model."""
        inputs = self.inputs.to(device, dtype)
        if self.modality == AUDIO:
            return {"input_features": inputs}
        if self.size is None:
            return {"pixel_values": inputs}
        return {"pixel_values": inputs[None], "image_sizes": torch.tensor([self.size], device=device)}


def sense_hooks(model: torch.nn.Module) -> list[tuple[str, str, torch.nn.Module, Callable]]:
    """Where the points of a trace are before the decoder: "encoder.layers.N", the outputs of the encoder's layers, and
    "projector". Found by names that ours and transformers' modules share."""
    hooks = []
    for name, module in model.named_modules():
        if layer := _ENCODER_LAYER.fullmatch(name):
            hooks.append((f"encoder.layers.{layer[1]}", name, module, first_output))
        elif _PROJECTOR.fullmatch(name):
            hooks.append(("projector", name, module, first_output))
    return sorted(hooks, key=lambda hook: hook[0] == "projector")  # last, wherever it is defined


def prompt(senses: Sequence[Sense], vocabulary: int, seed: int = 0) -> tuple[str, torch.Tensor, Media]:
    """Label, ids `[s]` and media of a prompt for the first sense: words, one or two inputs, words between and behind."""
    sense = senses[0]
    generator = torch.Generator().manual_seed(seed)
    what, size, count = ("sound" if sense.modality == AUDIO else "image"), None, 1
    if sense.tiling is not None:
        from nemo_ext.data.multimodal import tiling

        grids, (rows, _) = sense.tiling.grids, sense.encoder.grid
        side = sense.encoder.config["image_size"]
        size = (side + side // 3, 2 * side + 1)  # of no grid's aspect: there is padding to leave out
        gather = torch.from_numpy(tiling.gather(size, grids, side, rows // sense.projector.downsample))
        inputs = tiling.count(size, grids, side)
        places = [len(gather)]
    else:
        count = inputs = 2 if sense.tokens <= FEW else 1
        gather, places = torch.arange(count * sense.tokens), [sense.tokens] * count
    ids = _words(5, vocabulary, sense.token_id, generator)
    for place in places:
        ids += [sense.token_id] * place + _words(7, vocabulary, sense.token_id, generator)
    shape = _input_shape(sense)
    values = torch.randn((inputs, *shape), generator=generator)
    label = f"random ids, {count} random {what}{'s' if count > 1 else ''}, seed {seed}"
    return label, torch.tensor(ids), Media(sense.modality, values, gather, size)


def _input_shape(sense: Sense) -> tuple[int, ...]:
    config = sense.encoder.config
    if sense.modality == AUDIO:
        return config["num_mel_bins"], 2 * config["max_source_positions"]
    return config["num_channels"], config["image_size"], config["image_size"]


def _words(count: int, vocabulary: int, placeholder: int, generator: torch.Generator) -> list[int]:
    """Random ids that are no placeholder."""
    ids = torch.randint(vocabulary - 1, (count,), generator=generator).tolist()
    return [token if token < placeholder else token + 1 for token in ids]
