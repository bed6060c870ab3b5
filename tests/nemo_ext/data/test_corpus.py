import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpus_texts import die

from nemo_ext.data import corpus as corpus_module
from nemo_ext.data import encoder as encoder_module
from nemo_ext.data import readers
from nemo_ext.data.corpus import Corpus, prepare
from nemo_ext.data.sources import parse
from nemo_ext.errors import RunError, UserError

ROOT = Path(__file__).parents[3]


def documents_of(prefix):
    """The documents of an indexed dataset, read with Megatron's own reader."""
    from nemo_ext import platform

    platform.activate()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


def hugging_face_ids(tokenizer_dir, texts):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|eos|>")
    return [e.ids + [eos] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def files_of(corpus: Corpus):
    prefixes = [p for s in corpus.sources for p in (s.train_prefix, s.heldout_prefix) if p]
    return [Path(f"{prefix}{suffix}").read_bytes() for prefix in prefixes for suffix in (".bin", ".idx")]


@pytest.mark.parametrize("vocab_size", [900, 70_000])
def test_files_equal_megatrons_builder(tmp_path, tokenizer_dir, jsonl, documents, monkeypatch, vocab_size):
    import torch

    from nemo_ext import platform

    platform.activate()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    if vocab_size > 65_500:
        monkeypatch.setattr(encoder_module.Encoder, "vocab_size", vocab_size)
    corpus = prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", heldout=0, seq_length=64, workers=1)
    dtype = DType.optimal_dtype(vocab_size)
    assert corpus.dtype == np.dtype(dtype).name == ("uint16" if vocab_size == 900 else "int32")
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    expected = hugging_face_ids(tokenizer_dir, documents)
    for ids in expected:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    assert files_of(corpus) == [(tmp_path / "m.bin").read_bytes(), (tmp_path / "m.idx").read_bytes()]
    assert (corpus.train_tokens, corpus.train_documents) == (sum(map(len, expected)), 600)
    assert corpus.heldout_tokens == 0 and corpus.sources[0].heldout_prefix is None


def test_split_by_document(tmp_path, tokenizer_dir, jsonl, documents):
    corpus = prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", heldout=0.2, seq_length=64, workers=1)
    (source,) = corpus.sources
    train, held = documents_of(source.train_prefix), documents_of(source.heldout_prefix)
    whole = {tuple(ids): i for i, ids in enumerate(hugging_face_ids(tokenizer_dir, documents))}
    order = [whole[tuple(ids)] for ids in train], [whole[tuple(ids)] for ids in held]
    assert sorted(order[0] + order[1]) == list(range(600))  # every document whole, once
    assert order[0] == sorted(order[0]) and order[1] == sorted(order[1])  # in reading order
    assert 80 < len(held) < 160
    assert (source.train_documents, source.heldout_documents) == (len(train), len(held))
    assert (source.train_tokens, source.heldout_tokens) == (sum(map(len, train)), sum(map(len, held)))
    other = prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", heldout=0.2, seed=1, seq_length=64, workers=1)
    assert {tuple(d) for d in documents_of(other.sources[0].heldout_prefix)} != {tuple(d) for d in held}


def test_the_same_text_is_on_one_side_everywhere(tmp_path, tokenizer_dir, documents):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents[:300] * 2))
    (tmp_path / "b").mkdir()
    for i in range(200, 400):
        (tmp_path / "b" / f"{i}.txt").write_text(documents[i])
    data = [str(tmp_path / "a.jsonl"), str(tmp_path / "b")]
    corpus = prepare(parse(data), tokenizer_dir, tmp_path / "cache", heldout=0.3, seq_length=64, workers=1)
    train = {tuple(d) for s in corpus.sources for d in documents_of(s.train_prefix)}
    held = {tuple(d) for s in corpus.sources for d in documents_of(s.heldout_prefix)}
    assert not train & held and len(train | held) == 400
    assert corpus.train_documents + corpus.heldout_documents == 800


@pytest.mark.parametrize("seed", range(8))
def test_few_documents(tmp_path, tokenizer_dir, documents, seed):
    """One document at least is held out, every source keeps one, copies stay together."""
    (tmp_path / "one.txt").write_text(documents[0] * 3)
    (tmp_path / "three.jsonl").write_text(
        "".join(json.dumps({"text": d}) + "\n" for d in [documents[1], documents[2], documents[1]])
    )
    data = [str(tmp_path / "one.txt"), str(tmp_path / "three.jsonl")]
    for share in (0.001, 0.999):
        corpus = prepare(parse(data), tokenizer_dir, tmp_path / "cache", heldout=share, seed=seed, seq_length=4, workers=1)
        one, three = corpus.sources
        assert (one.train_documents, one.heldout_documents, one.heldout_prefix) == (1, 0, None)
        assert (three.train_documents, three.heldout_documents) in ((1, 2), (2, 1))
        again = prepare(parse(data), tokenizer_dir, tmp_path / "cache", heldout=share, seed=seed, seq_length=4, workers=1)
        assert again == corpus


def test_a_single_document_cannot_be_split(tmp_path, tokenizer_dir, documents):
    (tmp_path / "one.txt").write_text(" ".join(documents))
    with pytest.raises(UserError, match="documents are never split .* give more documents .* or heldout=0"):
        prepare(parse(str(tmp_path / "one.txt")), tokenizer_dir, tmp_path / "cache", seq_length=16, workers=1)
    corpus = prepare(parse(str(tmp_path / "one.txt")), tokenizer_dir, tmp_path / "cache", heldout=0, seq_length=16, workers=1)
    assert corpus.train_documents == 1 and corpus.heldout_documents == 0


def test_the_result_does_not_depend_on_workers_or_compression(tmp_path, tokenizer_dir, jsonl, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(corpus_module, "IN_PROCESS_BYTES", 0)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    seen = []
    results = [
        files_of(
            prepare(
                parse(str(data)),
                tokenizer_dir,
                tmp_path / f"c{i}",
                heldout=0.1,
                seq_length=64,
                workers=workers,
                progress=lambda done, total: seen.append((done, total)),
            )
        )
        for i, (data, workers) in enumerate([(jsonl, 1), (jsonl, 3), (packed, 2)])
    ]
    assert results[0] == results[1] == results[2]
    assert len(seen) > 20 and all(0 < done <= total for done, total in seen)
    assert {total for _, total in seen} == {jsonl.stat().st_size, packed.stat().st_size}


def test_the_cache_goes_by_content(tmp_path, tokenizer_dir, jsonl, monkeypatch):
    def run(data=jsonl, **settings):
        return prepare(parse(str(data)), tokenizer_dir, tmp_path / "cache", **{"seq_length": 64, "workers": 1, **settings})

    os.utime(jsonl, (time.time() - 60,) * 2)
    corpus = run()
    work = []
    monkeypatch.setattr(corpus_module, "_write", lambda *a: work.append(a) or 1 / 0)
    monkeypatch.setattr(encoder_module.Encoder, "_prove_fast", lambda self: 1 / 0)
    assert run() == corpus
    moved = jsonl.rename(tmp_path / "moved.jsonl")
    assert [s.key for s in run(moved).sources] == [s.key for s in corpus.sources]
    assert run(moved, seq_length=32).key == corpus.key
    for changed in ({"heldout": 0.1}, {"seed": 5}, {"text_key": "body"}):
        with pytest.raises(ZeroDivisionError):
            run(moved, **changed)
    text = moved.read_text()
    moved.write_text(text[:-4] + "!" + text[-3:])  # the same size, just now
    with pytest.raises(ZeroDivisionError):
        run(moved)
    assert len(work) == 4


def test_weights_and_totals(tmp_path, tokenizer_dir, jsonl, documents):
    (tmp_path / "few.txt").write_text(documents[0] * 5)
    plain = prepare(parse([str(jsonl), str(tmp_path / "few.txt")]), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=1)
    assert [row[0] for row in plain.blend()] == [s.train_tokens for s in plain.sources]
    weighted = prepare(
        parse([f"{jsonl}:0.7", f"{tmp_path / 'few.txt'}:0.3"]), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=1
    )
    assert [row[0] for row in weighted.blend()] == [0.7, 0.3]
    assert weighted.key != plain.key and [s.key for s in weighted.sources] == [s.key for s in plain.sources]
    assert Corpus.from_json(plain.to_json()) == plain
    assert json.loads(plain.to_json())["train_tokens"] == sum(s.train_tokens for s in plain.sources)


def test_python_docs(tmp_path, tokenizer_dir, monkeypatch):
    from nemo_ext.data import stdlib_docs

    monkeypatch.setattr(
        stdlib_docs, "documents", lambda: ((f"topic {i}", f"Topic {i}: " + "words and more words " * 40) for i in range(50))
    )
    corpus = prepare(parse("python-docs"), tokenizer_dir, tmp_path / "cache", heldout=0.1, seq_length=64, workers=1)
    assert corpus.sources[0].name == "python-docs" and corpus.train_documents + corpus.heldout_documents == 50


def test_the_reference_takes_over_from_an_engine_that_differs(tmp_path, tokenizer_dir, jsonl, monkeypatch):
    expected = files_of(prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "a", seq_length=64, workers=1, engine="tokenizers"))
    right = encoder_module.Encoder._encode_fast
    monkeypatch.setattr(
        encoder_module.Encoder, "_encode_fast", lambda self, texts: (right(self, texts)[0] + 1, right(self, texts)[1])
    )
    corpus = prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "b", seq_length=64, workers=1)
    assert files_of(corpus) == expected
    assert corpus.encoder.startswith("tokenizers (fastokens differs from tokenizers on the text that begins 'Document")


# Interruptions


def start(jsonl, tokenizer_dir, cache, workers=2):
    command = [
        sys.executable,
        str(Path(__file__).with_name("prepare_worker.py")),
        str(jsonl),
        str(tokenizer_dir),
        str(cache),
        str(workers),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            pass
    return found


def test_killed_in_the_middle(tmp_path, tokenizer_dir, jsonl):
    jsonl.write_text(jsonl.read_text() * 8)
    cache = tmp_path / "cache"
    process = start(jsonl, tokenizer_dir, cache)
    for _ in range(8):
        assert process.stdout.readline().startswith("progress")
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [p for p in cache.iterdir() if p.is_dir() and not p.name.endswith(".partial")]
    (partial,) = cache.glob("*.partial")
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("*.npz")}
    assert len(finished) >= 8
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers outlived their parent"
    output = start(jsonl, tokenizer_dir, cache).communicate()[0]
    resumed = Corpus.from_json(output[output.index("{") :])
    whole = start(jsonl, tokenizer_dir, tmp_path / "other").communicate()[0]
    assert files_of(resumed) == files_of(Corpus.from_json(whole[whole.index("{") :]))
    assert not list(cache.glob("*.partial")) and not list(cache.glob("*.lock"))


def test_two_builders_at_once(tmp_path, tokenizer_dir, jsonl):
    outputs = [p.communicate()[0] for p in [start(jsonl, tokenizer_dir, tmp_path / "cache", 1) for _ in range(2)]]
    first, second = (Corpus.from_json(o[o.index("{") :]) for o in outputs)
    assert first == second and documents_of(first.sources[0].train_prefix)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_worker_that_dies(tmp_path, tokenizer_dir, jsonl, monkeypatch):
    monkeypatch.setattr(corpus_module, "IN_PROCESS_BYTES", 0)
    monkeypatch.setattr(corpus_module, "_encode_block", die)
    with pytest.raises(RunError, match="a process that tokenises was killed"):
        prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=2)


# Bad input


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_leave_nothing(tmp_path, tokenizer_dir, jsonl, monkeypatch, workers):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(corpus_module, "IN_PROCESS_BYTES", 0)
    with open(jsonl, "a") as file:
        file.write('{"text": "x"\n')
    with pytest.raises(UserError, match="documents.jsonl, line 601: not JSON"):
        prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=workers)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seq_length": 10_000_000}, "tokens for training are less than one sequence of 10000000"),
        ({"seq_length": 20_000}, "held-out tokens are less than one sequence of 20000 .* a larger heldout= .now 0.02"),
        ({"heldout": 1.5}, "heldout=1.5: a share"),
        ({"text_key": "body"}, 'line 1: no "body": the keys are id, text; choose one with text_key='),
    ],
)
def test_refusals(tmp_path, tokenizer_dir, jsonl, settings, says):
    with pytest.raises(UserError, match=says):
        prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", **{"seq_length": 64, "workers": 1, **settings})


def test_text_that_is_not_there(tmp_path, tokenizer_dir):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty.jsonl: the file is empty"):
        prepare(parse(str(tmp_path / "empty.jsonl")), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=1)
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(UserError, match="no text in it"):
        prepare(parse(str(tmp_path / "blank.jsonl")), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=1)
    (tmp_path / "half.jsonl").write_text('{"text": "ok \\ud800"}\n')
    with pytest.raises(UserError, match="half.jsonl: half of a surrogate pair"):
        prepare(parse(str(tmp_path / "half.jsonl")), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=1)


def test_full_disks_and_bad_folders(tmp_path, tokenizer_dir, jsonl, monkeypatch):
    import errno
    import shutil

    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(real)(real.total, real.total, 1000))
    with pytest.raises(UserError, match="0.0 GB free, and up to .* are needed to tokenise"):
        prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=1)
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus_module, "write_index", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="documents.jsonl: (File exists|Not a directory)"):
        prepare(parse(str(jsonl)), tokenizer_dir, jsonl, seq_length=64, workers=1)
    corpus = prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", seq_length=64, workers=1)
    assert dataclasses.asdict(corpus)["train_documents"] > 500
