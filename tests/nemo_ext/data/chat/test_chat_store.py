import json
import shutil

import pytest
from chat_samples import TOOLS, WITH_TOOLS, turns

from nemo_ext.data import readers
from nemo_ext.data.chat import store
from nemo_ext.data.chat.formats import parse as parse_record
from nemo_ext.data.chat.records import Reader
from nemo_ext.data.chat.render import Renderer, Settings
from nemo_ext.data.chat.store import ChatCorpus, Samples, prepare
from nemo_ext.data.sources import RECORDS, parse
from nemo_ext.errors import RunError, UserError

RECORD_COUNT = 120


def record(i):
    if i % 3 == 0:
        return {"messages": turns(f"Question {i}?", f"Answer {i}.", "And?", f"No more than {i}.")}
    if i % 3 == 1:
        return {"conversations": [{"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": f"Answer {i}."}]}
    return {"instruction": f"Question {i}?", "output": f"Answer {i}."}


@pytest.fixture()
def chat(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(record(i)) + "\n" for i in range(RECORD_COUNT)))
    return path


def run(data, folder, cache, settings=None, **arguments):
    return prepare(
        parse(data if isinstance(data, list) else str(data), RECORDS), folder, cache, settings or Settings(256), **arguments
    )


def samples_of(prefix):
    return [(ids.tolist(), weights.tolist()) for ids, weights in Samples(prefix)] if prefix else []


def files_of(corpus):
    prefixes = [p for s in corpus.sources for p in (s.train_prefix, s.heldout_prefix) if p]
    return [open(f"{p}.{kind}", "rb").read() for p in prefixes for kind in ("ids", "weights", "starts.npy")]


def test_everything_is_stored_once_in_order(tmp_path, bare, chat):
    corpus = run(chat, bare, tmp_path / "cache", heldout=0.2)
    (source,) = corpus.sources
    renderer = Renderer(bare, Settings(256))
    expected = [renderer.render(parse_record(record(i))).samples[0] for i in range(RECORD_COUNT)]
    expected = [(sample.ids.tolist(), sample.weights.tolist()) for sample in expected]
    train, held = samples_of(source.train_prefix), samples_of(source.heldout_prefix)
    assert sorted(train + held) == sorted(expected) and 10 < len(held) < 40
    assert train == [sample for sample in expected if sample in train]
    assert (corpus.train_documents, corpus.heldout_documents) == (len(train), len(held))
    assert (corpus.train_tokens, corpus.heldout_tokens) == tuple(sum(len(ids) for ids, _ in side) for side in (train, held))
    assert corpus.trained_tokens == sum(sum(map(bool, weights[1:])) for _, weights in train + held)
    formats = {name: count for name, count in source.counts.items() if name.startswith("format")}
    assert formats == {"format alpaca": 40, "format messages": 40, "format sharegpt": 40}
    assert corpus.unit == 100 and corpus.template_name == "chatml" and "<|im_start|>" in corpus.template
    assert ChatCorpus.from_json(corpus.to_json()) == corpus
    assert "120 conversations (alpaca, messages, sharegpt)" in corpus.report()[0]


def test_the_result_does_not_depend_on_workers(tmp_path, bare, chat, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2000)
    seen = []
    one = run(chat, bare, tmp_path / "a", heldout=0.1, progress=lambda done, total: seen.append((done, total)))
    monkeypatch.setattr(Reader, "in_process", 0)
    two = run(chat, bare, tmp_path / "b", heldout=0.1, workers=2)
    assert files_of(one) == files_of(two) and one.key == two.key
    assert len(seen) > 4 and seen[-1] == (chat.stat().st_size,) * 2 and [d for d, _ in seen] == sorted(d for d, _ in seen)
    monkeypatch.setattr(store, "_render_block", kill_yourself)
    with pytest.raises(RunError, match="was killed"):
        run(chat, bare, tmp_path / "c", workers=2)


def kill_yourself(job, task):
    import os

    os._exit(9)


def test_the_cache_goes_by_content_and_settings(tmp_path, bare, chat, monkeypatch):
    corpus = run(chat, bare, tmp_path / "cache")
    monkeypatch.setattr(store, "_write", lambda *a: 1 / 0)
    assert run(chat, bare, tmp_path / "cache") == corpus
    moved = shutil.copy(chat, tmp_path / "moved.jsonl")
    assert run(moved, bare, tmp_path / "cache").key == corpus.key
    for changed in (
        {"settings": Settings(255)},
        {"settings": Settings(256, template="zephyr")},
        {"settings": Settings(256, train_on="all")},
        {"heldout": 0.3},
        {"skip_bad": True},
        {"columns": {"messages": "messages"}},
    ):
        with pytest.raises((ZeroDivisionError, UserError)):
            run(moved, bare, tmp_path / "cache", **changed)
    with open(moved, "a") as file:
        file.write(json.dumps(record(1)) + "\n")
    with pytest.raises(ZeroDivisionError):
        run(moved, bare, tmp_path / "cache")


def test_an_interrupted_build_leaves_nothing_under_its_name_and_goes_on(tmp_path, bare, chat, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2000)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(chat, bare, tmp_path / "cache", progress=interrupt)
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert folder.name.endswith(".partial") and len(list(folder.glob("*.npz"))) == 1
    rendered = []
    original = Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, c: rendered.append(c) or original(self, c))
    corpus = run(chat, bare, tmp_path / "cache")
    assert 0 < len(rendered) < RECORD_COUNT
    assert files_of(corpus) == files_of(run(chat, bare, tmp_path / "other"))


def test_the_same_conversation_is_on_one_side_in_every_format(tmp_path, bare):
    pairs = [(f"Question {i}?", f"Answer {i}.") for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": turns(*pair)}) + "\n" for pair in pairs))
    (tmp_path / "b.csv").write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in pairs[::-1]))
    corpus = run([f"{tmp_path / 'a.jsonl'}:3", f"{tmp_path / 'b.csv'}:1"], bare, tmp_path / "cache", heldout=0.3)
    a, b = corpus.sources
    assert sorted(samples_of(a.heldout_prefix)) == sorted(samples_of(b.heldout_prefix)) and 15 < a.heldout_documents < 45
    assert [row[0] for row in corpus.blend()] == [3.0, 1.0]


def test_what_is_left_out_is_counted(tmp_path, bare, template_files):
    masked = turns("a", "b")
    masked[1]["weight"] = 0
    rows = [
        {"messages": turns("Hi", "Hello!")},
        {"messages": turns("Hi", "Hello!", "More", "x " * 300)},
        {"messages": turns("x " * 300, "Hello!")},
        {"messages": masked},
        {"messages": WITH_TOOLS, "tools": TOOLS},
        {"messages": turns("Hi")},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    settings = Settings(250, template=str(template_files / "qwen"))
    with pytest.raises(UserError, match="chat.json, record 6: no turn of the assistant"):
        run(tmp_path / "chat.json", bare, tmp_path / "cache", settings, heldout=0)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    corpus = run(tmp_path / "chat.json", bare, tmp_path / "cache", settings, heldout=0, skip_bad=True)
    counts = corpus.sources[0].counts
    names = ("conversations", "truncated", "overlong", "masked", "bad", "with tools")
    assert [counts[name] for name in names] == [6, 1, 1, 1, 1, 1] and corpus.train_documents == 3
    line, skipped = corpus.report()
    assert skipped == f"  skipped: {tmp_path / 'chat.json'}, record 6: no turn of the assistant"
    assert (
        "1 truncated" in line and "1 dropped as too long" in line and "1 skipped as unreadable" in line and "with tools" in line
    )
    template = str(template_files / "mistral")
    with pytest.raises(UserError, match="record 5: the chat template .* refuses the conversation: Only user and assistant"):
        run(tmp_path / "chat.json", bare, tmp_path / "cache", Settings(250, template=template), heldout=0)


def test_units_of_weights(tmp_path, bare):
    rows = [turns("Hi", "Hello!", "Bye", "Now") for _ in range(3)]
    rows[0][1]["weight"], rows[1][1]["weight"] = 0.5, 0.75
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": row} for row in rows]))
    assert run(tmp_path / "chat.json", bare, tmp_path / "cache", heldout=0).unit == 25


@pytest.mark.parametrize(
    ("messages", "settings", "says"),
    [
        (None, {}, "no conversations in it"),
        (turns("x " * 100, "y"), {"seq_length": 32}, "nothing to train on: 2 of 2 conversations do not fit into seq=32"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": False}],
            {},
            "in all 2 conversations no",
        ),
    ],
)
def test_nothing_to_train_on(tmp_path, bare, messages, settings, says):
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": messages}] * 2 if messages else []))
    with pytest.raises(UserError, match=says):
        run(tmp_path / "chat.json", bare, tmp_path / "cache", Settings(**{"seq_length": 64, **settings}), heldout=0)


def test_one_conversation_cannot_be_split(tmp_path, bare):
    (tmp_path / "chat.json").write_text(json.dumps({"messages": turns("Hi", "Hello!")}))
    with pytest.raises(UserError, match="nothing can be held out"):
        run(tmp_path / "chat.json", bare, tmp_path / "cache")
    assert run(tmp_path / "chat.json", bare, tmp_path / "cache", heldout=0).train_documents == 1
    with pytest.raises(UserError, match="heldout=1.5"):
        run(tmp_path / "chat.json", bare, tmp_path / "cache", heldout=1.5)
