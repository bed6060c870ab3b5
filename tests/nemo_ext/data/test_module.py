import pickle
from pathlib import Path

import numpy as np
import pytest
from nemo_processes import run_group

from nemo_ext import platform
from nemo_ext.data.corpus import prepare
from nemo_ext.data.sources import parse

SEQ, GLOBAL = 32, 8


@pytest.fixture(scope="module", autouse=True)
def megatron():
    platform.activate()


@pytest.fixture()
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture()
def corpus(tmp_path, tokenizer_dir, jsonl):
    return prepare(parse(str(jsonl)), tokenizer_dir, tmp_path / "cache", heldout=0.1, seq_length=SEQ, workers=1)


class Tokenizer:
    eod = 1


def module(corpus, tmp_path, **changes):
    from nemo_ext.data.module import CorpusDataModule

    arguments = {"seq_length": SEQ, "micro_batch_size": 2, "global_batch_size": GLOBAL, "num_workers": 0, "val_batches": 3}
    return CorpusDataModule(
        blend=corpus.blend(), tokenizer=Tokenizer(), index_cache_dir=str(tmp_path / "index"), **{**arguments, **changes}
    )


class Trainer:
    max_steps, global_step = 20, 0


def loaders(data, monkeypatch, dp):
    """The data sampler's loaders of all data-parallel ranks, for training."""
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda *a, **k: dp)
    found = []
    for rank in range(dp):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda *a, rank=rank, **k: rank)
        found.append(data.data_sampler.transform_dataloader(data.train_dataloader()))
    return found


def global_batches(data, monkeypatch, dp, count):
    """[count] lists of the rows of a global batch, whichever rank and micro batch they are in."""
    iterators = [iter(loader) for loader in loaders(data, monkeypatch, dp)]
    batches = []
    for _ in range(count):
        rows = []
        for _ in range(GLOBAL // data.micro_batch_size // dp):
            for iterator in iterators:
                rows += next(iterator)["tokens"].tolist()
        batches.append(rows)
    return batches


def test_the_order_is_the_same_in_every_layout_and_after_a_resume(corpus, tmp_path, monkeypatch):
    expected = None
    for dp, micro in ((1, 2), (2, 2), (4, 1), (1, 8)):
        data = module(corpus, tmp_path, micro_batch_size=micro)
        data.trainer = Trainer()
        data.setup("fit")
        batches = global_batches(data, monkeypatch, dp, 10)
        expected = expected or batches
        assert batches == expected
    assert len({tuple(row) for batch in expected for row in batch}) == 10 * GLOBAL

    monkeypatch.setattr("megatron.core.num_microbatches_calculator.update_num_microbatches", lambda **_: None)
    resumed = module(corpus, tmp_path, micro_batch_size=1)
    resumed.trainer = Trainer()
    resumed.setup("fit")
    resumed.load_state_dict({"consumed_samples": 4 * GLOBAL})
    assert global_batches(resumed, monkeypatch, 2, 6) == expected[4:]


def test_sequences_are_the_text(corpus, tmp_path):
    """Each sequence is a piece of the training documents, end-of-document tokens and all, and every token of it counts."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = module(corpus, tmp_path)
    data.trainer = Trainer()
    data.setup("fit")
    stored = IndexedDataset(corpus.sources[0].train_prefix)
    documents = {tuple(stored[i].tolist()) for i in range(len(stored))}
    starts = {document[:6] for document in documents}
    ends_seen = 0
    for i in range(60):
        sample = data._train[i]
        assert sample["tokens"].shape == sample["labels"].shape == (SEQ,) and "attention_mask" not in sample
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert sample["loss_mask"].tolist() == [1.0] * SEQ
        text = sample["tokens"].tolist()
        for place in np.flatnonzero(np.array(text[:-6]) == corpus.eod):
            ends_seen += 1
            assert tuple(text[place + 1 : place + 7]) in starts
    assert ends_seen > 5


def test_a_blend_honours_its_weights(tmp_path, tokenizer_dir, documents, process_group):
    import json

    for name, half in (("a", documents[:300]), ("b", documents[300:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name * 3} " + d}) + "\n" for d in half))
    corpus = prepare(
        parse([f"{tmp_path / 'a.jsonl'}:0.8", f"{tmp_path / 'b.jsonl'}:0.2"]),
        tokenizer_dir,
        tmp_path / "cache",
        seq_length=SEQ,
        workers=1,
    )
    data = module(corpus, tmp_path)
    data.trainer = Trainer()
    data.setup("fit")
    origin = np.array([data._train.dataset_index[i] for i in range(20 * GLOBAL)])
    assert abs((origin == 0).mean() - 0.8) < 0.01
    assert abs((origin[: 3 * GLOBAL] == 0).mean() - 0.8) < 0.05  # from the start, not only in the long run


def test_an_index_that_was_cut_off_is_built_again(corpus, tmp_path):
    def first_rows():
        data = module(corpus, tmp_path)
        data.trainer = Trainer()
        data.setup("fit")
        return [data._train[i]["tokens"].tolist() for i in range(9)]

    rows = first_rows()
    index = next((tmp_path / "index").glob("*shuffle_index.npy"))
    index.write_bytes(index.read_bytes()[:-100])
    assert first_rows() == rows
    index.write_bytes(b"")
    assert first_rows() == rows


def heldout(corpus, batches, global_batch=GLOBAL, seed=1234):
    from nemo_ext.data.heldout import HeldoutWindows

    return HeldoutWindows([s.heldout_prefix for s in corpus.sources], SEQ, global_batch, batches, seed)


def test_heldout_windows_are_fixed_and_cover_the_text(corpus):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    windows = heldout(corpus, batches=10**6)
    stored = IndexedDataset(corpus.sources[0].heldout_prefix)
    order = np.random.RandomState(1234).permutation(len(stored))
    stream = np.concatenate([stored[int(i)] for i in order])
    possible = (len(stream) - 1) // SEQ
    assert windows.batches == -(-possible // GLOBAL)
    assert possible - windows.batches < windows.windows <= possible
    rows = [windows[i] for i in range(len(windows))]
    counting = [row for row in rows if row["loss_mask"].sum() == SEQ]
    assert len(rows) == windows.batches * GLOBAL and len(counting) == windows.windows
    assert all(row["loss_mask"].sum() in (0, SEQ) for row in rows)
    assert np.array_equal(np.concatenate([row["tokens"] for row in counting]), stream[: windows.windows * SEQ])
    assert np.array_equal(np.concatenate([row["labels"] for row in counting]), stream[1 : windows.windows * SEQ + 1])
    per_batch = [sum(float(r["loss_mask"].sum()) for r in rows[i : i + GLOBAL]) for i in range(0, len(rows), GLOBAL)]
    assert len(set(per_batch)) == 1  # so that the mean over batches is the mean over tokens


def test_heldout_limits(corpus):
    few = heldout(corpus, batches=2)
    assert (len(few), few.windows, few.batches) == (2 * GLOBAL, 2 * GLOBAL, 2)
    large = heldout(corpus, batches=2, global_batch=100_000)
    assert large.batches == 1 and large.windows == (corpus.heldout_tokens - 1) // SEQ  # all of them in one batch
    assert heldout(corpus, 2, seed=5)[0]["tokens"].tolist() != few[0]["tokens"].tolist()


def test_the_module_is_plain(corpus, tmp_path):
    """Lightning hands it to processes, and NeMo writes its arguments into checkpoints."""
    data = module(corpus, tmp_path)
    assert data.__io__.seq_length == SEQ and data.__io__.blend == corpus.blend()
    pickle.dumps(data.__io__.blend)


def train(folder: Path, tokenizer_dir: Path) -> None:
    import module_worker

    module_worker.main(folder, tokenizer_dir)


def test_validation_in_nemos_trainer_is_the_mean_over_the_windows(corpus, tmp_path, tokenizer_dir):
    """Under MegatronStrategy with data parallelism, val_loss equals the token mean computed by hand over the windows."""
    (tmp_path / "corpus.json").write_text(corpus.to_json())
    run_group(2, train, tmp_path, tokenizer_dir, log=tmp_path / "log")
    assert (tmp_path / "done").is_file(), (tmp_path / "log").read_text()[-3000:]
