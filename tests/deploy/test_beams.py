"""Beam search, plain, diverse and constrained, against transformers; words that must appear against trying everything."""

import itertools
import json

import pytest
from test_engine import GREEDY, generate, prompts

from deploy.engine.request import Request, Sampling
from deploy.engine.words import Progress, banned

PAD = 259


def beams_of(model, prompt, count: int, **settings) -> list[list[int]]:
    """Answers of transformers' own beam search, without padding."""
    import torch

    ids = torch.tensor([prompt])
    settings = dict(do_sample=False, pad_token_id=PAD, early_stopping=False, num_return_sequences=count) | settings
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, len(prompt) :].tolist()
    return [[id for id in row if id != PAD] for row in found]


@pytest.mark.parametrize("beams, length_penalty", [(2, 1.0), (4, 0.0), (3, -1.0)])
def test_beams_are_generates(ask, reference, baseline, beams, length_penalty):
    other = ask(Request(prompts(1, seed=8)[0], 60, GREEDY))
    for prompt in prompts(3, seed=9):
        request = Request(prompt, 14, Sampling(num_beams=beams, length_penalty=length_penalty), n=2)
        answers = ask(request).wait()
        expected = beams_of(reference, prompt, 2, max_new_tokens=14, num_beams=beams, length_penalty=length_penalty)
        assert [answers.ids(i) for i in range(2)] == expected
    assert other.wait().ids() == generate(reference, prompts(1, seed=8)[0], max_new_tokens=60)


def diverse(model, prompt, beams, groups, penalty, new, length_penalty, count) -> list[list[int]]:
    """Diverse beam search with transformers' scorer and penalty, which its `generate` no longer calls."""
    import torch
    from transformers.generation.beam_search import BeamSearchScorer
    from transformers.generation.logits_process import HammingDiversityLogitsProcessor

    size = beams // groups
    scorer = BeamSearchScorer(1, beams, torch.device("cpu"), length_penalty, False, count, groups)
    differ = HammingDiversityLogitsProcessor(penalty, beams, groups)
    ids, scores = torch.tensor([prompt] * beams), torch.full((beams,), -1e9)
    scores[::size] = 0
    with torch.no_grad():
        for _ in range(new):
            logits, tokens = model(ids).logits[:, -1], torch.zeros(beams, dtype=torch.long)
            for group in range(groups):
                span = slice(group * size, (group + 1) * size)
                log_p = differ(ids[span], logits[span].log_softmax(-1), tokens, group)
                best = (log_p + scores[span, None]).flatten().topk(2 * size)
                parents, chosen = best.indices // log_p.shape[-1], best.indices % log_p.shape[-1]
                step = scorer.process(ids[span], best.values[None], chosen[None], parents[None], PAD, 256,
                                      group_index=group, decoder_prompt_len=len(prompt))  # fmt: skip
                scores[span], tokens[span] = step["next_beam_scores"], step["next_beam_tokens"]
                ids[span] = ids[span][step["next_beam_indices"]]
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            if scorer.is_done:
                break
    last = torch.zeros(beams, dtype=torch.long)
    found = scorer.finalize(ids, scores, last, last, len(prompt) + new, PAD, 256, decoder_prompt_len=len(prompt))
    return [[id for id in row if id != PAD] for row in found["sequences"][:, len(prompt) :].tolist()]


@pytest.mark.parametrize("groups, penalty, length_penalty", [(2, 0.5, -1.0), (4, 3.0, 1.0), (2, 5.0, 0.0)])
def test_diverse_beams_are_transformers(ask, reference, baseline, groups, penalty, length_penalty):
    ends = next(prompt for prompt in prompts(200, seed=13) if 256 in generate(reference, prompt, max_new_tokens=8))
    plain, ended = [], 0
    for prompt in [*prompts(3, seed=90), ends]:
        sampling = Sampling(num_beams=4, beam_groups=groups, diversity_penalty=penalty, length_penalty=length_penalty)
        found = ask(Request(prompt, 10, sampling, n=4)).wait()
        answers = [found.ids(index) for index in range(4)]
        assert answers == diverse(reference, prompt, 4, groups, penalty, 10, length_penalty, 4)
        plain.append(answers == beams_of(reference, prompt, 4, max_new_tokens=10, num_beams=4, length_penalty=length_penalty))
        ended += sum(256 in answer for answer in answers)
    assert not any(plain) and ended


def test_words_that_must_not_appear(ask, reference, baseline):
    """One after another and in beams, as transformers rules them out."""
    for prompt in prompts(4, seed=100):
        plain = generate(reference, prompt, max_new_tokens=12)
        if 256 in plain:
            continue
        words = (tuple(plain[:1]), tuple(plain[2:4]), tuple(plain[4:7]))
        given = dict(max_new_tokens=12, bad_words_ids=[list(word) for word in words])
        found = ask(Request(prompt, 12, GREEDY, bad_words=words)).wait().ids()
        assert found == generate(reference, prompt, **given) != plain
        beams = ask(Request(prompt, 12, Sampling(num_beams=3), n=3, bad_words=words)).wait()
        assert [beams.ids(index) for index in range(3)] == beams_of(reference, prompt, 3, num_beams=3, **given)
    assert banned([1, 2, 3], [(4,), (3, 5), (2, 3, 6), (9, 3, 7), (1, 2, 3, 3, 8)]) == [4, 5, 6]


def test_beams_follow_a_schema(ask, engine, reference, baseline):
    """As transformers' beams do that may take only what the grammar allows."""
    schema = json.dumps({"type": "object", "properties": {"kind": {"enum": ["cat", "cow", "dog"]}, "legs": {"enum": [2, 4]}},
                         "required": ["kind", "legs"], "additionalProperties": False,
                         "x-guidance": {"whitespace_flexible": False}})  # fmt: skip

    def allowed(batch, ids) -> list[int]:
        grammar = engine._grammars.start(schema)
        for token in ids[len(prompt) :].tolist():
            if token in (256, PAD) or grammar._matcher.is_stopped():
                return [256]
            grammar.advance(token)
        return grammar.allowed().nonzero()[0].tolist()

    for prompt in prompts(2, seed=110, longest=30):
        found = ask(Request(prompt, 60, Sampling(num_beams=3), n=3, schema=schema)).wait()
        expected = beams_of(reference, prompt, 3, num_beams=3, max_new_tokens=60, prefix_allowed_tokens_fn=allowed)
        assert [found.ids(index) for index in range(3)] == expected
        values = [json.loads(found.text(index)) for index in range(3)]
        assert all(value["kind"] in ("cat", "cow", "dog") and value["legs"] in (2, 4) for value in values)
        assert len({str(value) for value in values}) == 3
    only = ask(Request((1,), 60, Sampling(num_beams=3), n=2, schema=json.dumps({"const": "one"}))).wait()
    assert [json.loads(only.text(index)) for index in range(2)] == ["one", "one"]


def table(prefix: tuple[int, ...]):
    """Some ln p of five tokens after `prefix`."""
    import torch

    return torch.randn(5, generator=torch.Generator().manual_seed(hash(prefix) % 2**31)).mul(1.5).log_softmax(-1)


def search(words, beams: int, new: int, length_penalty: float, n: int) -> list[tuple[int, ...]]:
    """Beam search over `table`; token 4 ends."""
    import torch

    from deploy.engine.beams import GroupedSearch

    request = Request((), new, Sampling(num_beams=beams, length_penalty=length_penalty), n=n, force_words=words)
    found, ids = GroupedSearch(request, frozenset({4})), [()] * beams
    while not found.done:
        parents, tokens = found.step(torch.stack([table(prefix) for prefix in ids]))
        ids = [(*ids[parent], token) for parent, token in zip(parents, tokens, strict=True)] or ids
    return found.answers()


def everything(words, new: int, length_penalty: float) -> list[tuple[int, ...]]:
    """All answers that hold the words, the best first."""
    found = []
    for length in range(1, new + 1):
        for body in itertools.product(range(4), repeat=length - 1):
            for last in range(5) if length == new else (4,):
                ids = (*body, last)
                text = "".join(map(str, ids))
                if all(any("".join(map(str, spelling)) in text for spelling in word) for word in words):
                    score = sum(float(table(ids[:at])[token]) for at, token in enumerate(ids))
                    found.append((score / length**length_penalty, ids))
    return [ids for _, ids in sorted(found, reverse=True)]


WORDS = [
    (((1, 2),), ((3,),)),
    (((1, 1, 2),),),
    (((0, 1), (2, 2)), ((3, 3),)),  # either of two spellings
]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_words_that_must_appear(words, length_penalty):
    """With beams enough the best of all answers; with few, none that lacks a word."""
    best = everything(words, 5, length_penalty)
    assert search(words, 700, 5, length_penalty, 6) == best[:6]
    few = search(words, 4, 5, length_penalty, 3)
    assert few and len(set(few)) == len(few) and set(few) <= set(best) and best.index(few[0]) < 0.2 * len(best)


def test_progress_through_words():
    progress = Progress((((1, 1, 2),), ((5,),)))
    for token, met in [(1, 1), (1, 2), (1, 2), (3, 0), (5, 1), (1, 2), (1, 3), (2, 4)]:
        progress = progress.after(token)
        assert progress.met == met
    assert not progress.left and progress.wanted() == set()
    assert Progress((((1, 2), (1, 3)), ((4,),))).after(1).wanted() == {2, 3, 1, 4}


def test_words_in_answers(served, ask, engine, baseline):
    """Through the engine and the server; a search that meets max_tokens before all words gives what it has."""
    for prompt in prompts(2, seed=120):
        answers = ask(Request(prompt, 16, Sampling(num_beams=4), n=2, force_words=(((7, 8, 9),), ((200,), (201,))))).wait()
        for index in range(2):
            ids = answers.ids(index)
            assert "7, 8, 9" in str(ids) and {200, 201} & set(ids)
    body = served.chat(num_beams=4, max_tokens=20, force_words=["cat", "dog"], bad_words=["e", "a cat"]).json()
    text = body["choices"][0]["message"]["content"]
    assert "cat" in text and "dog" in text and "e" not in text and "a cat" not in text
    several = served.complete("x", num_beams=4, num_beam_groups=2, diversity_penalty=2.0, max_tokens=6, n=4).json()["choices"]
    assert len({choice["text"] for choice in several}) > 2
    refused = served.complete("x", num_beams=4, num_beam_groups=3, diversity_penalty=1.0)
    assert refused.status_code == 400 and "must divide" in refused.json()["error"]["message"]
    assert served.complete("x", bad_words=[""]).status_code == 400
