"""Sounds as a Whisper encoder hears them: decoded within limits to 16 kHz mono, then windows of a log-mel spectrogram.

`AudioSettings.windows` equals transformers' WhisperFeatureExtractor on the whole sound, padded to whole windows and cut into
them, as Voxtral's processor does.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_ext.data.multimodal import processor
from nemo_ext.errors import UserError

RATE = 16000
MOST_SECONDS = 3600
MOST_RATE = 192_000  # samples a second, which are all in memory before they are fewer
MOST_BYTES = 1 << 30
KINDS = {
    "wav": (b"RIFF", b"RF64"),
    "flac": (b"fLaC",),
    "ogg": (b"OggS",),
    "mp3": (b"ID3", *(bytes([0xFF, second]) for second in (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2))),
}
EXACT = ("wav", "flac")  # kinds whose headers say how long they are


def decode(data: bytes, most_seconds: float | None = None) -> np.ndarray:
    """The mean of all channels at 16 kHz, float32 [samples], of at most `most_seconds` (None: MOST_SECONDS). Raises UserError, in
    one line, for what is no sound, ends early or exceeds the limits; no more than the limit is decoded."""
    import av
    from scipy.signal import resample_poly

    most = MOST_SECONDS if most_seconds is None else most_seconds
    if len(data) > MOST_BYTES:
        raise UserError(f"a sound file of {len(data):,} bytes: at most {MOST_BYTES:,} are read")
    kind = next((kind for kind, starts in KINDS.items() if data.startswith(starts)), None)
    if kind is None:
        raise UserError("not audio of a known kind: " + ", ".join(KINDS))
    declared = 8 + int.from_bytes(data[4:8], "little")
    if kind == "wav" and len(data) + 1 < declared <= MOST_BYTES:  # more than that: written to a pipe, of unknown length
        raise UserError(f"broken audio: the file has {len(data):,} of {declared:,} bytes")
    try:
        # the format is given, not guessed: some that a library knows read other files, or from the network
        with av.open(io.BytesIO(data), format=kind, metadata_errors="ignore") as container:
            stream = container.streams.audio[0]
            rate, declared = stream.rate or 0, float((stream.duration or 0) * stream.time_base)
            if not 0 < rate <= MOST_RATE:
                raise UserError(f"a sound of {rate:,} samples a second: at most {MOST_RATE:,} are read")
            if declared > most:
                raise UserError(f"a sound of {declared:.0f} seconds: at most {most} are read")
            mono = np.concatenate([np.empty(0, np.float32), *_channels(container, stream, most)])
    except UserError:
        raise
    except (av.FFmpegError, IndexError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).strip().splitlines() or [type(error).__name__]
        raise UserError(f"broken audio: {reason[0]}") from None
    if not len(mono):
        raise UserError("a sound without any samples")
    if kind in EXACT and len(mono) / rate < declared - 0.1:
        raise UserError(f"broken audio: it ends after {len(mono) / rate:.1f} of {declared:.1f} seconds")
    if not np.isfinite(mono).all():
        raise UserError("broken audio: samples that are no numbers")
    if rate == RATE:
        return mono
    common = math.gcd(rate, RATE)
    return resample_poly(mono, RATE // common, rate // common).astype(np.float32)


def _channels(container: Any, stream: Any, most_seconds: float) -> Iterator[np.ndarray]:
    """The mean over channels of each decoded frame, float32 [samples]."""
    import av

    convert = av.AudioResampler(format="fltp")
    count = 0
    for frame in container.decode(stream):
        for converted in convert.resample(frame):
            mean = converted.to_ndarray().mean(axis=0, dtype=np.float32)
            count += len(mean)
            if count > most_seconds * stream.rate:
                raise UserError(f"a sound of more than {most_seconds} seconds")
            yield mean


@dataclass(frozen=True)
class AudioSettings:
    """From samples to log-mel windows: `mel_bins` of a short-time Fourier transform of `transform` samples every `hop`."""

    mel_bins: int = 80
    transform: int = 400
    hop: int = 160

    @classmethod
    def of_encoder(cls, config: dict[str, Any]) -> AudioSettings:
        """Whisper's."""
        return cls(mel_bins=config["num_mel_bins"])

    @classmethod
    def from_folder(cls, folder: str | Path) -> AudioSettings:
        """Read preprocessor_config.json, or processor_config.json. Raises UserError where it is of another kind."""
        return cls.from_config(*processor.read(folder, "feature_extractor"))

    @classmethod
    def from_config(cls, values: dict[str, Any], place: str = "feature extractor") -> AudioSettings:
        """From the values of preprocessor_config.json."""
        kind = values.get("feature_extractor_type")
        if kind != "WhisperFeatureExtractor":
            raise UserError(f"{place}: feature_extractor_type {kind or 'missing'} is not known: WhisperFeatureExtractor")
        if values.get("sampling_rate", RATE) != RATE or values.get("dither", 0.0) or values.get("do_normalize"):
            raise UserError(f"{place}: only {RATE} samples a second, without dither and normalisation, are made here")
        return cls(values.get("feature_size", 80), values.get("n_fft", 400), values.get("hop_length", 160))

    def windows(self, samples: np.ndarray, frames: int) -> np.ndarray:
        """float32 [windows, mel bins, frames] of samples [n]; the last window is filled up with silence."""
        import torch

        length = frames * self.hop
        padded = np.zeros(-(-len(samples) // length) * length, np.float32)
        padded[: len(samples)] = samples
        window = torch.hann_window(self.transform)
        spectrum = torch.stft(torch.from_numpy(padded), self.transform, self.hop, window=window, return_complex=True)
        mel = torch.from_numpy(_filters(self.mel_bins, self.transform)).T @ spectrum[..., :-1].abs() ** 2
        log = torch.clamp(mel, min=1e-10).log10()
        log = (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0
        return log.view(self.mel_bins, -1, frames).transpose(0, 1).contiguous().numpy()


@functools.lru_cache(maxsize=4)
def _filters(mel_bins: int, transform: int) -> np.ndarray:
    """Triangles on Slaney's mel scale, float32 [1 + transform / 2, mel bins]."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(1 + transform // 2, mel_bins, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    return filters.astype(np.float32)
