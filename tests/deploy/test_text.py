"""Ids spelled one by one say what they say together."""

import random

import pytest
from served_models import tokenizer

from deploy.engine.text import TextStream


def spelled(ids, stop=(), prompt=()):
    stream, parts = TextStream(tokenizer(), prompt, stop), []
    for token in ids:
        text, stopped = stream.push(token)
        parts.append(text)
        if stopped:
            return parts, True
    return [*parts, stream.flush()], False


def test_no_half_characters():
    text = "naïve 🙂 日本"
    ids = tokenizer().encode(text)
    assert len(ids) == len(text.encode())
    parts, _ = spelled(ids)
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts)
    assert [part for part in parts if part] == list(text)


def test_random_bytes_are_spelled_as_a_whole():
    chance = random.Random(0)
    for _ in range(50):
        ids = [chance.randrange(256) for _ in range(40)]
        assert "".join(spelled(ids, prompt=(1, 2, 3))[0]).count("\ufffd") > 0
    assert "".join(spelled(tokenizer().encode("é")[:1])[0]) == "\ufffd"


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("abcdef", ["cd"], "ab"),
        ("abcdef", ["cx", "ef"], "abcd"),
        ("aaab", ["aab"], "a"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("x🙂y", ["🙂"], "x"),
        ("abc", ["cd"], None),
    ],
)
def test_stop_texts_across_tokens(text, stop, expected):
    parts, stopped = spelled(tokenizer().encode(text), stop)
    assert ("".join(parts), stopped) == ((text, False) if expected is None else (expected, True))
    assert all(not "".join(parts).endswith(each) for each in stop)
