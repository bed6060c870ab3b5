"""A reference for pairs of encoder and projector that no class of transformers computes: its modules, put together by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from conversion import families, hf_to_nemo, safetensors_io
from conversion.families.table import WRAPPED
from conversion.multimodal.configuration import MODALITY_TOWERS, language_model, senses_of
from conversion.multimodal.rows import PROJECTOR, projector_shapes
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import AUDIO, Sense


class Assembled(nn.Module):
    """transformers' text model and encoder in eager attention with a projector between them; one sense, without tiling."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        config, stored = hf_to_nemo.read_config(folder), safetensors_io.open_folder(folder)
        (self.sense,) = senses_of(config)
        if self.sense.tiling is not None:
            raise UserError(f"{folder} has tiles and a projector other than LLaVA-NeXT's: there is no reference to compare with")
        towers = {"siglip_vision_model": SiglipVisionModel, "clip_vision_model": CLIPVisionModel, "whisper": WhisperEncoder}
        text, encoder = dict(language_model(config)), dict(self.sense.encoder.config)
        self.language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text), attn_implementation="eager")
        self.tower = towers[encoder["model_type"]](AutoConfig.for_model(**encoder, attn_implementation="eager"))
        shapes = projector_shapes(self.sense, self.language_model.config.hidden_size)
        self.projector = nn.ModuleDict()
        for name in ("linear_1", "linear_2"):
            if f"{name}.weight" in shapes:
                rows, columns = shapes[f"{name}.weight"]
                self.projector[name] = nn.Linear(columns, rows, bias=self.sense.projector.bias)
        self.to(dtype)
        tied = {"lm_head.weight"} if self.language_model.config.tie_word_embeddings else set()
        _fill(self.language_model, {n: families.hf_name(n, WRAPPED[0]) for n in self.language_model.state_dict()}, stored, tied)
        _fill(self.tower, {n: f"{MODALITY_TOWERS[self.sense.modality]}.{n}" for n in self.tower.state_dict()}, stored)
        _fill(self.projector, {n: f"{PROJECTOR}.{n}" for n in self.projector.state_dict()}, stored)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **media: torch.Tensor):
        """Logits as a causal language model gives them; `media` as LLaVA or Voxtral takes it."""
        embedded = self.language_model.get_input_embeddings()(input_ids)
        if media:
            features = self.project(media["input_features" if self.sense.modality == AUDIO else "pixel_values"])
            places = (input_ids == self.sense.token_id)[..., None].expand_as(embedded)
            embedded = embedded.masked_scatter(places, features.to(embedded.dtype))
        return self.language_model(inputs_embeds=embedded, use_cache=use_cache)

    def project(self, inputs: torch.Tensor) -> torch.Tensor:
        """Embeddings `[n, tokens, h]` of the encoder's inputs."""
        encoder, down = self.sense.encoder, self.sense.projector.downsample
        out = self.tower(inputs, output_hidden_states=True)
        hidden = out.last_hidden_state if encoder.feature_layer is None else out.hidden_states[encoder.feature_layer]
        if encoder.has_class_token and not encoder.class_token:
            hidden = hidden[:, 1:]
        if down > 1:
            hidden = _joined(hidden, self.sense, down)
        for number, linear in enumerate(self.projector.values()):
            hidden = linear(nn.functional.gelu(hidden) if number else hidden)
        return hidden


def _joined(hidden: torch.Tensor, sense: Sense, down: int) -> torch.Tensor:
    n, _, h = hidden.shape
    if sense.modality == AUDIO:
        return hidden.reshape(n, -1, down * h)
    picture = hidden.transpose(1, 2).reshape(n, h, *sense.encoder.grid)
    blocks = nn.functional.pixel_unshuffle(picture, down)  # [n, h d d, rows / d, columns / d], the features outermost
    return blocks.flatten(2).transpose(1, 2).reshape(n, -1, h, down * down).transpose(2, 3).flatten(2)


def _fill(module: nn.Module, names: Mapping[str, str], stored: Mapping, tied: set[str] = frozenset()) -> None:
    """Load the tensors that `stored` has under the `names`, {own: stored}; UserError where one lacks that is not `tied`."""
    if missing := sorted(there for own, there in names.items() if there not in stored and own not in tied):
        raise UserError(f"tensor {missing[0]} is missing")
    module.load_state_dict({own: stored[there].read() for own, there in names.items() if there in stored}, strict=False)
