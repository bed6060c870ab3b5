"""SentencePiece vocabularies of GGUF files: Hugging Face's ids against a slow reference of llama.cpp's, both ways."""

import json
import random
import shutil
from itertools import pairwise

import pytest
from gguf_vocabulary_samples import BYTE, CONTROL, NORMAL, TEXTS, UNKNOWN, UNUSED, USER_DEFINED, encode, metadata

from conversion.gguf import tokenizer as gguf_tokenizer
from conversion.gguf import vocabulary as gguf_vocabulary
from nemo_ext.errors import UserError

SAMPLE = metadata()
PREFIXED = metadata(add_space_prefix=True)


def written(values: dict, folder):
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    gguf_tokenizer.write(values | {"general.architecture": "gemma3", "gemma3.context_length": 512}, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=[SAMPLE, PREFIXED], ids=["gemma", "llama"])
def values(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(values, tmp_path_factory):
    return written(values, tmp_path_factory.mktemp("tokenizer"))


def test_the_sample_has_what_gemma_has(values):
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    counts = {kind: types.count(kind) for kind in range(2, 7)}
    assert counts == {UNKNOWN: 1, CONTROL: 5, USER_DEFINED: 10, UNUSED: 0, BYTE: 256}
    assert "  " in tokens and "\n\n" in tokens and any(len(token) > 5 for token in tokens)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ids_are_llama_cpps(values, tokenizer, text):
    expected = encode(values, text)
    assert tokenizer(text).input_ids == expected
    assert tokenizer(text, add_special_tokens=False).input_ids == expected[1:]


def test_ids_of_random_texts(values, tokenizer):
    generator = random.Random(1)
    pieces = [*"ab lt\n\t<>▁ನಮक्ष🙂é0", "  ", "aa", "ab", "</b>", "<bos>", " the", *values["tokenizer.ggml.tokens"][:12]]
    for _ in range(1500):
        text = "".join(generator.choices(pieces, k=generator.randint(1, 30)))
        assert tokenizer(text).input_ids == encode(values, text), repr(text)


def test_texts_come_back(values, tokenizer):
    names = ["Hindi", "Kannada", "emoji", "numbers", "bytes", "combining", "English"]
    if not values["tokenizer.ggml.add_space_prefix"]:  # else llama.cpp puts a space after every user-defined token
        names += ["code", "newlines", "spaces"]
    for name in names:
        assert tokenizer.decode(tokenizer(TEXTS[name]).input_ids, skip_special_tokens=True) == TEXTS[name]


def test_special_tokens_and_template(values, tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) == (
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
    )
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == values["tokenizer.ggml.tokens"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<start_of_turn>a<end_of_turn>"


def test_eos_is_put_behind_if_the_metadata_say_so(tmp_path):
    both = SAMPLE | {"tokenizer.ggml.add_eos_token": True}
    tokenizer = written(both, tmp_path)
    assert tokenizer("a").input_ids == encode(both, "a") == [2, *encode(both, "a")[1:-1], 1]
    assert tokenizer("a", "a").input_ids == encode(both, "a") * 2
    neither = SAMPLE | {"tokenizer.ggml.add_bos_token": False}
    assert written(neither, tmp_path)("a").input_ids == encode(SAMPLE, "a")[1:]


def test_back_to_metadata(values, tokenizer, tmp_path):
    """Scores are new, of the same order; everything else is the same, and so are the ids."""
    tokenizer.save_pretrained(tmp_path)
    config = {"vocab_size": len(tokenizer) + 3}
    found, notes = gguf_vocabulary.read(tmp_path, config)
    padded = len(tokenizer)
    for key, value in values.items():
        if key == "tokenizer.ggml.scores":
            merged = [i for i, token in enumerate(values["tokenizer.ggml.tokens"])
                      if values["tokenizer.ggml.token_type"][i] == NORMAL and len(token) > 1]  # fmt: skip
            assert sorted(merged, key=value.__getitem__) == sorted(merged, key=found[key].__getitem__) and len(merged) > 100
        elif isinstance(value, list):
            assert found[key][:padded] == value and len(found[key]) == padded + 3
        else:
            assert found[key] == value, key
    assert found["tokenizer.ggml.tokens"][padded:] == [f"[PAD{padded + i}]" for i in range(3)]
    assert notes == []
    again = written(found, tmp_path / "again")
    assert len(again) == padded
    for text in TEXTS.values():
        assert again(text).input_ids == tokenizer(text).input_ids == encode(found, text)


def test_tokens_without_embedding(tmp_path):
    tokenizer = written(SAMPLE, tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    found, notes = gguf_vocabulary.read(tmp_path, {"vocab_size": 900})
    assert len(found["tokenizer.ggml.tokens"]) == 900 and "<image>" in notes[0]
    with pytest.raises(UserError, match="ids up to 899, the model embeds 899"):
        gguf_vocabulary.read(tmp_path, {"vocab_size": 899})


def changed(**changes) -> dict:
    return SAMPLE | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_scores_that_merges_cannot_express(tmp_path):
    tokens, types, scores = (list(SAMPLE[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type", "scores"))
    more = ["Ѧѧ", "ѧѨ", "Ѧ", "ѧ", "Ѩ"]
    tied = changed(tokens=[*tokens, *more], token_type=[*types, *[NORMAL] * 5], scores=[*scores, -7777, -7777, 0, 0, 0])
    with pytest.raises(UserError, match="'Ѧѧ' and 'ѧѨ' have the same score, and either can take 'ѧ'"):
        written(tied, tmp_path)
    with pytest.raises(UserError, match="token 'aѪ' has a character that is no token"):
        written(changed(tokens=[*tokens, "aѪ"], token_type=[*types, 1], scores=[*scores, -1]), tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(model="bert"), "of type 'bert'; only 'gpt2' and 'llama' are read"),
        (changed(bos_token_id=5000), "bos id 5000 lies outside"),
        (changed(scores=SAMPLE["tokenizer.ggml.scores"][:-1]), "of different number"),
        ({k: v for k, v in SAMPLE.items() if k != "tokenizer.ggml.scores"}, "lacks tokenizer.ggml.scores"),
        (
            changed(tokens=["x" if t == "<0x0A>" else t for t in SAMPLE["tokenizer.ggml.tokens"]]),
            "lacks 1 of the 256 byte tokens",
        ),
    ],
)
def test_vocabularies_that_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        written(values, tmp_path)


def edited(folder, change):
    """The sample tokenizer with its tokenizer.json changed."""
    written(SAMPLE, folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    change(state)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def test_tokenizers_that_are_not_written(tmp_path):
    config = {"vocab_size": 1000}

    def part_a_pair(state):
        """Two merges that make the same token are no longer neighbours."""
        merges = state["model"]["merges"]
        first = next(i for i, (one, other) in enumerate(pairwise(merges)) if "".join(one) == "".join(other))
        merges.append(merges.pop(first))

    def refused(change, message):
        with pytest.raises(UserError, match=message) as error:
            gguf_vocabulary.read(edited(tmp_path, change), config)
        assert "\n" not in str(error.value)

    refused(lambda state: state["model"]["merges"].pop(0), "does not merge .* llama.cpp would")
    refused(part_a_pair, "at two ranks")
    refused(lambda state: state.update(normalizer={"type": "Lowercase"}), "does not treat spaces")
    refused(lambda state: state.update(pre_tokenizer={"type": "Whitespace"}), "does not treat spaces")
    twice = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}] * 2
    refused(
        lambda state: state["post_processor"].update(single=[*twice, {"Sequence": {"id": "A", "type_id": 0}}]),
        r"puts \[2, 2\] before",
    )
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(UserError, match="no tokenizer that transformers loads"):
        gguf_vocabulary.read(tmp_path, config)


def test_metaspace_is_written_with_a_note(tmp_path):
    def llama2(state):
        state.update(
            normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        )

    found, notes = gguf_vocabulary.read(edited(tmp_path, llama2), {"vocab_size": 900})
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert len(notes) == 1 and "space" in notes[0]
    assert CONTROL in found["tokenizer.ggml.token_type"]
