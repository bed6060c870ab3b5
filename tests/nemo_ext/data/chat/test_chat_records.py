import gzip
import json
import pickle

import pytest

from nemo_ext.data import readers
from nemo_ext.data.chat import records
from nemo_ext.data.sources import RECORDS, parse
from nemo_ext.errors import UserError

ROWS = [{"question": f'q{i}\nline, "é" {"x" * i}', "answer": str(i)} for i in range(30)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(folder, name):
    path = folder / name
    if name.endswith((".csv", ".tsv")):
        import csv

        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"], delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7)
    elif name == "data":
        import datasets

        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        text = json.dumps(ROWS, indent=1) if name.startswith("array") else LINES
        data = text.encode()
        if name.endswith(".zst"):
            import zstandard

            data = zstandard.ZstdCompressor().compress(data)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def read(data):
    blocks = [pickle.loads(pickle.dumps(block)) for source in parse(data, RECORDS) for block in records.plan(source)]
    return [pair for block in blocks for pair in records.records(block)]


NAMES = [
    "a.jsonl",
    "a.jsonl.gz",
    "a.jsonl.zst",
    "array.json",
    "array.json.gz",
    "lines.json",
    "a.csv",
    "a.tsv",
    "a.parquet",
    "data",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [40, 1 << 20])
def test_every_file_gives_the_records_and_their_places(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    monkeypatch.setattr(records, "BLOCK_ROWS", 4)
    path = write(tmp_path, name)
    pairs = read(str(path))
    assert [record for _, record in pairs] == ROWS
    what = {"parquet": "row 3", "data": "row 3", "csv": "line 8", "tsv": "line 8", "lines.json": "line 4", "array": "record 4"}
    expected = next((text for key, text in what.items() if key in name), "line 4")
    assert str(pairs[3][0]) == f"{path}, {expected}"  # a question of two lines takes two of a CSV file


def test_folders_and_globs(tmp_path):
    for name in ("a.jsonl", "b.csv", "array.json"):
        write(tmp_path, name)
    (tmp_path / "README.md").write_text("not data")
    assert len(read(str(tmp_path))) == len(read(str(tmp_path / "*"))) == 90
    assert len(read([str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")])) == 60


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("f.jsonl", '{"a": 1}\n\n{"a": \n', "f.jsonl, line 3: not JSON"),
        ("f.jsonl", '{"a": 1}\n["x"]\n', "f.jsonl, line 2: a list instead of an object"),
        ("f.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "f.jsonl, line 2: byte 0xff is not UTF-8"),
        ("f.json", '[{"a": 1},\n {"a": }]', "f.json, line 2: not JSON"),
        ("f.json", '{"a": 1}\n{"a": }', "f.json, line 2: not JSON"),
        ("f.json", "[1]", "f.json, record 1: a int instead of an object"),
        ("f.csv", "a,b\n1,2\n3\n", "f.csv, line 3: 1 fields where the first line names 2"),
        ("f.csv", 'a,b\n1,"2" x\n', "f.csv, line 2: not CSV"),
        ("f.parquet", "x", "not a Parquet file"),
        ("f.jsonl.gz", "x", "cannot be decompressed"),
        ("f.txt", "x", "unknown type of file: .jsonl, .json, .csv or .tsv"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read(str(tmp_path / name))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_python_docs_are_no_conversations():
    with pytest.raises(UserError, match="python-docs: not a source of conversations"):
        read("python-docs")
