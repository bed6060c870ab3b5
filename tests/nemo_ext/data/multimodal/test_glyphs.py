import json
import tarfile
import unicodedata

import numpy as np
import pytest
from media_samples import vision

from nemo_ext import platform
from nemo_ext.data.chat.render import Settings
from nemo_ext.data.multimodal import glyphs
from nemo_ext.data.multimodal.glyphs import CHARACTERS, STYLES, draw, has_glyph
from nemo_ext.data.multimodal.image import decode
from nemo_ext.data.multimodal.store import Samples, prepare
from nemo_ext.data.sources import MEDIA, parse
from nemo_ext.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return glyphs.make(tmp_path_factory.mktemp("glyphs"), train=3, heldout=2)


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_pictures_and_names(made, tmp_path):
    assert made["chance"] == 1 / 53 and made["classes"][:2] == ["AMPERSAND", "QUESTION MARK"]
    assert len(set(made["classes"])) == 53
    for side, count in (("train", 159), ("heldout", 106)):
        files = members(made[side])
        assert len(files) == 2 * count
        answers = [json.loads(files[f"{i:06d}.json"])["messages"][1]["content"] for i in range(count)]
        assert answers == [made["classes"][i % 53] for i in range(count)]  # every class as often
        assert all(decode(files[f"{i:06d}.png"]).size == (32, 32) for i in range(count))
    assert not set(members(made["train"]).values()) & {d for n, d in members(made["heldout"]).items() if n.endswith("png")}
    again = glyphs.make(tmp_path, train=3, heldout=2)
    for side in glyphs.SIDES:
        assert again[side].read_bytes() == made[side].read_bytes()
    assert glyphs.make(tmp_path, train=3, heldout=2, seed=2)["train"].read_bytes() != made["train"].read_bytes()


def test_the_sides_share_no_font_size_or_hue():
    train, held = STYLES["train"], STYLES["heldout"]
    for name in ("fonts", "sizes", "hues"):
        assert not set(getattr(train, name)) & set(getattr(held, name))
    for style in (train, held):
        for character in CHARACTERS:
            assert sum(has_glyph(character, font) for font in style.fonts) >= 3


def test_what_is_drawn_is_the_character():
    """Whole, of the size and in the colours asked for; and no two characters look alike in any font."""
    for font in {font for style in STYLES.values() for font in style.fonts}:
        seen = []
        for character in CHARACTERS:
            if not has_glyph(character, font):
                continue
            pixels = np.asarray(draw(character, font, 32, 0.75, 0.0, (0.5, 0.5))).astype(int)
            paper = pixels[0, 0]
            ink = np.abs(pixels - paper).sum(-1) > 60
            rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
            assert 22 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 25, (font, character)
            assert not ink[0].any() and not ink[-1].any() and not ink[:, 0].any() and not ink[:, -1].any()
            darkest = pixels[ink].sum(-1).min()
            assert paper.sum() - darkest > 250, (font, character)
            seen.append(ink.ravel())
        alike = np.array(seen)
        differing = (alike[:, None] != alike[None]).sum(-1) + 1000 * np.eye(len(alike), dtype=int)
        assert differing.min() > 8, (font, divmod(int(differing.argmin()), len(alike)))


def test_as_a_source(tmp_path, tokenizer, monkeypatch):
    platform.activate()
    make = glyphs.make
    monkeypatch.setattr(glyphs, "make", lambda cache, classes=53: make(cache, classes=classes, train=2, heldout=2))
    sense = vision(tokenizer, side=32, patch=8)
    corpus = prepare(parse("glyphs:22", MEDIA), tokenizer, tmp_path, Settings(128), [sense])
    assert (corpus.train_documents, corpus.heldout_documents) == (44, 44) and corpus.sources[0].name == "glyphs:22"
    _, train, held = corpus.blend()[0]
    (ids, _, (media,)) = Samples(held)[3]
    assert media.location.path.endswith("heldout.tar") and (ids == sense.sense.token_id).sum() == 16
    assert Samples(train)[3][2][0].location.path.endswith("train.tar")
    assert prepare(parse("glyphs", MEDIA), tokenizer, tmp_path, Settings(128), [sense], heldout=0).blend()[0][2] is None
    with pytest.raises(UserError, match="data=glyphs stands alone"):
        prepare(parse("[glyphs,glyphs]", MEDIA), tokenizer, tmp_path, Settings(128), [sense])
    with pytest.raises(UserError, match="data=glyphs: no such file"):
        parse("glyphs")
    with pytest.raises(UserError, match="from 2 to 53 classes, not 54"):
        prepare(parse("glyphs:54", MEDIA), tokenizer, tmp_path, Settings(128), [sense])
    assert unicodedata.name(CHARACTERS[-1]) == "GREEK CAPITAL LETTER OMEGA"
