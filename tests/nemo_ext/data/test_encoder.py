import json
import pickle

import numpy as np
import pytest
from corpus_texts import PROSE, train_tokenizer, varied_texts

from nemo_ext.data.encoder import FAST, REFERENCE, Encoder, IdsDiffer, probe
from nemo_ext.errors import UserError


@pytest.mark.parametrize("family", ["llama3", "qwen2", "gpt2", "smollm"])
def test_ids_equal_hugging_face(tmp_path, family):
    from tokenizers import Tokenizer

    folder = train_tokenizer(tmp_path / family, family)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder = pickle.loads(pickle.dumps(Encoder(folder)))
    assert encoder.engine == FAST
    texts = varied_texts(1200) + ["", " ", "\n" * 300, "\x04", "a\x04b", "x" * 5000, " " * 3000 + "a", PROSE * 50]
    ids, lengths = encoder.encode(texts)
    expected = [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]
    assert lengths.tolist() == [len(e) for e in expected]
    assert ids.tolist() == [i for e in expected for i in e]
    slow = Encoder(folder, REFERENCE)
    assert slow.engine == f"{REFERENCE} (asked for)"
    assert np.array_equal(slow.encode(texts[:200])[0], ids[: lengths[:200].sum()])


def test_a_different_engine_is_found_out(tokenizer_dir, monkeypatch):
    class Wrong:
        def encode_batch_flat(self, texts):
            return np.zeros(len(texts), np.uint32).tobytes(), np.arange(len(texts) + 1, dtype=np.uint64).tobytes()

    encoder = Encoder(tokenizer_dir)
    assert encoder.engine == FAST
    encoder._fast = Wrong()
    with pytest.raises(IdsDiffer, match="fastokens differs from tokenizers on the text that begins 'hello"):
        encoder.encode(["hello world"] * 3)
    import fastokens._native

    monkeypatch.setattr(fastokens._native, "Tokenizer", type("T", (), {"from_json_str": staticmethod(lambda text: Wrong())}))
    assert Encoder(tokenizer_dir).engine.startswith("tokenizers (fastokens differs from tokenizers on ")


def test_the_probe_is_varied():
    text = "".join(probe())
    assert len(set(text)) > 2500 and all(c in text for c in "aअಕ漢🎉\u0301\u200d\u3000½٣")


def test_bad_folders(tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match="no such folder"):
        Encoder(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        Encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="names no eos_token"):
        _ = Encoder(tmp_path).eod
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<nope>"}}))
    with pytest.raises(UserError, match="'<nope>' of tokenizer_config.json is not in the vocabulary"):
        _ = Encoder(tmp_path).eod
