"""Sounds in chats: the answers of transformers' Voxtral, token for token, and what is refused."""

import base64
import io
import wave

import numpy as np
import pytest
from served_models import Answers, Served, ask_with_media, save_model

WHISPER = dict(model_type="whisper", d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128, num_mel_bins=8,
               max_source_positions=32)  # fmt: skip
WINDOW = 64 * 160  # samples: two spectrogram frames, of 160 samples each, are one of the encoder's positions
EMBEDDINGS = 32 // 4  # of a window
NEW = 12


@pytest.fixture(scope="module")
def voxtral(tmp_path_factory):
    """The tiny Llama with a random Whisper."""
    from conversion.multimodal.compose import compose

    folder = tmp_path_factory.mktemp("hearing")
    return compose(save_model(folder / "text"), folder / "voxtral", encoder=WHISPER)


@pytest.fixture(scope="module")
def hearing(voxtral):
    """An engine that reads a sound of two windows in pieces."""
    from deploy.engine.engine import Engine

    engine = Engine(voxtral, rows=3, prefill_tokens=9, dtype="float32", images=2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(hearing):
    from deploy.limits import Limits
    from deploy.server import Service

    served = Served(Service(hearing, "voxtral", Limits(body_bytes=2_000_000, max_tokens=200, request_seconds=30)))
    yield served
    served.close()


def sound(seed: int, samples: int) -> np.ndarray:
    """A few tones, int16."""
    rng, time = np.random.default_rng(seed), np.arange(samples) / 16000
    tones = sum(np.sin(2 * np.pi * frequency * time) for frequency in rng.uniform(100, 4000, 3))
    return (tones * 8000).astype(np.int16)


def encoded(samples: np.ndarray) -> str:
    """A wav file in base64."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16000)
        writer.writeframes(samples.tobytes())
    return base64.b64encode(file.getvalue()).decode()


def part(samples: np.ndarray) -> dict:
    return {"type": "input_audio", "input_audio": {"data": encoded(samples), "format": "wav"}}


@pytest.fixture(scope="module")
def reference(voxtral):
    """What transformers answers, greedily, to the spectrograms that Voxtral's processor makes: a function of sounds and text."""
    import torch
    import transformers as tf

    model = tf.VoxtralForConditionalGeneration.from_pretrained(voxtral, attn_implementation="eager").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(voxtral)
    extractor = tf.WhisperFeatureExtractor.from_pretrained(voxtral)

    def answer(sounds, text: str) -> list[int]:
        parts = [*[{"type": "audio"}] * len(sounds), {"type": "text", "text": text}]
        chat = tokenizer.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
        windows = []
        for samples in sounds:
            found = extractor(samples.astype(np.float32) / 32768, sampling_rate=16000, padding=True, truncation=False,
                              pad_to_multiple_of=WINDOW, return_tensors="pt").input_features  # fmt: skip
            windows.append(found.reshape(8, -1, 64).transpose(0, 1))
            chat = chat.replace("<audio>", "<sound>" * (EMBEDDINGS * len(windows[-1])), 1)
        ids = tokenizer(chat.replace("<sound>", "<audio>"), return_tensors="pt", add_special_tokens=False)
        more = {"input_features": torch.cat(windows)} if windows else {}
        with torch.no_grad():
            given = model.generate(**ids, **more, max_new_tokens=NEW, do_sample=False, pad_token_id=256)
        return given[0, ids["input_ids"].shape[1] :].tolist()

    return answer


def asked(engine, sounds, text: str) -> Answers:
    return ask_with_media(engine, "audio", [("input_audio", encoded(each)) for each in sounds], text, NEW)


def test_greedy_answers_are_transformers_in_mixed_batches(hearing, reference):
    """Sounds of less than a window, of one, and of more."""
    lengths = [(WINDOW // 3,), (), (WINDOW, WINDOW + 500), (2 * WINDOW,)]
    chats = [([sound(10 * i + j, n) for j, n in enumerate(each)], "what" * (i + 1)) for i, each in enumerate(lengths)]
    running = [asked(hearing, *chat) for chat in chats]
    for chat, answers in zip(chats, running, strict=True):
        assert answers.wait().ids() == reference(*chat)
    same_text = {tuple(asked(hearing, [sound(seed, WINDOW)], "what").wait().ids()) for seed in range(4)}
    assert len(same_text) > 1  # the sounds decide


def test_chats_over_http(server, hearing, reference):
    one = sound(1, WINDOW + 100)
    message = {"role": "user", "content": [part(one), {"type": "text", "text": "compare"}]}
    body = server.post("/v1/chat/completions", messages=[message], max_tokens=NEW, temperature=0).json()
    assert body["choices"][0]["message"]["content"] == hearing._tokenizer.decode(
        reference([one], "compare"), skip_special_tokens=True
    )
    assert body["usage"]["prompt_tokens"] > 2 * EMBEDDINGS


@pytest.mark.parametrize(
    "parts, message",
    [
        ([{"type": "input_audio", "input_audio": {"data": "!!", "format": "wav"}}], "input_audio: the data is not base64"),
        ([{"type": "input_audio", "input_audio": {"data": "aGVsbG8=", "format": "wav"}}], "not audio of a known kind: wav, flac"),
        ([{"type": "input_audio"}], "needs input_audio"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}], "input_audio: image_url is not served"),
        ([part(sound(0, 3 * 16000))], "input_audio: a sound of 3 seconds: at most 2 are read"),
        ([part(sound(i, 100)) for i in range(3)], "3 sounds in one request are more than the server's 2"),
        ([part(sound(0, 100)), {"type": "text", "text": "and <audio>?"}], "2 placeholders for 1 sounds"),
    ],
)
def test_what_is_refused(server, parts, message, monkeypatch):
    monkeypatch.setattr("deploy.engine.sounds.MOST_SECONDS", 2)
    response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": parts}])
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
