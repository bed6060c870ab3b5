import base64
import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from media_samples import encoded, picture, token_id, vision

from nemo_ext import platform
from nemo_ext.data.chat.render import Settings
from nemo_ext.data.multimodal import shards
from nemo_ext.data.multimodal.records import Reader
from nemo_ext.data.multimodal.store import Samples, prepare, with_heldout
from nemo_ext.data.sources import MEDIA, parse
from nemo_ext.errors import UserError

DATA = [encoded(picture(i, 20 + i, 24)) for i in range(6)]
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]


@pytest.fixture(scope="module", autouse=True)
def transformers():
    platform.activate()


@pytest.fixture(scope="module")
def sense(tokenizer):
    return vision(tokenizer)


@pytest.fixture()
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, data in enumerate(DATA):
        (folder / f"{i}.png").write_bytes(data)
    return folder


def read(path, sense, folder=None, columns=None):
    """(texts of the turns, bytes of the media) of all conversations of a source."""
    reader = Reader(columns or {}, (sense,), folder)
    inline = path.parent / "inline.bin"
    found = [
        parsed()
        for source in parse(str(path), MEDIA)
        for block in reader.plan(source)
        for _, parsed in reader.conversations(block, inline)
    ]
    return [([m.content for m in c.messages], [m.location.below(path.parent).read() for m in c.media]) for c in found]


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_formats_with_paths_and_inline_images(tmp_path, pictures, sense):
    two = [{"from": "human", "value": "<image><image>Which?"}, {"from": "gpt", "value": "A thing."}]
    parts = [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": {"url": url(DATA[2])}}, {"type": "text", "text": "What?"}]  # noqa: E501  # fmt: skip
    file_parts = [{"type": "image", "path": "pictures/4.png"}, {"type": "input_image", "image_url": f"file://{pictures}/5.png"}]
    markers = [{"type": "image"}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "A thing."}
    path = lines(
        tmp_path / "all.jsonl",
        {"id": 1, "image": "pictures/0.png", "conversations": TURNS},
        {"image": ["pictures/0.png", "pictures/1.png"], "conversations": two},
        {"images": ["pictures/1.png"], "messages": [{"role": "user", "content": "What? <image>"}, answer]},
        {"messages": [{"role": "user", "content": parts}, answer]},
        {"messages": [{"role": "user", "content": file_parts}, answer]},
        {
            "messages": [{"role": "user", "content": markers}, answer],
            "images": [{"path": str(pictures / "3.png"), "bytes": None}],
        },
        {"image": "pictures/3.png", "caption": "A caption."},
        {"image": "pictures/3.png", "question": "Which?", "answer": "This."},
        {"question": "Text?", "answer": "Alone."},
        {"image": None, "conversations": [{"from": "human", "value": "Text?"}, {"from": "gpt", "value": "Alone."}]},
    )
    d = DATA
    assert read(path, sense) == [
        (["<image>\nWhat?", "A thing."], [d[0]]),
        (["<image><image>Which?", "A thing."], [d[0], d[1]]),
        (["What? <image>", "A thing."], [d[1]]),
        (["Look: <image>\nWhat?", "A thing."], [d[2]]),
        (["<image>\n<image>\n", "A thing."], [d[4], d[5]]),
        (["<image>\nWhat?", "A thing."], [d[3]]),
        (["<image>", "A caption."], [d[3]]),
        (["<image>\nWhich?", "This."], [d[3]]),
        (["Text?", "Alone."], []),
        (["Text?", "Alone."], []),
    ]
    moved = lines(tmp_path / "moved.jsonl", {"picture": "2.png", "conversations": TURNS})
    assert read(moved, sense, pictures, {"image": "picture"})[0][1] == [DATA[2]]


def shard(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_shards(tmp_path, sense):
    path = shard(
        tmp_path / "a.tar",
        ("000.png", DATA[0]), ("000.json", json.dumps({"conversations": TURNS, "image": "x/y.png"}).encode()),
        ("dir/001.jpg", DATA[1]), ("dir/001.txt", b"A caption.\n"),
        ("002.json", json.dumps({"question": "Which?", "answers": ["This.", "That."]}).encode()), ("002.png", DATA[2]),
        ("003.1.png", DATA[3]), ("003.2.png", DATA[4]), ("003.json", json.dumps([{**TURNS[0], "value": "<image><image>?"}, TURNS[1]]).encode()),  # noqa: E501
    )  # fmt: skip
    assert read(path, sense) == [
        (["<image>\nWhat?", "A thing."], [DATA[0]]),
        (["<image>", "A caption."], [DATA[1]]),
        (["<image>\nWhich?", "This."], [DATA[2]]),
        (["<image><image>?", "A thing."], [DATA[3], DATA[4]]),
    ]
    import webdataset

    groups = [(name, {s: d.data for s, d in members.items()}) for name, members in shards._groups(path)]
    assert groups == [
        (sample["__key__"], {s: d for s, d in sample.items() if not s.startswith("__")})
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="a.tar: not a whole tar file"):
        read(path, sense)
    path.write_bytes(b"no tar")
    with pytest.raises(UserError, match="a.tar: not a whole tar file"):
        read(path, sense)
    lines(tmp_path / "b.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(UserError, match="shards and other files .b.jsonl. together"):
        read(tmp_path, sense)


def test_energon_data_sets(tmp_path, sense):
    """As Energon's own preparation describes them, with shards in a folder below."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    (tmp_path / "sub").mkdir()
    names = [f"sub/part{number}.tar" for number in range(4)]
    for number, name in enumerate(names):
        facts = {"say": {"ask": f"Which {number}?", "all": ["This.", "That."]}}
        members = [("0.jpg", DATA[number]), ("0.json", json.dumps(facts).encode()), ("0.txt", b"x")]
        shard(tmp_path / name, *members, *((f"1{key[1:]}", data) for key, data in members))
    WebdatasetPreparator.prepare_dataset(tmp_path, names, split_parts_ratio=[("train", 0.5), ("val", 0.5)], workers=1)
    meta = tmp_path / ".nv-meta"
    (meta / "dataset.yaml").write_text(
        "__class__: VQAWebdataset\nfield_map:\n  image: png,jpg\n  context: json[say][ask]\n  answers: json[say][all]\n"
    )
    split = yaml.safe_load((meta / "split.yaml").read_text())
    numbers = sorted(names.index(name) for name in split["split_parts"]["train"])
    assert len(numbers) == 2
    expected = [([f"<image>\nWhich {number}?", "This."], [DATA[number]]) for number in numbers for _ in range(2)]
    assert read(tmp_path, sense) == expected

    (source,) = parse(str(tmp_path), MEDIA)
    key = Reader({}, (sense,)).key(source)
    split["exclude"] = [names[numbers[0]], f"{names[numbers[1]]}/1"]
    (meta / "split.yaml").write_text(yaml.safe_dump(split))
    shards._excluded.cache_clear()
    assert read(tmp_path, sense) == expected[2:3] and Reader({}, (sense,)).key(source) != key


def test_parquet_with_bytes(tmp_path, sense):
    rows = [
        {"image": {"bytes": DATA[i], "path": "x"}, "pair": [DATA[i], DATA[i - 1]], "question": f"Which {i}?", "answer": "This."}
        for i in range(6)
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    found = read(path, sense)
    assert found == [([f"<image>\nWhich {i}?", "This."], [DATA[i]]) for i in range(6)]
    pairs = read(path, sense, columns={"images": "pair"})
    assert [media for _, media in pairs] == [[DATA[i], DATA[i - 1]] for i in range(6)]
    assert not (tmp_path / "inline.bin").exists()  # read where they lie


BAD = [
    ({"image": "pictures/9.png", "conversations": TURNS}, r"image 1: .*pictures/9.png: no such file"),
    ({"image": ["pictures/0.png"] * 2, "conversations": TURNS}, "2 images for 1 <image> in the text: one for each is needed"),
    ({"conversations": TURNS}, "0 images for 1 <image> in the text"),
    ({"image": "pictures/0.png", "conversations": [{**TURNS[0], "value": "What?"}, TURNS[1]]}, "1 image for 0 <image>"),
    ({"image": "pictures/bad.png", "conversations": TURNS}, r"image 1: .*bad.png: a broken image: .*truncated"),
    ({"image": "pictures/page.png", "conversations": TURNS}, r"image 1: .*page.png: not an image of a known kind"),
    ({"image": "https://example.org/a.png", "conversations": TURNS}, "image 1: https://example.org/a.png: only local files"),
    ({"image": "data:image/png;base64,@@@", "conversations": TURNS}, "image 1: a data: URL whose data is not base64"),
    ({"image": 5, "conversations": TURNS}, "image 1: neither a path nor bytes, but a int"),
    ({"audio": "a.wav", "conversations": [{**TURNS[0], "value": "<audio>"}, TURNS[1]]}, "sound 1: the model has no sense"),
    ({"image": "pictures/0.png", "other": 1}, "unknown format of conversation"),
    (
        {"image": "pictures/0.png", "messages": [{"role": "user", "content": [{"type": "image", "path": "pictures/1.png"}]}]},
        "images both in the turns and in a field beside them",
    ),
]  # fmt: skip


def test_bad_samples_are_named_and_counted_or_fatal(tmp_path, pictures, sense, tokenizer):
    (pictures / "bad.png").write_bytes(DATA[0][:100])
    (pictures / "page.png").write_text("<html>")
    good = [{"image": f"pictures/{i}.png", "conversations": TURNS} for i in range(3)]
    for number, (record, says) in enumerate(BAD):
        path = lines(tmp_path / f"{number}.jsonl", good[0], record)
        with pytest.raises(UserError, match=rf"{number}.jsonl, line 2: {says}") as error:
            prepare(parse(str(path), MEDIA), tokenizer, tmp_path / "cache", Settings(128), [sense], heldout=0)
        assert "\n" not in str(error.value)
    path = lines(tmp_path / "all.jsonl", *good, *(record for record, _ in BAD))
    corpus = prepare(parse(str(path), MEDIA), tokenizer, tmp_path / "cache", Settings(128), [sense], heldout=0, skip_bad=True)
    (source,) = corpus.sources
    assert source.counts["bad"] == len(BAD) and source.counts["with images"] == source.counts["images"] == 3
    assert corpus.train_documents == 3
    assert "all.jsonl, line 4: image 1:" in source.unreadable[0]
    report = "\n".join(corpus.report())
    assert f"{len(BAD)} skipped as unreadable" in report and "line 4: image 1:" in report and "unreadable.txt" in report
    named = (tmp_path / "cache" / source.key / "unreadable.txt").read_text().splitlines()
    assert [int(line.partition("line ")[2].partition(":")[0]) for line in named] == [4 + i for i in range(len(BAD))]


def test_placeholders_are_expanded_in_place_and_never_learnt(tmp_path, pictures, tokenizer):
    """Against the ids of the same text without images."""
    from transformers import AutoTokenizer

    source = vision(tokenizer, grids=((28, 56), (56, 56)))
    placeholder = token_id(tokenizer, "<image>")
    turns = [
        {"role": "user", "content": "First <image> then <image>!"},
        {"role": "assistant", "content": "Here <image> is more."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
    path = lines(tmp_path / "a.jsonl", {"messages": turns, "images": [f"pictures/{i}.png" for i in (0, 3, 5)]})
    for train_on in ("assistant", "all"):
        settings = Settings(512, train_on=train_on)
        corpus = prepare(parse(str(path), MEDIA), tokenizer, tmp_path / "cache", settings, [source], heldout=0)
        ((ids, weights, media),) = Samples(corpus.sources[0].train_prefix)
        text = "<s>" + "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns)
        plain = AutoTokenizer.from_pretrained(tokenizer)(text, add_special_tokens=False).input_ids
        counts = iter([m.tokens for m in media])
        expected = [each for token in plain for each in [token] * (next(counts) if token == placeholder else 1)]
        assert ids.tolist() == expected and [m.tokens for m in media] == [len(source.gather(m.shape)) for m in media]
        assert not weights[ids == placeholder].any() and len(media) == 3
        words = AutoTokenizer.from_pretrained(tokenizer).decode(ids[weights > 0])
        assert words == ("Here  is more.<|im_end|>No.<|im_end|>" if train_on == "assistant" else text.replace("<image>", ""))
    # what does not fit goes turn by turn, counted with all its placeholders
    first = next(i for i in range(len(ids)) if ids[: i + 1].tolist().count(token_id(tokenizer, "<|im_end|>")) == 2)
    corpus = prepare(parse(str(path), MEDIA), tokenizer, tmp_path / "cache", Settings(first + 4), [source], heldout=0)
    ((shorter, _, media),) = Samples(corpus.sources[0].train_prefix)
    assert len(media) == 3 and shorter.tolist() == ids[: len(shorter)].tolist() and corpus.sources[0].counts["truncated"] == 1


def test_the_placeholder_as_text_is_refused(tmp_path, sense, tokenizer):
    path = lines(tmp_path / "a.jsonl", {"question": "What is <|sound|>?", "answer": "A token."})
    sound = vision(tokenizer)
    object.__setattr__(sound.sense, "token_id", token_id(tokenizer, "<|sound|>"))
    with pytest.raises(UserError, match="line 1: the text has 1 placeholders of images and sounds for 0 of them"):
        prepare(parse(str(path), MEDIA), tokenizer, tmp_path / "cache", Settings(128), [sound], heldout=0)
    object.__setattr__(sound.sense, "token_id", 400)
    with pytest.raises(UserError, match="placeholder of vision, token 400, is not an added token"):
        prepare(parse(str(path), MEDIA), tokenizer, tmp_path / "cache", Settings(128), [sound], heldout=0)


def test_conversations_about_an_image_stay_on_one_side(tmp_path, pictures, sense, tokenizer):
    """Whatever the format and wherever it lies; and what is inline is kept beside the samples."""
    many = [encoded(picture(i, 20, 20)) for i in range(40)]
    rows = [{"image": url(data), "question": f"{q} {i}?", "answer": "x"} for i, data in enumerate(many) for q in ("What", "Why")]
    lines(tmp_path / "a.jsonl", *rows)
    table = [{"image": data, "conversations": TURNS} for data in many]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "b.parquet")
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    corpus = prepare(parse(both, MEDIA), tokenizer, tmp_path / "cache", Settings(128), [sense], heldout=0.3)
    held = [[m.location.read() for _, _, media in Samples(s.heldout_prefix) for m in media] for s in corpus.sources]
    assert len(held[0]) == 2 * len(held[1]) and set(held[0]) == set(held[1]) and 4 < len(held[1]) < 25
    train = [m.location.read() for s in corpus.sources for _, _, media in Samples(s.train_prefix) for m in media]
    assert not set(train) & set(held[0]) and len(train) + len(held[0]) + len(held[1]) == 120


def test_workers_and_resumed_preparation_give_the_same(tmp_path, pictures, sense, tokenizer, monkeypatch):
    from nemo_ext.data.multimodal import records

    rows = [{"image": url(DATA[i % 6]), "conversations": [{**TURNS[0], "value": f"<image> {i}"}, TURNS[1]]} for i in range(30)]
    path = lines(tmp_path / "a.jsonl", *rows)
    monkeypatch.setattr(records, "PIECE_BYTES", 3000)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(parse(str(path), MEDIA), tokenizer, tmp_path / "one", Settings(128), [sense], progress=interrupt)
    corpora = [prepare(parse(str(path), MEDIA), tokenizer, tmp_path / name, Settings(128), [sense]) for name in ("one", "two")]
    found = [
        [(ids.tolist(), [m.location.read() for m in media]) for ids, _, media in Samples(c.sources[0].train_prefix)]
        for c in corpora
    ]
    assert found[0] == found[1] and len(list((tmp_path / "one").glob("*/inline-*.bin"))) > 2
    assert np.load(corpora[0].sources[0].train_prefix + ".extra.starts.npy").shape == (corpora[0].train_documents + 1,)
    other = vision(tokenizer, downsample=2)
    again = prepare(parse(str(path), MEDIA), tokenizer, tmp_path / "one", Settings(128), [other])
    assert again.key != corpora[0].key and again.train_tokens < corpora[0].train_tokens


def test_two_corpora_as_two_sides(tmp_path, pictures, sense, tokenizer):
    made = [
        prepare(
            parse(str(lines(tmp_path / f"{i}.jsonl", {"image": f"pictures/{i}.png", "conversations": TURNS})), MEDIA),
            tokenizer, tmp_path / "cache", Settings(128), [sense], heldout=0,
        )
        for i in range(2)
    ]  # fmt: skip
    both = with_heldout(*made)
    assert both.blend() == [[None, made[0].sources[0].train_prefix, made[1].sources[0].train_prefix]]
    assert both.heldout_documents == 1 and both.train_tokens == made[0].train_tokens


def test_data_sets_with_image_features(tmp_path, sense):
    """As `save_to_disk` writes them: bytes are handed on as they are, and kept beside the samples."""
    import datasets

    pairs = [[DATA[i], DATA[i + 1]] for i in range(3)]
    features = {"image": datasets.Image(), "pair": datasets.Sequence(datasets.Image())}
    features |= {name: datasets.Value("string") for name in ("question", "answer")}
    table = {"image": [{"bytes": v, "path": None} for v in DATA[:3]], "question": list("abc"), "answer": list("xyz")}
    table["pair"] = [[{"bytes": v, "path": None} for v in pair] for pair in pairs]
    datasets.Dataset.from_dict(table, features=datasets.Features(features)).save_to_disk(tmp_path / "set")
    for columns, expected in (({}, [[d] for d in DATA[:3]]), ({"images": "pair"}, pairs)):
        reader = Reader(columns, (sense,))
        (source,) = parse(str(tmp_path / "set"), MEDIA)
        found = [
            parsed().media for block in reader.plan(source) for _, parsed in reader.conversations(block, tmp_path / "inline.bin")
        ]
        assert [[m.location.below(tmp_path).read() for m in media] for media in found] == expected


def test_the_preview_shows_a_placeholder_once(tmp_path, pictures, sense, tokenizer):
    from rich.console import Console

    from nemo_ext.data.multimodal.store import show

    path = lines(tmp_path / "a.jsonl", {"image": url(DATA[0]), "conversations": TURNS})
    console = Console(file=io.StringIO(), width=200)
    show(parse(str(path), MEDIA), tokenizer, tmp_path / "cache", Settings(128), [sense], console=console)
    printed = console.file.getvalue()
    assert printed.count("<image>") == 1 and "A thing.<|im_end|>" in printed and "format sharegpt" in printed
