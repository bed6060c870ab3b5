"""Drafts change how fast an answer comes, never which one: greedy token for token, sampled in distribution."""

import json
import random
import time

import pytest
from served_models import SIZES, Answers, save_model
from test_engine import GREEDY, generate, prompts

from deploy.engine.request import Request, Sampling
from nemo_ext.errors import UserError


@pytest.fixture(scope="module")
def drafts(tiny, tmp_path_factory):
    """Names of drafts: the model itself, one that is somewhat like it, another one, and no model at all."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("drafts")
    near = AutoModelForCausalLM.from_pretrained(tiny)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in near.parameters():
            weight += 0.03 * weight.std() * torch.randn_like(weight)
    near.save_pretrained(folder / "near")
    save_model(folder / "other", LlamaConfig(vocab_size=272, **SIZES | dict(num_hidden_layers=1, hidden_size=32)), seed=5)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tiny / name).exists():
            (folder / "near" / name).write_text((tiny / name).read_text())
    return {"same": tiny, "near": folder / "near", "other": folder / "other", "ngram": "ngram"}


@pytest.fixture(scope="module", params=["same", "near", "other", "ngram"])
def drafted(request, tiny, drafts):
    """An engine with a draft, and the draft's name."""
    from deploy.engine.engine import Engine

    engine = Engine(tiny, rows=4, prefill_tokens=24, max_waiting=32, dtype="float32", draft=drafts[request.param], draft_tokens=3)
    yield engine, request.param
    engine.close()


def rates(engine, before) -> tuple[int, int]:
    """Guessed and accepted tokens since."""
    now = engine.stats()
    return now.draft_tokens - before.draft_tokens, now.accepted_tokens - before.accepted_tokens


def test_greedy_is_generate_whoever_joins_and_leaves(drafted, reference):
    engine, name = drafted
    chance, before, asked = random.Random(2), engine.stats(), []
    for number, prompt in enumerate(prompts(14, seed=50)):
        length = chance.randint(1, 40)
        asked.append((prompt, length, Answers(engine, Request(prompt, length, GREEDY))))
        if number % 5 == 4:  # some leave in the middle
            leaving = Answers(engine, Request(prompt, 150, GREEDY, ignore_eos=True))
            time.sleep(0.03)
            engine.cancel(leaving.number)
        time.sleep(chance.random() * 0.02)
    for prompt, length, answers in asked:
        assert answers.wait().ids() == generate(reference, prompt, max_new_tokens=length)
    guessed, accepted = rates(engine, before)
    steps = engine.stats().steps - before.steps
    assert 0 <= accepted <= guessed and steps
    if name == "same":
        assert accepted > 0.85 * guessed > 100  # the last guesses of an answer that ends are of no use
    if name == "near":
        assert 0.1 * guessed < accepted < 0.9 * guessed


def test_as_many_guesses_as_hold(drafted):
    """Drafts that are always right go on with three tokens, those that never are with one."""
    from deploy.engine.speculation import ahead

    assert [ahead(3, 3, 1, 5), ahead(3, 3, 3, 4), ahead(2, 2, 2, 5), ahead(1, 1, 0, 5), ahead(2, 0, 0, 5)] == [2, 4, 4, 1, 2]
    engine, name = drafted
    before = engine.stats()
    Answers(engine, Request(prompts(1, seed=51)[0], 60, GREEDY, ignore_eos=True)).wait()
    guessed, accepted = rates(engine, before)
    steps = engine.stats().steps - before.steps
    if name == "same":
        assert steps < 60 / 3 and guessed > 2.5 * steps
    if name == "other":
        assert accepted < 5 and steps < guessed + 2 < 1.2 * steps + 5


def test_beams_schemas_penalties_and_n_go_along(drafted, engine):
    """Requests of every kind in one batch, answered as by the engine without a draft."""
    schema = json.dumps({"type": "object", "properties": {"a": {"enum": ["xy", "z"]}}, "required": ["a"],
                         "additionalProperties": False})  # fmt: skip
    first, *_ = prompts(1, seed=60)
    asked = [
        Request(first, 12, Sampling(num_beams=3), n=2),
        Request(first, 60, GREEDY, schema=schema),
        Request(first, 25, Sampling(temperature=0, repetition_penalty=1.3, frequency_penalty=0.4), logprobs=2),
        Request(first, 20, GREEDY, n=2, stop=("e", "q")),
        Request(first[:1], 30, GREEDY),
    ]
    found = [Answers(drafted[0], request) for request in asked]
    for request, answers in zip(asked, found, strict=True):
        expected = Answers(engine, request).wait()
        answers.wait()
        for index in range(request.n):
            assert answers.ids(index) == expected.ids(index) and answers.text(index) == expected.text(index)
            assert answers.finish(index) == expected.finish(index)
        for one, other in zip(answers.outputs, expected.outputs, strict=True):
            assert [each.logprob for each in one.logprobs] == pytest.approx([each.logprob for each in other.logprobs], abs=1e-4)


def test_a_loop_is_guessed_from_itself(tiny, drafts, reference):
    """An answer that repeats itself takes fewer steps than it has tokens."""
    import torch

    from deploy.engine.engine import Engine

    engine = Engine(tiny, rows=1, dtype="float32", draft="ngram", draft_tokens=5)
    try:
        prompt = prompts(1, seed=3)[0]
        answers = Answers(engine, Request(prompt, 30, Sampling(seed=5, temperature=0.7, top_k=4), ignore_eos=True)).wait()
        torch.manual_seed(5)  # a guess that was not drawn leaves the draws as they are
        assert answers.ids() == generate(reference, prompt, max_new_tokens=30, min_new_tokens=30, do_sample=True,
                                         temperature=0.7, top_k=4)  # fmt: skip
        before = engine.stats()
        looped = Answers(engine, Request(prompt, 90, GREEDY, schema=json.dumps({"const": "abc" * 20}))).wait()
        assert json.loads(looped.text()) == "abc" * 20
        assert engine.stats().steps - before.steps < 25 and rates(engine, before)[1] > 40
    finally:
        engine.close()


def test_what_followed_last():
    from deploy.engine.speculation import _Followers

    assert _Followers().find([1, 2, 3, 1, 2], 3) == [3, 1, 2]
    assert _Followers().find([1, 2, 3, 9, 1, 2, 4, 1, 2], 1) == [4]  # the latest place
    assert _Followers().find([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1) == [3]  # the longest n-gram
    assert _Followers().find([1, 2, 3, 4], 3) == [] == _Followers().find([1], 2)
    assert _Followers().find([5, 5, 5], 4) == [5, 5, 5, 5]
    grows, ids = _Followers(), []
    for token in [1, 2, 3, 4, 1, 2, 3]:
        ids.append(token)
        assert grows.find(ids, 2) == _Followers().find(ids, 2)


def chi_square(counts: dict, p: dict) -> float:
    """Chance of counts as far from p as these, outcomes expected less than five times taken together."""
    from scipy.stats import chisquare

    total, rare = sum(counts.values()), [each for each in p if p[each] * sum(counts.values()) < 5]
    assert set(counts) <= set(p)
    often = [each for each in p if each not in rare]
    found = [counts.get(each, 0) for each in often] + ([sum(counts.get(each, 0) for each in rare)] if rare else [])
    wanted = [total * p[each] for each in often] + ([total * sum(p[each] for each in rare)] if rare else [])
    if rare and wanted[-1] < 1:
        found, wanted = found[:-1], wanted[:-1]
        wanted = [each * sum(found) / sum(wanted) for each in wanted]
    return chisquare(found, wanted).pvalue


def test_speculative_sampling_has_the_models_distribution():
    import torch

    from deploy.engine.sampling import accept, draw

    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]), torch.tensor([0.05, 0.45, 0.1, 0.1, 0.3])
    generator, counts, kept = torch.Generator().manual_seed(0), {}, 0
    for _ in range(20_000):
        guess = draw(q, generator)
        token = accept(p, guess, q, generator)
        counts[token] = counts.get(token, 0) + 1
        kept += token == guess
    assert chi_square(counts, dict(enumerate(p.tolist()))) > 0.01
    assert kept / 20_000 == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.01)  # the paper's theorem 3.5
    assert accept(p, 0, p, generator) == 0


def test_sampled_answers_have_the_models_distribution(tiny, reference, drafts):
    """Answers of five tokens, each of two: how often they come against their probabilities, computed one by one."""
    import torch

    from deploy.engine.engine import Engine

    prompt, settings = prompts(1, seed=70)[0], dict(temperature=1.5, top_k=2)
    p = {(): 1.0}
    for _ in range(5):
        logits = reference(torch.tensor([[*prompt, *ids] for ids in p])).logits[:, -1] / settings["temperature"]
        best = logits.topk(settings["top_k"])
        p = {
            (*ids, int(token)): chance * float(each)
            for (ids, chance), tokens, row in zip(p.items(), best.indices, best.values.softmax(-1), strict=True)
            for token, each in zip(tokens, row, strict=True)
        }
    assert len(p) == 32 and sum(p.values()) == pytest.approx(1)
    engine = Engine(tiny, rows=16, dtype="float32", max_waiting=200, draft=drafts["near"], draft_tokens=3)
    try:
        asked = [
            Answers(engine, Request(prompt, 5, Sampling(seed=1000 * seed, **settings), n=16, ignore_eos=True))
            for seed in range(90)
        ]
        counts: dict[tuple, int] = {}
        for answers in asked:
            answers.wait()
            for index in range(16):
                ids = tuple(answers.ids(index))
                counts[ids] = counts.get(ids, 0) + 1
        stats = engine.stats()
        assert 0.2 < stats.accepted_tokens / stats.draft_tokens < 0.9
        assert chi_square(counts, p) > 0.01
    finally:
        engine.close()


def test_numbers_gone_wrong_in_the_draft(tiny, drafts, reference):
    """A draft that computes no number ends the requests that it was for, and leaves none of it behind."""
    from deploy.engine.engine import Engine

    engine = Engine(tiny, rows=2, dtype="float32", draft=drafts["near"])
    try:
        prompt, network = prompts(1, seed=80)[0], engine._drafter._network
        forward = network.forward
        network.forward = lambda *given: forward(*given) * float("nan")
        failed = Answers(engine, Request(prompt, 5, GREEDY)).wait()
        assert failed.finish() == "error" and "RuntimeError" in failed.outputs[-1].message
        network.forward = forward
        assert Answers(engine, Request(prompt, 9, GREEDY)).wait().ids() == generate(reference, prompt, max_new_tokens=9)
    finally:
        engine.close()


def test_drafts_that_do_not_fit(tiny, drafts, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig

    from deploy.engine.engine import Engine

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["new"])
    foreign = tmp_path / "foreign"
    tokenizer.save_pretrained(foreign)
    short = save_model(tmp_path / "short", LlamaConfig(vocab_size=260, **SIZES | dict(max_position_embeddings=64)))
    for folder, words in [
        (foreign, "has other tokens"),
        (short, "draft: context=256 must be 1 to 64"),
        (tmp_path, "draft|token"),
    ]:
        with pytest.raises(UserError, match=words):
            Engine(tiny, rows=1, draft=folder)


def test_the_real_model_with_a_part_of_itself(tmp_path):
    """SmolLM2-135M, real weights: with prompt lookup, and with its own first layers as a draft, `generate`'s tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from conversion import gguf
    from deploy.engine.engine import Engine

    folder = gguf.to_hf(gguf.smollm2_gguf(), tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    texts = ["Repeat this list: apple, pear, plum, apple, pear, plum, apple,", "The capital of France is"]
    asked = [(tuple(tokenizer(text).input_ids), 20) for text in texts]
    expected = [generate(model, prompt, max_new_tokens=length) for prompt, length in asked]
    model.model.layers = model.model.layers[:6]
    model.config.num_hidden_layers = 6
    model.save_pretrained(tmp_path / "part")
    tokenizer.save_pretrained(tmp_path / "part")
    del model
    for draft in ("ngram", tmp_path / "part"):
        engine = Engine(folder, rows=2, context=128, dtype="float32", draft=draft)
        try:
            answers = [Answers(engine, Request(prompt, length, GREEDY)) for prompt, length in asked]
            assert [each.wait().ids() for each in answers] == expected
            stats = engine.stats()
            assert stats.draft_tokens and (draft != "ngram" or stats.accepted_tokens >= 10)
        finally:
            engine.close()
