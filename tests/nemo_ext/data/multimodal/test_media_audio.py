import io
import json
import wave

import numpy as np
import pytest
from media_samples import token_id, vision

from nemo_ext import platform
from nemo_ext.data.chat.render import Settings
from nemo_ext.data.multimodal import audio
from nemo_ext.data.multimodal.audio import AudioSettings, decode
from nemo_ext.data.multimodal.inputs import AudioInput, from_dict, read
from nemo_ext.data.multimodal.store import Samples, prepare
from nemo_ext.data.sources import MEDIA, parse
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Encoder, Projector, Sense


@pytest.fixture(scope="module", autouse=True)
def transformers():
    platform.activate()


def tones(seconds, rate, frequencies=(440, 880)):
    """A tone a channel, float32 [channels, samples]."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([np.sin(2 * np.pi * f * time) / 2 for f in frequencies]).astype(np.float32)


def encoded(samples, rate, kind="wav", codec="pcm_s16le"):
    import av

    file = io.BytesIO()
    layout = "stereo" if len(samples) == 2 else "mono"
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return file.getvalue()


def test_a_wav_file_that_was_written_to_a_pipe():
    data = bytearray(encoded(tones(1, 16000, (300,)), 16000))
    data[4:8] = b"\xff\xff\xff\xff"
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(data))) == 16000


def silent():
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
    return file.getvalue()


def hearing(folder, positions=50, downsample=5, bins=80):
    """A Whisper sense of windows of a second: 10 embeddings each."""
    config = {
        "model_type": "whisper", "d_model": 8, "max_source_positions": positions, "num_mel_bins": bins, "encoder_layers": 2
    }  # fmt: skip
    sense = Sense(Encoder(config), Projector(downsample=downsample), token_id(folder, "<|sound|>"))
    return AudioInput(sense, AudioSettings.of_encoder(config))


FORMATS = [
    ("wav", "pcm_s16le", 16000), ("wav", "pcm_s24le", 44100), ("wav", "pcm_f32le", 48000), ("wav", "pcm_u8", 8000),
    ("flac", "flac", 44100), ("mp3", "libmp3lame", 44100), ("ogg", "libopus", 48000),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "codec", "rate"), FORMATS)
def test_formats_rates_and_channels(kind, codec, rate):
    """A tone of 440 and one of 880 Hz, each at half its loudness after the mean over the channels."""
    samples = decode(encoded(tones(2, rate), rate, kind, codec))
    assert samples.dtype == np.float32 and samples.ndim == 1
    exact = kind in ("wav", "flac")
    assert len(samples) == 32000 if exact else abs(len(samples) - 32000) < 4000
    spectrum = np.abs(np.fft.rfft(samples[4000:20000] * np.hanning(16000))) / 4000
    assert set(np.argsort(spectrum)[-2:]) == {440, 880}
    assert np.allclose(spectrum[[440, 880]], 0.25, atol=0.01 if exact else 0.03)
    if (kind, rate) == ("wav", 16000):
        assert np.abs(samples - tones(2, rate).mean(0)).max() < 1e-4


def test_mono_is_unchanged():
    samples = tones(0.5, 16000, (300,))
    assert np.array_equal(decode(encoded(samples, 16000, "wav", "pcm_f32le")), samples[0])


STEREO = tones(1, 44100)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not audio of a known kind: wav, flac, ogg, mp3"),
        (b"<html>Not Found</html>", "not audio of a known kind"),
        (b"#EXTM3U\nfile:///etc/hostname\n", "not audio of a known kind"),  # a list of other files
        (b"RIFF" + b"\xff" * 60, "broken audio: "),
        (b"OggS" + b"\0" * 60, "broken audio: "),
        (b"ID3" + b"\0" * 60, "broken audio: "),
        (encoded(STEREO, 44100)[:50000], r"broken audio: the file has 50,000 of 176,478 bytes"),
        (encoded(STEREO, 44100, "flac", "flac")[:20000], "broken audio: "),
        (silent(), "a sound without any samples"),
        (encoded(STEREO * np.nan, 44100, "wav", "pcm_f32le"), "samples that are no numbers"),
    ],
)
def test_what_is_not_audio(data, says):
    with pytest.raises(UserError, match=says) as error:
        decode(data)
    assert "\n" not in str(error.value)


def test_limits(monkeypatch):
    data = encoded(STEREO, 44100, "mp3", "libmp3lame")
    monkeypatch.setattr(audio, "MOST_SECONDS", 0.5)
    for each in (data, encoded(STEREO, 44100)):
        with pytest.raises(UserError, match="a sound of (more than 0.5|1) seconds"):
            decode(each)
        assert len(decode(each, most_seconds=2)) > 16000 * 0.9
    with pytest.raises(UserError, match="a sound of 200,000 samples a second: at most 192,000 are read"):
        decode(encoded(tones(0.01, 200_000), 200_000))
    monkeypatch.setattr(audio, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="at most 10 are read"):
        decode(data)


def test_windows_equal_the_feature_extractor_of_whisper(tmp_path, tokenizer):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=128)
    extractor.save_pretrained(tmp_path)
    source = read(hearing(tokenizer, 1500, 4, 128).sense, tmp_path)
    assert source.sense.tokens == 375 and source.input_shape == (128, 3000) and from_dict(source.to_dict()) == source
    random = np.random.default_rng(1)
    for length in (16000, 480000, 480001, 700000):
        samples = (random.standard_normal(length) * np.linspace(0, 1, length)).astype(np.float32)
        expected = extractor(
            samples, sampling_rate=16000, return_tensors="np", padding=True, truncation=False, pad_to_multiple_of=480000
        )["input_features"]
        expected = expected.reshape(128, -1, 3000).transpose(1, 0, 2)  # VoxtralProcessor
        found = source.settings.windows(samples, source.frames)
        assert found.dtype == np.float32 and np.array_equal(found, expected)
        assert source.count((length,)) == len(found) and len(source.gather((length,))) == 375 * len(found)
    plain = extractor(samples[:16000], sampling_rate=16000, return_tensors="np")["input_features"]
    assert np.array_equal(source.settings.windows(samples[:16000], 3000), plain)


def test_settings_that_are_refused(tmp_path, tokenizer):
    sense = hearing(tokenizer).sense
    with pytest.raises(UserError, match="no preprocessor_config.json"):
        read(sense, tmp_path)
    for values, says in (
        ({"feature_extractor_type": "ClapFeatureExtractor"}, "ClapFeatureExtractor is not known: WhisperFeatureExtractor"),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": 8000}, "only 16000 samples a second"),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128}, "gives 128 mel bins, the encoder takes 80"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=says):
            read(sense, tmp_path)


def test_sounds_and_images_in_one_conversation(tmp_path, tokenizer):
    """From files to a micro batch, with both senses; a sound of 2.5 seconds is three windows."""
    import media_samples

    from nemo_ext.data.multimodal.module import Collate, RowBuilder

    see, hear = vision(tokenizer), hearing(tokenizer)
    (tmp_path / "a.wav").write_bytes(encoded(tones(2.5, 16000), 16000))
    (tmp_path / "a.png").write_bytes(media_samples.encoded(media_samples.picture()))
    turns = [{"from": "human", "value": "<audio> then <image> then <audio>"}, {"from": "gpt", "value": "Both."}]
    rows = [
        {"conversations": turns, "audios": ["a.wav", "a.wav"], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, {"role": "model", "content": "One."}]},
        {"question": "Text?", "answer": "None."},
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(rows))
    corpus = prepare(parse(str(tmp_path / "data.json"), MEDIA), tokenizer, tmp_path / "c", Settings(160), [see, hear], heldout=0)
    assert [corpus.sources[0].counts[name] for name in ("with images", "with sounds", "images", "sounds")] == [1, 2, 1, 3]
    samples = Samples(corpus.sources[0].train_prefix)
    assert [[m.tokens for m in media] for _, _, media in samples] == [[30, 4, 30], [30], []]
    builder = RowBuilder(160, 0, 100, "none", [see, hear], False, True)
    batch = Collate([see, hear])([builder.row([sample]) for sample in samples])
    assert batch["vision_inputs"].shape == (1, 3, 28, 28) and batch["audio_inputs"].shape == (9, 80, 100)
    assert batch["audio_gather"].tolist() == [*range(90)] and batch["vision_gather"].tolist() == [0, 1, 2, 3]
    assert batch["audio_inputs"][3:6].equal(batch["audio_inputs"][:3])
    assert (batch["tokens"] == hear.sense.token_id).sum() == 90

    (tmp_path / "b.wav").write_text("no sound")
    (tmp_path / "bad.json").write_text(json.dumps([rows[2], rows[1]]).replace("a.wav", "b.wav"))
    with pytest.raises(UserError, match="bad.json, record 2: sound 1: .*b.wav: not audio of a known kind"):
        prepare(parse(str(tmp_path / "bad.json"), MEDIA), tokenizer, tmp_path / "c", Settings(160), [see, hear], heldout=0)
