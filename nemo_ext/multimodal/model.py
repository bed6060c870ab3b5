"""Senses in Megatron's GPTModel: what an encoder and a projector make of images or sounds stands in place of placeholder tokens.

Megatron's and NeMo's own multimodal models are models of their own, with other parameter names and their own pipeline stages;
here a language model of any family keeps its class, its names and its layout. Encoders and projectors are whole on every tensor
rank of the first pipeline stage.

Importing this module imports Megatron; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from nemo_ext.multimodal import encoder as encoders
from nemo_ext.multimodal.description import AUDIO, Sense
from nemo_ext.multimodal.projector import ProjectorModule


class SenseModule(nn.Module):
    """Inputs of an encoder to embeddings of the decoder's width. With tiling, `newline` is the embedding at a row's end."""

    def __init__(self, sense: Sense, hidden_size: int):
        super().__init__()
        self.sense = sense
        self.recompute = False
        self.encoder = encoders.build(sense.encoder)
        self.projector = ProjectorModule(sense.projector, sense.encoder.grid, sense.encoder.hidden_size, hidden_size)
        if sense.tiling is not None:
            self.newline = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5)
        for parameter in encoders.unused(self.encoder, sense.encoder):
            parameter.requires_grad_(False)

    @property
    def trains_encoder(self) -> bool:
        """Whether anything of the encoder has a gradient."""
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> SenseModule:
        """A frozen encoder stays as it computes in use."""
        super().train(mode)
        if not self.trains_encoder:
            self.encoder.eval()
        return self

    def forward(self, inputs: Tensor, gather: Tensor) -> Tensor:
        """`[p, hidden]`: of the embeddings of inputs `[n, ...]`, one after another and then the newline, those at `gather` `[p]`.

        Without inputs (n 0, p 0) the modules run on zeros, whose gradients are zero: data parallelism waits for those of every
        trained parameter.
        """
        weight = self.projector.linear_1.weight
        if not len(inputs):
            inputs = inputs.new_zeros(1, *inputs.shape[1:])
        trained = self.trains_encoder
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            recompute = self.recompute and trained and self.training
            found = encoders.features(self.encoder, self.sense.encoder, inputs.to(weight.dtype), recompute)
        table = self.projector(found).flatten(0, 1)
        if self.sense.tiling is not None:
            table = torch.cat([table, self.newline[None]])
        return table[gather]


def attach(model: GPTModel, senses: Sequence[Sense]) -> None:
    """Give a language model its senses, in place, as `model.senses`: a module for each modality, on the first pipeline stage.

    The model then takes `vision_inputs` float `[n, 3, H, W]` and `vision_gather` int64 `[p]` (`audio_inputs`, `audio_gather`) as
    further keywords: for each placeholder in `input_ids` `[b, s]`, row by row, which of `SenseModule`'s embeddings stands there.
    Without them it computes as before.
    """
    if not model.pre_process:
        return
    place = next(model.parameters())
    modules = {sense.modality: SenseModule(sense, model.config.hidden_size) for sense in senses}
    model.senses = nn.ModuleDict(modules).to(place.device, place.dtype)
    model.register_forward_pre_hook(_with_media, with_kwargs=True)


def media_names(modality: str) -> tuple[str, str]:
    """The keys of a modality's inputs and of their places in a batch."""
    return f"{modality}_inputs", f"{modality}_gather"


def input_shape(sense: Sense) -> tuple[int, ...]:
    """The shape of one input of the encoder."""
    config = sense.encoder.config
    if sense.modality == AUDIO:
        return config["num_mel_bins"], 2 * config["max_source_positions"]
    return config.get("num_channels", 3), config["image_size"], config["image_size"]


def _with_media(model: GPTModel, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Turn media among the keywords of a forward pass into the decoder's input."""
    keywords = dict(keywords)
    media = {name: [keywords.pop(key, None) for key in media_names(name)] for name in model.senses}
    if all(inputs is None for inputs, _ in media.values()):
        return arguments, keywords
    given = dict(zip(("input_ids", "position_ids"), arguments, strict=False)) | keywords
    tokens = given["input_ids"]
    embedded = model.embedding(input_ids=tokens, position_ids=given["position_ids"])
    for name, (inputs, gather) in media.items():
        if inputs is not None:
            sense = model.senses[name]
            embedded = put(embedded, tokens == sense.sense.token_id, sense(inputs, gather), model.config)
    return arguments, {**keywords, "decoder_input": embedded}


def put(embedded: Tensor, places: Tensor, features: Tensor, config: Any) -> Tensor:
    """Embeddings `[s, b, h]` with `features` `[p, h]` where `places` `[b, s]` is true, row by row.

    With sequence parallelism `embedded` is this rank's part of the sequence; the features are whole, and so become their
    gradients.
    """
    row, column = places.nonzero(as_tuple=True)
    if len(row) != len(features):
        raise ValueError(f"{len(row)} placeholders for {len(features)} embeddings of media")
    features = features.to(embedded.dtype)
    if getattr(config, "scales_inputs", False):  # what is scaled is the decoder's input, not the embedding
        features = features * torch.tensor(config.hidden_size**0.5, dtype=features.dtype)
    if config.sequence_parallel:
        features = tensor_parallel.copy_to_tensor_model_parallel_region(features)
        length = len(embedded)
        column = column - parallel_state.get_tensor_model_parallel_rank() * length
        here = (column >= 0) & (column < length)
        row, column, features = row[here], column[here], features[here]
    return embedded.index_put((column, row), features)
