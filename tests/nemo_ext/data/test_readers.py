import gzip
import json

import pytest

from nemo_ext.data import readers
from nemo_ext.data.readers import batches, plan
from nemo_ext.data.sources import parse
from nemo_ext.errors import UserError


def read(data, text_key="text"):
    return [
        text for source in parse(data) for block in plan(source, text_key) for batch in batches(block, text_key) for text in batch
    ]


def compress(path, data):
    import zstandard

    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]))  # two members
    elif path.suffix == ".zst":
        half = len(data) // 2
        path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])))  # two frames
    else:
        path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("block", [1, 7, 100, 1 << 20])
def test_lines_are_the_same_however_they_are_cut(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    texts = [f"text {i} \n é हि" * (i % 4 + 1) for i in range(40)]
    data = "\n".join(json.dumps({"text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)).encode() + b"\n\n  \n"
    assert read(compress(tmp_path / f"f.jsonl{suffix}", data)) == texts
    assert read(compress(tmp_path / f"g.jsonl{suffix}", data.rstrip())) == texts


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_a_document(tmp_path, suffix):
    text = "# Title\r\n\n  भारत 🎉\n"
    assert read(compress(tmp_path / f"f.md{suffix}", text.encode())) == [text]


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "f.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "f.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n{"text": "d"}\n')
    assert read(str(tmp_path / "f.txt")) == ["abc"]
    assert read(str(tmp_path / "f.jsonl")) == ["abc", "d"]


def test_parquet_and_data_sets(tmp_path, monkeypatch):
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(readers, "BLOCK_ROWS", 7)
    texts = [f"row {i} ಕನ್ನಡ" for i in range(50)]
    table = pyarrow.table({"id": list(range(50)), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet", row_group_size=20)
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(tmp_path / "d")
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"body": texts[:9]}), test=datasets.Dataset.from_dict({"body": ["x"]})
    ).save_to_disk(tmp_path / "e")
    assert read(str(tmp_path / "f.parquet"), "body") == texts
    assert read(str(tmp_path / "d"), "body") == texts
    assert read(str(tmp_path / "e"), "body") == texts[:9]
    for name in ("f.parquet", "d"):
        with pytest.raises(UserError, match='no column "text": the columns are .*body'):
            read(str(tmp_path / name))


def test_empty_files_count_only_when_named(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("b")
    assert read(str(tmp_path)) == ["b"]
    with pytest.raises(UserError, match="a.txt: the file is empty"):
        read(str(tmp_path / "a.txt"))


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("f.txt", b"one\ntwo\nthr\xffee", "f.txt, line 3: byte 0xff is not UTF-8"),
        ("f.jsonl", GOOD * 3 + b'{"text": "x"\n', "f.jsonl, line 4: not JSON"),
        ("f.jsonl", GOOD * 3 + b'{"body": "x", "id": 1}\n', 'line 4: no "text": the keys are body, id'),
        ("f.jsonl", GOOD + b'{"text": null}\n', 'line 2: "text" is null, not a string'),
        ("f.jsonl", GOOD + b'["x"]\n', "line 2: a list instead of an object"),
        ("f.jsonl", GOOD + b'{"text": "\xff"}\n', "f.jsonl, line 2: byte 0xff is not UTF-8"),
        ("f.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-9], "cannot be decompressed"),
        ("f.jsonl.gz", b"not gzip", "cannot be decompressed"),
        ("f.jsonl.zst", b"not zstd", "cannot be decompressed"),
        ("f.jsonl.gz", gzip.compress(GOOD * 9 + b"{", mtime=0), "line 10: not JSON"),
        ("f.parquet", b"PAR1 no", "not a Parquet file"),
    ],
)
@pytest.mark.parametrize("block", [20, 1 << 20])
def test_bad_input_is_named(tmp_path, monkeypatch, name, data, says, block):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read(str(tmp_path / name))
    assert says in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_a_named_data_set_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'no/such' on the Hub\ndetails")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="data=hf:no/such: the data set cannot be loaded: Couldn't reach 'no/such' on the Hub$"):
        read("hf:no/such")
