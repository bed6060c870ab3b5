"""Sampling with shared prompts against transformers' generate, and the distribution that is drawn from."""

import pytest
import torch
from grpo_models import write_model

from nemo_ext.grpo import sampling

PROMPTS = [[8, 9, 10, 11], [20, 21], [30, 31, 32, 33, 34, 35, 36, 37, 38]]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3", "qwen3"])
def model(request, tmp_path_factory):
    from nemo_ext import platform

    platform.activate()
    return load(write_model(tmp_path_factory.mktemp("family") / request.param, request.param))


def test_greedy_answers_are_those_of_generate(model):
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=1)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    found = sampling.sample(model, PROMPTS, 2, max_answer=20, temperature=0.0, ends=[0], pad=1)
    assert found[::2] == expected and found[1::2] == expected


def test_answers_end_at_their_end_token_and_the_others_go_on(model):
    """An end token that some answers draw early: each is what it would be alone."""
    first = sampling.sample(model, PROMPTS, 1, max_answer=12, temperature=0.0, ends=[0], pad=1)
    end = first[1][3]
    found = sampling.sample(model, PROMPTS, 1, max_answer=12, temperature=0.0, ends=[end], pad=1)
    for answer, whole in zip(found, first, strict=True):
        expected = whole[: whole.index(end) + 1] if end in whole else whole
        assert answer == expected
    assert len({len(answer) for answer in found}) > 1


def test_the_seed_decides(tiny):
    model = load(tiny)

    def draw(seed, batch=None):
        torch.manual_seed(seed)
        return sampling.sample(model, PROMPTS, 4, max_answer=8, temperature=1.0, ends=[0], pad=1, batch=batch)

    assert draw(1) == draw(1) != draw(2)
    assert len(draw(1, batch=4)) == 12 and all(0 < len(answer) <= 8 for answer in draw(1, batch=4))
    assert draw(1) != [draw(1)[0]] * 12  # answers of a group differ


@pytest.mark.parametrize("top_p, kept", [(1.0, [0.5, 0.3, 0.15, 0.05]), (0.6, [0.625, 0.375, 0, 0]), (0.4, [1, 0, 0, 0])])
def test_what_is_drawn(top_p, kept):
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]].expand(20000, 4)
    drawn = sampling._draw(logits * 2.0, temperature=2.0, top_p=top_p)
    shares = torch.bincount(drawn, minlength=4)[[1, 3, 0, 2]] / 20000
    torch.testing.assert_close(shares, torch.tensor(kept, dtype=torch.float32), rtol=0, atol=0.015)


def test_temperature_sharpens():
    torch.manual_seed(0)
    drawn = sampling._draw(torch.tensor([[0.0, 1.0]]).expand(20000, 2), temperature=0.5, top_p=1.0)
    assert drawn.float().mean().item() == pytest.approx(1 / (1 + torch.tensor(-2.0).exp().item()), abs=0.015)
