import json
import pickle

import numpy as np
import pytest
from chat_samples import turns

from nemo_ext import platform
from nemo_ext.data.chat.render import Settings
from nemo_ext.data.chat.store import Samples, prepare
from nemo_ext.data.sources import RECORDS, parse
from nemo_ext.errors import UserError

SEQ, GLOBAL = 128, 8


@pytest.fixture(scope="module", autouse=True)
def megatron():
    platform.activate()


def write(path, count, name="a"):
    rng = np.random.default_rng(len(name))
    rows = [turns(f"Question {name} {i}?", "word " * int(rng.integers(1, 14))) for i in range(count)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, bare):
    folder = tmp_path_factory.mktemp("corpus")
    return prepare(parse(write(folder / "a.jsonl", 150), RECORDS), bare, folder / "cache", Settings(SEQ), heldout=0.2)


class Tokenizer:
    eod = 9


class Trainer:
    global_step = 0

    def __init__(self, max_steps=20):
        self.max_steps = max_steps


def module(corpus, steps=20, **changes):
    from nemo_ext.data.chat.module import ChatDataModule

    arguments = {"seq_length": SEQ, "micro_batch_size": 2, "global_batch_size": GLOBAL, "num_workers": 0, "val_batches": 100}
    data = ChatDataModule(blend=corpus.blend(), tokenizer=Tokenizer(), **{**arguments, **changes})
    data.trainer = Trainer(steps)
    data.setup("fit")
    return data


def global_batches(data, monkeypatch, dp, count):
    """[count] lists of the rows of a global batch, whichever rank and micro batch they are in."""
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda *a, **k: dp)
    iterators = []
    for rank in range(dp):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda *a, rank=rank, **k: rank)
        iterators.append(iter(data.data_sampler.transform_dataloader(data.train_dataloader())))
    batches = []
    for _ in range(count):
        rows = []
        for _ in range(GLOBAL // data.micro_batch_size // dp):
            for iterator in iterators:
                rows += next(iterator)["tokens"].tolist()
        batches.append(rows)
    return batches


@pytest.mark.parametrize("pack", [True, False])
def test_the_order_is_the_same_in_every_layout_after_a_resume_and_in_longer_runs(corpus, monkeypatch, pack):
    expected = global_batches(module(corpus, pack=pack), monkeypatch, 1, 20)
    for dp, micro in ((2, 2), (4, 1), (1, 8)):
        assert global_batches(module(corpus, pack=pack, micro_batch_size=micro), monkeypatch, dp, 20) == expected
    assert global_batches(module(corpus, steps=50, pack=pack), monkeypatch, 1, 20) == expected
    assert global_batches(module(corpus, pack=pack, seed=5), monkeypatch, 1, 20) != expected

    monkeypatch.setattr("megatron.core.num_microbatches_calculator.update_num_microbatches", lambda **_: None)
    resumed = module(corpus, pack=pack, micro_batch_size=1)
    resumed.load_state_dict({"consumed_samples": 4 * GLOBAL})
    assert global_batches(resumed, monkeypatch, 2, 16) == expected[4:]


def documents_of(row):
    """The conversations of a row as (tokens, weights of what is predicted), by their positions."""
    starts = np.flatnonzero(row["position_ids"].numpy() == 0).tolist()
    for start, end in zip(starts, [*starts[1:], SEQ], strict=True):
        tokens, labels = row["tokens"][start:end].tolist(), row["labels"][start:end].tolist()
        assert row["position_ids"][start:end].tolist() == list(range(end - start))
        if row["loss_mask"][start:end].any():
            assert tokens[1:] == labels[:-1]
            yield (tuple([*tokens, labels[-1]]), tuple(row["loss_mask"][start:end].tolist()))


@pytest.mark.parametrize("pack", [True, False])
def test_every_epoch_has_every_conversation_once(corpus, pack):
    data = module(corpus, steps=30, pack=pack)
    stored = sorted((tuple(ids.tolist()), tuple((w[1:] // 100).tolist())) for ids, w in Samples(corpus.sources[0].train_prefix))
    (epoch,) = data.rows_per_epoch
    assert epoch == len(stored) if not pack else epoch < len(stored) / 2
    rows = [[found for i in range(epoch) for found in documents_of(data._train[e * epoch + i])] for e in range(2)]
    assert sorted(rows[0]) == sorted(rows[1]) == stored and rows[0] != rows[1]
    filled = sum(len(ids) - 1 for ids, _ in stored) / (epoch * SEQ)
    assert filled > 0.95 or not pack
    if pack:  # not only the order of rows: other neighbours
        neighbours = [{frozenset(documents_of(data._train[e * epoch + i])) for i in range(epoch)} for e in range(2)]
        assert neighbours[0] != neighbours[1]


def test_attention_stays_within_a_conversation(corpus):
    row = module(corpus)._train[3]
    starts = [i for i, p in enumerate(row["position_ids"].tolist()) if p == 0]
    document = [max(s for s in starts if s <= i) for i in range(SEQ)]
    assert len(starts) > 2 and row["attention_mask"].shape == (1, SEQ, SEQ)
    for i in range(0, SEQ, 7):
        for j in range(SEQ):
            assert row["attention_mask"][0, i, j] == (not (j <= i and document[i] == document[j]))
    assert "attention_mask" not in module(corpus, pack=False)._train[3]


def test_rows_for_transformer_engine(corpus):
    """As NeMo's `get_packed_seq_params` reads them, after the loader's collation of one row."""
    from nemo.collections.llm.gpt.model.base import get_packed_seq_params
    from torch.utils.data import default_collate

    by_mask = module(corpus)._train
    data = module(corpus, micro_batch_size=1, thd=True)
    for i in (0, 3, 7):
        row = data._train[i]
        assert "attention_mask" not in row
        params = get_packed_seq_params(default_collate([row]))
        ends = [*np.flatnonzero(row["position_ids"].numpy() == 0).tolist(), SEQ]
        assert params.qkv_format == "thd" and params.cu_seqlens_q.dtype.is_signed and params.cu_seqlens_q.tolist() == ends
        assert int(params.max_seqlen_q) == max(np.diff(ends)) and params.cu_seqlens_q.dim() == 1
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert row[name].equal(by_mask[i][name])
    with pytest.raises(UserError, match="micro_batch=2: packed rows are one a micro batch"):
        module(corpus, thd=True)


def test_weights_are_whole_numbers(tmp_path, bare):
    rows = [turns("Hi", f"Hello {i}!", "Bye", "Now") for i in range(4)]
    for row in rows:
        row[1]["weight"] = 0.3
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": row} for row in rows]))
    corpus = prepare(parse(str(tmp_path / "chat.json"), RECORDS), bare, tmp_path / "cache", Settings(SEQ), heldout=0)
    data = module(corpus)
    assert sorted({v for i in range(4) for v in data._train[i]["loss_mask"].tolist()}) == [0.0, 3.0, 10.0]
    assert not data.has_heldout and data.val_dataloader() == [] and data.val_weights == []


def test_blends(tmp_path, bare):
    from nemo_ext.data.chat.module import blend

    a, b = write(tmp_path / "a.jsonl", 30), write(tmp_path / "b.jsonl", 90, "bb")
    together = prepare(parse([a, b], RECORDS), bare, tmp_path / "cache", Settings(SEQ), heldout=0)
    data = module(together, steps=30, pack=False)
    assert data.rows_per_epoch == [30, 90]
    assert (data._train.source_of[:120] == 0).sum() == 30 and sorted(
        data._train.row_of[:120][data._train.source_of[:120] == 1]
    ) == [*range(90)]
    weighted = prepare(parse([f"{a}:0.8", f"{b}:0.2"], RECORDS), bare, tmp_path / "cache", Settings(SEQ), heldout=0)
    sources = module(weighted, steps=30)._train.source_of
    assert abs((sources == 0).mean() - 0.8) < 0.01 and abs((sources[:20] == 0).mean() - 0.8) < 0.06
    shares = [5, 0.01, *[1] * 20]
    for count in (1, 2, 50, 3001):
        source_of, row_of = blend(shares, count)
        longer = blend(shares, 5000)
        assert len(source_of) == count and (source_of == longer[0][:count]).all() and (row_of == longer[1][:count]).all()
    for source in range(22):
        assert row_of[source_of == source].tolist() == list(range((source_of == source).sum()))


@pytest.mark.parametrize("pack", [True, False])
def test_held_out_rows(corpus, pack):
    data = module(corpus, pack=pack)
    held = data._heldout
    rows = [held[i] for i in range(len(held))]
    stored = sorted((tuple(ids.tolist()), tuple((w[1:] // 100).tolist())) for ids, w in Samples(corpus.sources[0].heldout_prefix))
    assert sorted(found for row in rows for found in documents_of(row)) == stored  # each once, the filling rows count nothing
    assert len(rows) == held.batches * GLOBAL == len(data.val_weights) * GLOBAL
    sums = [sum(float(row["loss_mask"].sum()) for row in rows[i : i + GLOBAL]) for i in range(0, len(rows), GLOBAL)]
    assert data.val_weights == sums and all(sums)
    few = module(corpus, pack=pack, val_batches=1)
    assert len(few._heldout) == GLOBAL
    assert [few._heldout[i]["tokens"].tolist() for i in range(GLOBAL)] == [row["tokens"].tolist() for row in rows[:GLOBAL]]


def test_refusals(corpus):
    with pytest.raises(UserError, match="not seq=32"):
        module(corpus, seq_length=32)


def test_the_module_is_plain(corpus):
    """Lightning hands it to processes, and NeMo writes its arguments into checkpoints."""
    data = module(corpus)
    assert data.__io__.seq_length == SEQ and data.__io__.blend == corpus.blend() and data.__io__.pack is True
    pickle.dumps(data.__io__.blend)
    assert pickle.loads(pickle.dumps(data._train))[5]["tokens"].equal(data._train[5]["tokens"])
