"""The engine's answers against transformers.generate, whoever else runs."""

import json
import random
import time

import pytest
from served_models import SIZES, Answers, save_model

from deploy.engine.request import Busy, Refused, Request, Sampling

GREEDY = Sampling(temperature=0)


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.randrange(256) for _ in range(chance.randint(1, longest))) for _ in range(count)]


def generate(model, prompt, **settings) -> list[int]:
    """New ids of transformers' own generation."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    settings = dict(do_sample=False, pad_token_id=256) | settings
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def test_greedy_is_generate_whoever_joins_and_leaves(ask, reference, baseline):
    chance = random.Random(1)
    asked = []
    for prompt in prompts(14):
        length = chance.randint(1, 40)
        asked.append((prompt, length, ask(Request(prompt, length, GREEDY))))
        time.sleep(chance.random() * 0.02)
    for prompt, length, answers in asked:
        expected = generate(reference, prompt, max_new_tokens=length)
        assert answers.wait().ids() == expected
        assert answers.finish() == ("stop" if expected[-1] == 256 else "length")
    assert len({tuple(answers.ids()) for _, _, answers in asked}) > 10


def family(name: str):
    import transformers as tf

    sizes = {**SIZES, "vocab_size": 260}
    windowed = sizes | dict(head_dim=16, sliding_window=12)
    return {
        "mistral": lambda: tf.MistralConfig(**windowed),
        "qwen3": lambda: tf.Qwen3Config(**sizes, head_dim=24),
        "phi3_longrope": lambda: tf.Phi3Config(
            **sizes | dict(max_position_embeddings=512, original_max_position_embeddings=128),
            rope_scaling={"type": "longrope", "short_factor": [1.2] * 8, "long_factor": [3.0] * 8},
        ),
        "gemma2": lambda: tf.Gemma2Config(**windowed, attn_logit_softcapping=1.5, final_logit_softcapping=4.0),
        "gemma3": lambda: tf.Gemma3TextConfig(**windowed | dict(num_hidden_layers=6)),
        "mixtral": lambda: tf.MixtralConfig(**sizes, num_local_experts=4),
    }[name]()


@pytest.mark.parametrize("name", ["mistral", "qwen3", "phi3_longrope", "gemma2", "gemma3", "mixtral"])
def test_families(name, tmp_path):
    """Windows, caps, per-head norms, experts and stretched RoPE."""
    from transformers import AutoModelForCausalLM

    from deploy.engine.engine import Engine

    folder = save_model(tmp_path / name, family(name))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    engine = Engine(folder, rows=3, prefill_tokens=16, dtype="float32")
    try:
        assert engine.context == (128 if name == "phi3_longrope" else 256)
        asked = [(p, Answers(engine, Request(p, 12, GREEDY))) for p in prompts(4, longest=40)]
        for prompt, answers in asked:
            assert answers.wait().ids() == generate(model, prompt, max_new_tokens=12)
    finally:
        engine.close()


def test_a_seed_is_torchs(ask, reference, baseline):
    """Sampling draws what transformers draws from the same seed, through all filters."""
    import torch

    settings = dict(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
    prompt = prompts(1, seed=3)[0]
    answers = [ask(Request(prompt, 20, Sampling(seed=seed, **settings))) for seed in (5, 6, 5)]
    for seed, answer in zip((5, 6, 5), answers, strict=True):
        torch.manual_seed(seed)
        assert answer.wait().ids() == generate(reference, prompt, max_new_tokens=20, do_sample=True, **settings)
    assert answers[0].ids() != answers[1].ids()


def test_several_answers_read_the_prompt_once(ask, engine, baseline):
    prompt = prompts(1, seed=4)[0]
    before = engine.stats().prompt_tokens
    several = ask(Request(prompt, 10, Sampling(seed=7), n=3)).wait()
    assert engine.stats().prompt_tokens - before == len(prompt)
    for index in range(3):
        assert several.ids(index) == ask(Request(prompt, 10, Sampling(seed=7 + index))).wait().ids()
    assert len({tuple(several.ids(index)) for index in range(3)}) == 3


def test_penalties_by_hand():
    import torch

    from deploy.engine.sampling import State, choose
    from deploy.engine.text import TextStream

    def chosen(**settings) -> int:
        state = State(Sampling(temperature=0, **settings), TextStream(None, ()), 2, None, None, None)
        return choose(torch.tensor([[3.0, 2.9, 2.0, 1.0]]), [state], [[0, 3, 0, 0, 1]], [None])[0]

    assert chosen() == 0
    assert chosen(presence_penalty=0.5) == 0  # 2.5, 2.4: both came
    assert chosen(frequency_penalty=0.2) == 1  # 2.6, 2.7: twice and once
    assert chosen(frequency_penalty=0.5, presence_penalty=0.5) == 2  # 1.5, 1.9, 2.0
    assert chosen(repetition_penalty=2.0) == 2  # 1.5, 1.45, 2.0, 0.5: the prompt counts too


def test_logprobs_are_the_models_own(ask, reference, baseline):
    import torch

    prompt = prompts(1, seed=11)[0]
    answers = ask(Request(prompt, 8, Sampling(temperature=0.5, seed=1), logprobs=3)).wait()
    ids = answers.ids()
    found = [each for output in answers.outputs for each in output.logprobs]
    log_p = torch.log_softmax(reference(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1], dim=-1)
    for place, each in enumerate(found):
        assert each.id == ids[place]
        assert each.logprob == pytest.approx(float(log_p[place, each.id]), abs=1e-4)
        assert [value for _, value in each.top] == pytest.approx(log_p[place].topk(3).values.tolist(), abs=1e-4)
    assert len(found) == 8


def test_stop_texts_and_ignored_ends(ask, reference, baseline, engine):
    prompt = prompts(1, seed=12)[0]
    plain = ask(Request(prompt, 30, GREEDY)).wait()
    stop = next(c for c in plain.text()[5:] if c.isascii() and c.isprintable())
    stopped = ask(Request(prompt, 30, GREEDY, stop=(stop, "never met"))).wait()
    assert stopped.text() == plain.text()[: plain.text().index(stop)] and stopped.finish() == "stop"
    ends = next(p for p in prompts(200, seed=13) if 256 in generate(reference, p, max_new_tokens=20))
    assert ask(Request(ends, 20, GREEDY)).wait().finish() == "stop"
    ignored = ask(Request(ends, 20, GREEDY, ignore_eos=True)).wait()
    assert ignored.finish() == "length" and len(ignored.ids()) == 20


def test_json_schema(ask, baseline):
    from jsonschema import validate

    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "legs": {"type": "integer", "minimum": 0, "maximum": 9},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        },
        "required": ["kind", "legs", "tags"],
        "additionalProperties": False,
    }
    for seed in range(4):
        request = Request(prompts(1, seed=seed)[0], 150, Sampling(seed=seed), schema=json.dumps(schema), stop=())
        answers = ask(request).wait()
        if answers.finish() == "stop":  # else whitespace took all tokens
            validate(json.loads(answers.text()), schema)
    assert answers.finish() == "stop"
    with pytest.raises(Refused, match="schema"):
        ask(Request((1,), 5, GREEDY, schema='{"type": "nonsense"}'))


def test_adapters_share_a_batch(tiny, reference, tmp_path):
    """Rows with different adapters and none run in one step, each as PEFT runs it alone."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from deploy.engine.engine import Engine

    folders = {}
    for number, name in enumerate(["polite", "v1.5/terse"]):
        torch.manual_seed(number)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny),
            LoraConfig(r=4 + number, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        )
        folders[name] = tmp_path / str(number)
        model.save_pretrained(folders[name])
    engine = Engine(tiny, rows=4, adapters=folders, dtype="float32")
    try:
        prompt = prompts(1, seed=20)[0]
        asked = {name: Answers(engine, Request(prompt, 15, GREEDY, adapter=name)) for name in (None, *folders)}
        assert asked[None].wait().ids() == generate(reference, prompt, max_new_tokens=15)
        for name, folder in folders.items():
            alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder).eval()
            assert asked[name].wait().ids() == generate(alone, prompt, max_new_tokens=15)
        assert len({tuple(answers.ids()) for answers in asked.values()}) == 3
        with pytest.raises(Refused, match="no adapter"):
            engine.submit(Request(prompt, 5, adapter="rude"), print)
    finally:
        engine.close()


def test_cancelled_late_and_failed(ask, engine, reference, baseline, monkeypatch):
    prompt, other = prompts(2, seed=30)
    long = Request(prompt, 150, GREEDY, ignore_eos=True)
    running = ask(long)
    while not running.outputs:
        time.sleep(0.001)
    engine.cancel(running.number)
    assert running.wait().finish() == "cancelled" and len(running.ids()) < 150
    late = ask(Request(prompt, 150, GREEDY, ignore_eos=True, timeout=0.01)).wait()
    assert late.finish() == "timeout" and "0.01 s" in late.outputs[-1].message
    survivor = ask(Request(other, 5, GREEDY)).wait()
    assert survivor.ids() == generate(reference, other, max_new_tokens=5)

    def broken(*args):
        raise RuntimeError("no more")

    monkeypatch.setattr(engine.network, "forward", broken)
    failed = ask(Request(prompt, 5, GREEDY)).wait()
    assert failed.finish() == "error" and "RuntimeError" in failed.outputs[-1].message
    monkeypatch.undo()
    assert engine.alive and ask(Request(other, 5, GREEDY)).wait().ids() == survivor.ids()
    monkeypatch.setattr("deploy.engine.engine.choose", broken)
    assert ask(Request(prompt, 5, GREEDY)).wait().finish() == "error"
    nothing = ask(Request(prompt, 5, Sampling(num_beams=2), bad_words=tuple((token,) for token in range(260)))).wait()
    assert nothing.finish() == "error"
    monkeypatch.undo()
    assert engine.alive and ask(Request(other, 5, GREEDY)).wait().ids() == survivor.ids()


def test_a_cancelled_row_is_filled_by_one_that_runs(ask, engine, reference, baseline):
    """Rows that decode have no holes: the last one moves, also when a request ends between two steps."""
    first, *others = prompts(3, seed=31)
    leaving = ask(Request(first, 150, GREEDY, ignore_eos=True))
    staying = [ask(Request(prompt, 40, GREEDY)) for prompt in others]
    while not all(answers.outputs for answers in (leaving, *staying)):
        time.sleep(0.001)
    engine.cancel(leaving.number)
    assert leaving.wait().finish() == "cancelled"
    assert [a.wait().ids() for a in staying] == [generate(reference, prompt, max_new_tokens=40) for prompt in others]


def test_an_engine_that_fails_tells_everyone(tiny, monkeypatch):
    from deploy.engine.engine import Engine

    engine = Engine(tiny, rows=1)
    running, waiting = (Answers(engine, Request((1, 2), 200, GREEDY, ignore_eos=True)) for _ in range(2))
    while not running.outputs:
        time.sleep(0.001)

    def broken():
        raise RuntimeError("no more")

    monkeypatch.setattr(engine, "_sweep", broken)
    assert running.wait().finish() == waiting.wait().finish() == "error"
    with pytest.raises(Busy):
        engine.submit(Request((1,), 1), print)
    engine.close()
    assert not engine.alive


def test_numbers_gone_wrong_stay_in_their_request(ask, engine, reference, baseline, monkeypatch):
    """A NaN ends its own request only, and is not in the cache for the next one."""
    import torch

    prompts_ = prompts(5, seed=40)
    for layer in engine.network.cache.layers:
        assert not layer.keys.isnan().any() and not layer.values.isnan().any()
    forward, spoilt = engine.network.forward, []

    def wrong(rows, tokens, starts, *more):
        logits = forward(rows, tokens, starts, *more)
        if not spoilt and len(tokens[0]) > 1 and engine.stats().running > 2:
            spoilt.append(rows[0])
            logits[0] = float("nan")
            engine.network.cache.layers[0].values[rows[0], :, starts[0] : starts[0] + len(tokens[0])] = float("nan")
        return logits

    monkeypatch.setattr(engine.network, "forward", wrong)
    asked = [ask(Request(prompt, 10, GREEDY)) for prompt in prompts_]
    finished = [answers.wait().finish() for answers in asked]
    assert finished.count("error") == 1 and "no number" in asked[finished.index("error")].outputs[-1].message
    for prompt, answers, finish in zip(prompts_, asked, finished, strict=True):
        assert finish == "error" or answers.ids() == generate(reference, prompt, max_new_tokens=10)
    assert not any(torch.isnan(layer.values).any() for layer in engine.network.cache.layers)


def test_a_full_queue_says_when(ask, engine, baseline):
    asked, busy = [], None
    try:
        for _ in range(60):
            asked.append(ask(Request(tuple(range(50)), 200, GREEDY, ignore_eos=True)))
    except Busy as error:
        busy = error
    assert busy is not None and busy.retry_after >= 1 and 32 <= len(asked) <= 40
    for answers in asked:
        engine.cancel(answers.number)
    assert all(answers.wait().finish() == "cancelled" for answers in asked)


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request(tuple(range(256)), 1), "the prompt has 256 tokens, the context 256"),
        (Request((1,) * 200, 57), "200 tokens of prompt and 57 new ones"),
        (Request((1,), 5, n=5), "at most 4"),
        (Request((1,), 5, Sampling(num_beams=9)), "at most 4"),
        (Request((1,), 5, Sampling(num_beams=2), n=3), "more than num_beams"),
        (Request((1,), 5, Sampling(num_beams=2), stop=("x",)), "beam search goes without"),
        (Request((1,), 5, Sampling(num_beams=3, beam_groups=2, diversity_penalty=1.0)), "must divide num_beams"),
        (Request((1,), 5, Sampling(num_beams=4, beam_groups=2)), "goes with a diversity_penalty"),
        (Request((1,), 5, Sampling(beam_groups=2, diversity_penalty=1.0)), "need num_beams above 1"),
        (Request((1,), 5, force_words=(((2,),),)), "need num_beams above 1"),
        (Request((1,), 1, Sampling(num_beams=2), force_words=(((2, 3),),)), "are more than max_tokens=1"),
        (Request((1,), 5, bad_words=((2,),), schema="{}"), "words and a schema"),
    ],
)
def test_refused_before_it_waits(ask, request_, message):
    with pytest.raises(Refused, match=message):
        ask(request_)


def test_close_ends_what_runs(tiny):
    from deploy.engine.engine import Engine

    engine = Engine(tiny, rows=1)
    running, waiting = (Answers(engine, Request((1, 2), 200, GREEDY, ignore_eos=True)) for _ in range(2))
    engine.close()
    assert running.wait().finish() == waiting.wait().finish() == "cancelled"
    assert not engine.alive
    with pytest.raises(Busy):
        engine.submit(Request((1,), 1), print)
