import json

import pytest
import torch
from media_samples import encoded, picture, vision

from nemo_ext import platform
from nemo_ext.data.chat.render import Settings
from nemo_ext.data.sources import MEDIA, parse
from nemo_ext.errors import UserError

COUNT, SEQ = 12, 96


@pytest.fixture(scope="module", autouse=True)
def megatron():
    platform.activate()


@pytest.fixture(scope="module")
def sense(tokenizer):
    return vision(tokenizer)


def record(i):
    """Three ways to write the same kind of preference."""
    good, bad = f"Good {i}.", f"Bad, bad {i}!"
    if i % 3 == 0:
        return {"image": f"{i}.png", "question": f"Which {i}?", "chosen": good, "rejected": bad}
    if i % 3 == 1:
        turns = [{"from": "human", "value": f"<image>Which {i}?"}]
        answers = {"chosen": {"from": "gpt", "value": good}, "rejected": {"from": "gpt", "value": bad}}
        return {"conversations": turns, **answers, "images": [f"{i}.png"]}
    question = {"role": "user", "content": [{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": f"Which {i}?"}]}
    return {name: [question, {"role": "assistant", "content": text}] for name, text in (("chosen", good), ("rejected", bad))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(encoded(picture(i)))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(COUNT)))
    return folder


def test_pairs_from_records_to_batches(folder, tokenizer, sense, tmp_path, monkeypatch):
    from megatron.core import parallel_state
    from transformers import AutoTokenizer

    from nemo_ext.data.multimodal.preference import Pairs, PreferenceDataModule, prepare

    corpus = prepare(parse(str(folder / "pairs.jsonl"), MEDIA), tokenizer, tmp_path, Settings(SEQ), [sense], heldout=0.2)
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    for prefix in (corpus.sources[0].train_prefix, corpus.sources[0].heldout_prefix):
        for chosen, rejected in Pairs(prefix):
            number = int(decode(chosen[0]).partition("Which ")[2].partition("?")[0])
            assert decode(chosen[0][chosen[1] > 0]) == f"Good {number}.<|im_end|>"
            assert decode(rejected[0][rejected[1] > 0]) == f"Bad, bad {number}!<|im_end|>"
            assert chosen[2] == rejected[2] and chosen[2][0].location.path == str(folder / f"{number}.png")
    assert corpus.train_documents + corpus.heldout_documents == 2 * COUNT

    class Tokenizer:
        eod = 9

    class Trainer:
        global_step, max_steps = 0, 4

    data = PreferenceDataModule(
        corpus.blend(), SEQ, micro_batch_size=2, global_batch_size=4, tokenizer=Tokenizer(), senses=[sense], num_workers=0
    )
    data.trainer = Trainer()
    data.setup("fit")
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda *a, **k: 1)
    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda *a, **k: 0)
    batches = list(data.data_sampler.transform_dataloader(data.train_dataloader()))
    assert len(batches) == 8
    for batch in batches:
        assert batch["tokens"].shape == (4, SEQ) and batch["vision_inputs"].shape == (4, 3, 28, 28)
        assert batch["vision_gather"].tolist() == [*range(4 * sense.sense.tokens)]
        for row in (0, 2):
            words = [decode(batch["labels"][row + k][batch["loss_mask"][row + k] > 0]) for k in (0, 1)]
            assert words[0].startswith("Good ") and words[1] == words[0].replace("Good", "Bad, bad").replace(".", "!")
            assert batch["vision_inputs"][row].equal(batch["vision_inputs"][row + 1])
    assert data.learnt(0) == sum(int(torch.count_nonzero(batch["loss_mask"])) for batch in batches[:2])
    assert data.val_weights and sum(data.val_weights) > 0


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "a", "chosen": "b"}, 'no "rejected"'),
        ({"question": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": "b", "rejected": "c"}, "no prompt: one of prompt, question"),
        ({"image": "none.png", "question": "a", "chosen": "b", "rejected": "c"}, "image 1: .*none.png: no such file"),
        (
            {
                name: [{"role": "user", "content": name}, {"role": "assistant", "content": name}]
                for name in ("chosen", "rejected")
            },
            "chosen and rejected answer different prompts",
        ),
    ],
)
def test_what_is_no_preference(tmp_path, tokenizer, sense, record, says):
    from nemo_ext.data.multimodal.preference import prepare

    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"line 1: {says}"):
        prepare(parse(str(tmp_path / "a.jsonl"), MEDIA), tokenizer, tmp_path / "c", Settings(SEQ), [sense], heldout=0)
    with pytest.raises(UserError, match="columns=answer: unknown: give prompt, chosen"):
        prepare([], tokenizer, tmp_path / "c", Settings(SEQ), [sense], columns={"answer": "x"})


def test_a_pair_that_does_not_fit_is_dropped_whole(tmp_path, tokenizer, sense):
    from nemo_ext.data.multimodal.preference import Pairs, prepare

    rows = [{"p": "a", "chosen": "b", "rejected": "c " * n} for n in (1, 300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "p"}
    corpus = prepare(parse(str(tmp_path / "a.jsonl"), MEDIA), tokenizer, tmp_path / "c", Settings(SEQ), [sense], columns=columns, heldout=0)  # noqa: E501  # fmt: skip
    assert corpus.sources[0].counts["overlong"] == 1 and len(Pairs(corpus.sources[0].train_prefix)) == 1
