"""In NeMo's trainer with a real Megatron model: the loss is the weighted mean over the tokens of the global batch, however
conversations are packed and spread over micro batches and processes."""

import json
import random
import sys
from pathlib import Path

import pytest
from chat_samples import turns
from corpus_texts import PROSE
from nemo_processes import run_group

from nemo_ext.data.chat.pack import pack
from nemo_ext.data.chat.render import Settings
from nemo_ext.data.chat.store import Samples, prepare
from nemo_ext.data.sources import RECORDS, parse

SEQ, PACKS, CONVERSATIONS = 96, 8, 16
TOLERANCE = 1e-5


def conversation(rng):
    words = PROSE.split()
    messages = turns(*(" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(2 * rng.randint(1, 2))))
    for message in messages[1::2]:
        message["weight"] = rng.choice([1, 1, 0.5, 0.3, 2])
    return {"messages": messages}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, bare):
    """Sixteen conversations to train on in eight packs, found by trying, and some held out."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(200):
        rng = random.Random(seed)
        (folder / "chat.jsonl").write_text("".join(json.dumps(conversation(rng)) + "\n" for _ in range(CONVERSATIONS + 6)))
        result = prepare(parse(str(folder / "chat.jsonl"), RECORDS), bare, folder / "cache", Settings(SEQ), heldout=0.25)
        samples = Samples(result.sources[0].train_prefix)
        if len(samples) == CONVERSATIONS and len(pack(samples.lengths - 1, SEQ)) == PACKS:
            assert result.unit == 10 and result.heldout_documents == 6
            return result
    raise AssertionError("no corpus of the wanted shape")


def train(plan: dict, out: Path) -> None:
    sys.path.append(str(Path(__file__).parents[3] / "training"))  # layouts
    import chat_training_worker

    chat_training_worker.main(plan, out)


@pytest.fixture(scope="module")
def runs(corpus, bare, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    whole = dict(steps=4)  # every step is an epoch, so that packed and unpacked steps see the same conversations
    packed, alone = dict(pack=True, **{"global": PACKS}), dict(pack=False, **{"global": CONVERSATIONS})
    some = dict(pack=True, steps=6, **{"global": 4})
    few = dict(pack=False, steps=2, **{"global": 2})  # three held-out batches
    one = [
        dict(name="alone", micro=1, **alone, **whole),
        dict(name="alone_micro4", micro=4, **alone, **whole),
        dict(name="packed", micro=1, **packed, **whole),
        dict(name="packed_micro2", micro=2, **packed, **whole),
        dict(name="some", micro=1, **some),
        dict(name="some_micro2", micro=2, **some),
        dict(name="few", micro=1, **few),
        dict(name="wrong", micro=1, per_token=False, **alone, **whole),
    ]
    two = [
        dict(name="alone_dp2", micro=2, **alone, **whole),
        dict(name="packed_dp2", micro=2, **packed, **whole),
        dict(name="some_dp2", micro=1, **some),
        dict(name="few_dp2", micro=1, **few),
        dict(name="alone_tp2", micro=4, tp=2, **alone, **whole),
        dict(name="packed_tp2", micro=2, tp=2, **packed, **whole),
        dict(name="alone_pp2", micro=4, pp=2, **alone, **whole),
        dict(name="packed_pp2", micro=2, pp=2, **packed, **whole),
    ]
    results = {}
    for processes, cases in ((1, one), (2, two)):
        plan = {"tokenizer": str(bare), "seq": SEQ, "blend": corpus.blend(), "cases": cases}
        run_group(processes, train, plan, folder / "out.json", log=folder / "log")
        results.update(json.loads((folder / "out.json").read_text()))
    return results


@pytest.mark.parametrize(
    ("case", "reference"),
    [("alone_micro4", "alone"), ("packed", "alone"), ("packed_micro2", "alone"), ("alone_dp2", "alone"), ("packed_dp2", "alone"),
     ("some_micro2", "some"), ("some_dp2", "some"), ("few_dp2", "few"),
     ("packed_tp2", "alone_tp2"), ("packed_pp2", "alone_pp2")],
)  # fmt: skip
def test_losses_do_not_depend_on_the_layout(runs, case, reference):
    """The loss of each step, the later ones after gradients of the earlier ones. Random weights under TP and PP are others."""
    assert runs[case]["losses"] == pytest.approx(runs[reference]["losses"], abs=TOLERANCE)
    assert runs[case]["val_loss"] == pytest.approx(runs[reference]["val_loss"], abs=TOLERANCE)


def test_training_learns(runs):
    losses = runs["packed"]["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    assert len(runs["some"]["losses"]) == 6


def test_without_the_switch_the_mean_is_another(runs):
    """The first loss is NeMo's report and right; the gradients are not, and lead elsewhere."""
    assert runs["wrong"]["losses"][0] == pytest.approx(runs["alone"]["losses"][0], abs=TOLERANCE)
    assert abs(runs["wrong"]["losses"][-1] - runs["alone"]["losses"][-1]) > 100 * TOLERANCE


def test_validation_is_the_mean_over_all_weighted_tokens(runs):
    """Against each held-out conversation alone in the model, over batches of unequal weight."""
    for name in ("alone", "packed", "some", "some_micro2", "some_dp2", "packed_dp2", "few", "few_dp2", "packed_tp2"):
        assert runs[name]["val_loss"] == pytest.approx(runs[name]["by_hand"], abs=TOLERANCE)
    for name in ("few", "few_dp2"):
        losses, weights = runs[name]["val_losses"], runs[name]["val_weights"]
        assert len(losses) == len(weights) == 3
        weighted = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        assert weighted == pytest.approx(runs[name]["by_hand"], abs=TOLERANCE)
        assert abs(sum(losses) / 3 - weighted) > 100 * TOLERANCE


def test_no_token_sees_another_conversation(runs):
    for name in ("packed", "packed_tp2"):
        assert runs[name]["apart"] < TOLERANCE
        assert runs[name]["leaked"] > 1e-2
