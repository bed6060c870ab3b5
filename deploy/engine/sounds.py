"""Sounds in requests: from base64 to windows of a Whisper encoder, within limits, and to embeddings of the decoder's width.

Voxtral. A sound stands in the prompt as one placeholder token for each of its embeddings; its last window is filled up with
silence, as Voxtral's processor does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy.engine.media import Media, Medium, from_base64
from deploy.engine.request import Refused
from nemo_ext.data.multimodal import audio
from nemo_ext.errors import UserError

MOST_SECONDS = 600  # of a sound


class Sounds(Media):
    """What a model's folder says of sounds, and how many a request may have."""

    what, part = "sounds", "input_audio"

    def made(self, source: str) -> Medium:
        """The sound of a file in base64. Raises Refused for what is no sound, and for one that is too long."""
        data = from_base64(source, self.part)
        try:
            samples = audio.decode(data, MOST_SECONDS)
        except UserError as error:
            raise Refused(f"{self.part}: {error}") from None
        windows = self._input.settings.windows(samples, self._input.frames)
        return Medium(windows, self._input.gather(samples.shape))

    def embeddings(self, model: Any, sounds: Sequence[Medium]) -> Any:
        """Embeddings [placeholders, h] of a request's sounds in order, by transformers' Voxtral `model`."""
        import torch

        found = []
        for sound in sounds:
            table = model.get_audio_features(torch.from_numpy(sound.inputs).to(model.device, model.dtype))
            found.append(table[torch.from_numpy(sound.gather).to(model.device)])
        return torch.cat(found)
