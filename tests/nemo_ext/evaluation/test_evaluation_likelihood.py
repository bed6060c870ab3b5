"""Likelihoods and perplexity against transformers' own loss and a log-softmax by hand."""

import math

import numpy as np
import pytest
import torch

from nemo_ext.data import sources
from nemo_ext.errors import UserError
from nemo_ext.evaluation import perplexity
from nemo_ext.evaluation.model import Model, Request


def by_hand(model: Model, ids: list[int], start: int) -> np.ndarray:
    """ln p of ids[start:], one sequence at a time, no padding, no sharing, in fp64."""
    with torch.inference_mode():
        logits = model.network(torch.tensor([ids])).logits[0].double()
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    return np.array([float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))])


def transformers_loss(model: Model, ids: list[int], scored: int) -> float:
    """The model's own mean loss on the last `scored` of `ids`."""
    labels = torch.tensor([[-100] * (len(ids) - scored) + ids[len(ids) - scored :]])
    with torch.inference_mode():
        return float(model.network(torch.tensor([ids]), labels=labels).loss)


def requests(count: int = 23) -> list[Request]:
    """Of many lengths; some share all but their last token."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(count):
        ids = generator.integers(2, 300, size=int(generator.integers(2, 60))).tolist()
        found.append(Request(tuple(ids), int(generator.integers(1, len(ids)))))
        if number % 3 == 0:
            found += [Request((*ids[:-1], last), len(ids) - 1) for last in (5, 6, 7)]
    return found


def test_log_likelihoods_are_those_of_a_log_softmax(model):
    every = requests()
    for request, found in zip(every, model.log_likelihoods(every), strict=True):
        np.testing.assert_allclose(found, by_hand(model, list(request.ids), request.start), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_size_and_padding_do_not_change_scores(folder, batch):
    every = requests()
    alone = [Model(folder, "tiny", batch=1).log_likelihoods([request])[0] for request in every[:1]]
    model, other = Model(folder, "tiny", batch=batch), Model(folder, "tiny", batch=1)
    assert np.array_equal(alone[0], other.log_likelihoods(every)[0]) or np.allclose(alone[0], other.log_likelihoods(every)[0])
    for a, b in zip(model.log_likelihoods(every), other.log_likelihoods(every), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_progress_counts_requests(model):
    seen = []
    model.log_likelihoods(requests(), seen.append)
    assert seen[-1] == len(requests()) and seen == sorted(seen)


@pytest.mark.parametrize(
    "length,window,stride", [(2, 5, 5), (11, 5, 5), (11, 5, 2), (11, 5, 1), (11, 1, 1), (6, 5, 3), (7, 5, 3)]
)
def test_windows_score_every_token_once_with_enough_context(length, window, stride):
    scored = []
    for begin, end, first in perplexity.windows(length, window, stride):
        assert end - 1 - begin <= window and begin < first < end
        scored += range(first, end)
        for position in range(first, end):
            assert position - begin >= min(position, window - stride + 1)
    assert scored == list(range(1, length))


def test_perplexity_of_one_document_is_the_exponential_of_transformers_loss(model, texts):
    text = texts[0][:80]
    ids = [0, *model.tokenizer.encode(text, add_special_tokens=False)]
    assert len(ids) <= 64
    found = {m.name: m for m in perplexity.evaluate(model, [text], window=64).metrics}
    loss = transformers_loss(model, ids, len(ids) - 1)
    assert found["nats per token"].value == pytest.approx(loss, abs=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["bits per byte"].value == pytest.approx(loss * (len(ids) - 1) / math.log(2) / len(text.encode()), abs=1e-5)
    assert found["perplexity"].low is None  # a single window


@pytest.mark.parametrize("window,stride", [(16, 16), (16, 8), (16, 5), (64, None)])
def test_perplexity_over_windows_by_hand(model, texts, window, stride):
    """Each window through transformers alone: the tokens before the scored ones are masked from its loss."""
    nats = tokens = 0
    for text in texts:
        ids = [0, *model.tokenizer.encode(text, add_special_tokens=False)]
        reached = 1
        for begin in range(0, len(ids) - 1, stride or window // 2):
            end = min(begin + window + 1, len(ids))
            nats += transformers_loss(model, ids[begin:end], end - reached) * (end - reached)
            tokens += end - reached
            reached = end
            if end == len(ids):
                break
    assert tokens == sum(len(model.tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    found = perplexity.evaluate(model, texts, window=window, stride=stride)
    assert found.metrics[1].value == pytest.approx(nats / tokens, abs=1e-5)
    assert found.metrics[1].low < found.metrics[1].value < found.metrics[1].high
    assert f"windows of {window} tokens, {stride or window // 2} apart" in found.about[1]


def test_interval_is_over_documents_where_there_are_enough(model, texts):
    found = perplexity.evaluate(model, [texts[i % 3][i:] for i in range(12)])
    assert found.metrics[1].interval == "bootstrap over documents" and found.metrics[1].count == 12
    assert sum(n for n, _ in found.metrics[1].pairs) / sum(t for _, t in found.metrics[1].pairs) == found.metrics[1].value


def test_progress_ends_at_the_bytes(model, texts, monkeypatch):
    monkeypatch.setattr(perplexity, "REQUESTS", 2)
    seen = []
    perplexity.evaluate(model, texts, window=8, progress=seen.append)
    assert seen[-1] == perplexity.size_of(texts) and seen == sorted(seen) and len(seen) > 5


def test_documents_of_a_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    (source,) = sources.parse(str(file))
    assert perplexity.documents(source, "text") == ["one", "two", "three"]
    assert perplexity.documents(source, "text", limit=2) == ["one", "two"]


@pytest.mark.parametrize("window,stride,words", [(65, None, "64 positions"), (0, None, "window=0"), (8, 9, "stride=9")])
def test_windows_that_cannot_be(model, window, stride, words):
    with pytest.raises(UserError, match=words):
        perplexity.choose_window(model, window, stride)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        Model(tmp_path, "none")
