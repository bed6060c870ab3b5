import json

import numpy as np
import pytest
import torch
from media_samples import encoded, picture, vision

from nemo_ext import platform
from nemo_ext.data.chat.render import Settings
from nemo_ext.data.multimodal.store import Samples, prepare
from nemo_ext.data.sources import MEDIA, parse
from nemo_ext.errors import UserError

SEQ, GLOBAL, COUNT = 160, 8, 60
GRIDS = ((28, 56), (56, 28), (56, 56))


@pytest.fixture(scope="module", autouse=True)
def megatron():
    platform.activate()


def images_of(i):
    """Every third conversation is of text alone."""
    return [] if i % 3 == 0 else [f"{i}.png"] if i % 3 == 1 else [f"{i}.png", f"{i - 1}.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(encoded(picture(i, 20 + 3 * (i % 9), 24 + 5 * (i % 7))))
        question = "".join(f"<image> number {k}. " for k in range(len(images_of(i))))
        answer = "word " * (1 + i % 9)
        turns = [{"from": "human", "value": f"{question}What is {i}?"}, {"from": "gpt", "value": answer}]
        rows.append({"conversations": turns, **({"image": images_of(i)} if images_of(i) else {})})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module", params=[None, GRIDS], ids=["plain", "tiles"])
def sense(request, tokenizer):
    return vision(tokenizer, grids=request.param)


@pytest.fixture(scope="module")
def corpus(folder, tokenizer, sense, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return prepare(parse(str(folder / "data.json"), MEDIA), tokenizer, cache, Settings(SEQ), [sense], heldout=0.2)


class Tokenizer:
    eod = 9


class Trainer:
    global_step = 0

    def __init__(self, max_steps):
        self.max_steps = max_steps


def module(corpus, sense, steps=8, **changes):
    from nemo_ext.data.multimodal.module import MultimodalDataModule

    arguments = {"seq_length": SEQ, "micro_batch_size": 2, "global_batch_size": GLOBAL, "num_workers": 0, "val_batches": 100}
    data = MultimodalDataModule(blend=corpus.blend(), tokenizer=Tokenizer(), senses=[sense], **{**arguments, **changes})
    data.trainer = Trainer(steps)
    data.setup("fit")
    return data


def micro_batches(data, monkeypatch, dp=1):
    """The micro batches of one pass, rank after rank within a step."""
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda *a, **k: dp)
    iterators = []
    for rank in range(dp):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda *a, rank=rank, **k: rank)
        iterators.append(iter(data.data_sampler.transform_dataloader(data.train_dataloader())))
    for batches in zip(*iterators, strict=True):
        yield from batches


def seen(batch, sense):
    """What stands where in each row of a batch: tokens, and the hash of the encoder's input of each placeholder."""
    table = [(hash(each.numpy().tobytes()), k) for each in batch["vision_inputs"] for k in range(sense.sense.tokens)]
    table.append("newline")
    places = batch["tokens"] == sense.sense.token_id
    assert places.sum() == len(batch["vision_gather"])
    features = iter(batch["vision_gather"].tolist())
    return [
        [table[next(features)] if token == sense.sense.token_id else token for token in row] for row in batch["tokens"].tolist()
    ]


def test_the_order_is_the_same_in_every_layout_and_after_a_resume(corpus, sense, monkeypatch):
    """Rows and what they see do not depend on the micro batch size, on data parallelism, or on a resumption."""
    expected = [row for batch in micro_batches(module(corpus, sense), monkeypatch) for row in seen(batch, sense)]
    assert len(expected) == 8 * GLOBAL
    for dp, micro in ((2, 1), (1, 8)):
        batches = micro_batches(module(corpus, sense, micro_batch_size=micro), monkeypatch, dp)
        assert [row for batch in batches for row in seen(batch, sense)] == expected
    monkeypatch.setattr("megatron.core.num_microbatches_calculator.update_num_microbatches", lambda **_: None)
    resumed = module(corpus, sense, micro_batch_size=4)
    resumed.load_state_dict({"consumed_samples": 4 * GLOBAL})
    assert [row for batch in micro_batches(resumed, monkeypatch) for row in seen(batch, sense)] == expected[4 * GLOBAL :]


def test_rows_hold_the_samples(corpus, sense):
    """Whole conversations: the same tokens, and the features of the right images in the right order."""
    stored = {}
    for ids, weights, media in Samples(corpus.sources[0].train_prefix):
        assert (ids == sense.sense.token_id).sum() == sum(m.tokens for m in media)
        assert not weights[ids == sense.sense.token_id].any() and weights.any()
        stored[tuple(ids[:-1].tolist())] = media
    data = module(corpus, sense, pack=False, micro_batch_size=1)
    for k in range(data.rows_per_epoch[0]):
        row = data._train[k]
        length = int(torch.nonzero(row["position_ids"] == 0)[1])  # the filling counts from zero again
        media = stored.pop(tuple(row["tokens"][:length].tolist()))
        arrays = [sense.inputs(m.location.read(), m.shape) for m in media]
        assert row["vision_inputs"].equal(torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0, 3, 28, 28))
        gathers, before = [], 0
        for m, array in zip(media, arrays, strict=True):
            index = sense.gather(m.shape)
            gathers += np.where(index < 0, -1, index + before).tolist()
            before += len(array) * sense.sense.tokens
        assert row["vision_gather"].tolist() == gathers
    assert not stored


def test_a_batch_without_images(corpus, sense):
    from nemo_ext.data.multimodal.module import Collate

    data = module(corpus, sense, pack=False)
    rows = [data._train[k] for k in range(data.rows_per_epoch[0])]
    batch = Collate([sense])([row for row in rows if not len(row["vision_inputs"])][:2])
    assert batch["vision_inputs"].shape == (0, 3, 28, 28) and batch["vision_inputs"].dtype == torch.float32
    assert batch["vision_gather"].shape == (0,) and batch["vision_gather"].dtype == torch.int64
    assert batch["tokens"].shape == (2, SEQ)


def test_what_breaks_after_preparation(corpus, sense, folder, capsys):
    _, weights, media = next(s for s in Samples(corpus.sources[0].train_prefix) if s[2])
    path = folder / media[0].location.path
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=rf"{path.name}: a broken image: .*truncated"):
            epoch(module(corpus, sense))
        data = module(corpus, sense, skip_bad=True, pack=False)
        rows = epoch(data)
        assert path.name in capsys.readouterr().err
        blank = [row for row in rows if not row["loss_mask"].any()]
        assert blank and all((row["vision_inputs"].flatten(1) == 0).all(1).any() for row in blank)
        path.write_bytes(encoded(picture(1, 50, 50)))
        with pytest.raises(UserError, match="50x50 pixels, which was"):
            epoch(module(corpus, sense))
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name}: cannot be read: No such file"):
            epoch(module(corpus, sense))
    finally:
        path.write_bytes(whole)


def epoch(data):
    return [data._train[k] for k in range(data.rows_per_epoch[0])]


def test_what_a_worker_raises_is_one_line(corpus, sense, folder, monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda *a, **k: 1)
    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda *a, **k: 0)
    path = folder / next(s for s in Samples(corpus.sources[0].train_prefix) if s[2])[2][0].location.path
    whole = path.read_bytes()
    path.unlink()
    try:
        data = module(corpus, sense, num_workers=1)
        with pytest.raises(UserError) as error:
            list(data.data_sampler.transform_dataloader(data.train_dataloader()))
        assert str(error.value) == f"{path}: cannot be read: No such file or directory"
    finally:
        path.write_bytes(whole)


def test_other_pipeline_stages_decode_nothing(corpus, sense, monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 1)
    monkeypatch.setattr(parallel_state, "is_pipeline_first_stage", lambda **_: False)
    other = module(corpus, sense)
    monkeypatch.setattr(parallel_state, "is_pipeline_first_stage", lambda **_: True)
    first = module(corpus, sense)
    rows = [(first._train[k], other._train[k]) for k in range(8)]
    assert any(len(a["vision_inputs"]) for a, _ in rows) and not any(len(b["vision_inputs"]) for _, b in rows)
    assert all(a[name].equal(b[name]) for a, b in rows for name in ("tokens", "labels", "loss_mask"))


def test_the_module_is_plain(corpus, sense):
    """Lightning hands it to processes, and NeMo writes its arguments into checkpoints."""
    import pickle

    data = module(corpus, sense)
    assert data.__io__.seq_length == SEQ
    rows = pickle.loads(pickle.dumps(data._train))
    assert rows[3]["vision_gather"].equal(data._train[3]["vision_gather"])
