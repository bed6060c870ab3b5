import dataclasses

import numpy as np
import pytest
from chat_samples import CONVERSATIONS, SPECIAL, TEMPLATES, THINKING, TOOLS, WITH_SYSTEM, WITH_TOOLS, turns, write_tokenizer
from corpus_texts import varied_texts

from nemo_ext.data.chat import templates
from nemo_ext.data.chat.formats import parse
from nemo_ext.data.chat.render import Renderer, Settings
from nemo_ext.errors import UserError


def conversation(messages, tools=()):
    return parse({"messages": messages, "tools": list(tools)})


def render(folder, messages, tools=(), **settings):
    renderer = Renderer(folder, Settings(**{"seq_length": 10_000, **settings}))
    return renderer, renderer.render(conversation(messages, tools))


def trained_texts(renderer, sample):
    """The runs of trained tokens, decoded."""
    runs, current = [], []
    for token, weight in zip([*sample.ids.tolist(), 0], [*sample.weights.tolist(), 0], strict=True):
        if weight:
            current.append(token)
        elif current:
            runs.append(renderer.tokenizer.decode(current, skip_special_tokens=False))
            current = []
    return runs


def random_conversations():
    texts = varied_texts(120)
    return [turns(*texts[i : i + 4]) for i in range(0, 120, 4) if all(text.strip() for text in texts[i : i + 4])]


CASES = [(name, messages, ()) for name in TEMPLATES for messages in CONVERSATIONS]
CASES += [(name, WITH_SYSTEM, ()) for name in ("chatml", "llama3", "qwen")] + [("qwen", WITH_TOOLS, TOOLS)]


@pytest.mark.parametrize("marked", [False, True])
def test_masks_equal_transformers(tmp_path, bare, template_files, marked):
    """Without generation tags, found by rendering prefixes; with them, taken from the tags: both transformers' own mask."""
    compared = 0
    renderers = {}
    for name in TEMPLATES:
        (tmp_path / name).write_text(TEMPLATES[name])
        file = tmp_path / name if marked else template_files / name
        renderers[name] = Renderer(bare, Settings(10_000, template=str(file)))
    cases = CASES + [(name, messages, ()) for name in TEMPLATES for messages in random_conversations()]
    for name, messages, tools in cases:
        renderer = renderers[name]
        result = renderer.render(conversation(messages, tools))
        (sample,) = result.samples
        expected = renderer.tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, chat_template=TEMPLATES[name], return_assistant_tokens_mask=True,
            return_dict=True, tokenize=True,
        )  # fmt: skip
        assert sample.ids.tolist() == expected["input_ids"]
        # transformers forgets the last bytes of a character of several tokens: none where a special token ends the turn
        assert (sample.weights > 0).astype(int).tolist() == expected["assistant_masks"], (name, messages)
        assert set(sample.weights.tolist()) == {0, 100}
        compared += 1
    assert compared > 100


def test_by_hand(bare, template_files):
    renderer, result = render(bare, turns("Hi", "Hello!", "Bye", "Now"), template=str(template_files / "chatml"))
    (sample,) = result.samples
    pieces = [("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", 0), ("Hello!<|im_end|>", 100),
              ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", 0), ("Now<|im_end|>", 100), ("\n", 0)]  # fmt: skip
    ids = [(i, weight) for text, weight in pieces for i in renderer.tokenizer(text, add_special_tokens=False).input_ids]
    assert list(zip(sample.ids.tolist(), sample.weights.tolist(), strict=True)) == ids


def test_one_bos(bare, template_files):
    for name, start in (("llama3", "<|begin_of_text|>"), ("mistral", "<s>")):
        renderer, result = render(bare, turns("Hi", "Hello!"), template=str(template_files / name))
        ids = result.samples[0].ids.tolist()
        assert ids[0] == renderer.tokenizer.convert_tokens_to_ids(start) and ids.count(ids[0]) == 1
    for name in templates.TEMPLATES:
        renderer, result = render(bare, turns("Hi", "Hello!"), template=name)
        ids = result.samples[0].ids.tolist()
        assert ids[0] == renderer.tokenizer.bos_token_id and ids.count(ids[0]) == 1


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_named_templates_end_every_turn_with_one_token(bare, tmp_path, name):
    renderer, result = render(bare, turns("Hi", "Hello!", "Bye", "Now", system="Short."), template=name)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    assert trained_texts(renderer, result.samples[0]) == [f"Hello!{end}", f"Now{end}"]
    assert not result.split and "Short." in result.samples[0].text
    assert end in SPECIAL
    text = render(bare, WITH_TOOLS, TOOLS, template=name)[1].samples[0].text
    assert '"Adds."' in text and '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>' in text and "5" in text


def test_a_base_tokenizer_gets_chatml_and_its_own_end(tmp_path, bare, tokenizer_dir):
    assert Renderer(bare, Settings(64)).name == "chatml"
    renderer, result = render(tokenizer_dir, turns("Hi", "Hello!"))  # knows neither <|im_end|> nor a post-processor
    assert renderer.name == "chatml" and trained_texts(renderer, result.samples[0]) == ["Hello!<|eos|>"]
    assert "<|bos|>" not in result.samples[0].text
    own = write_tokenizer(tmp_path / "own", TEMPLATES["llama3"])
    assert Renderer(own, Settings(64)).name == "the tokenizer's own"
    with pytest.raises(UserError, match="template=nothing: neither a file nor one of chatml, llama3, zephyr, alpaca"):
        Renderer(bare, Settings(64, template="nothing"))


def test_what_counts(bare, template_files):
    messages = turns("Hi", "Hello!", "Bye", "Now", "?", "So")
    messages[1]["weight"], messages[3]["train"] = 0.5, False
    chatml = str(template_files / "chatml")
    renderer, result = render(bare, messages, template=chatml)
    (sample,) = result.samples
    assert trained_texts(renderer, sample) == ["Hello!<|im_end|>", "So<|im_end|>"]
    assert sorted(set(sample.weights.tolist())) == [0, 50, 100]
    renderer, result = render(bare, messages, template=chatml, train_on="last")
    assert trained_texts(renderer, result.samples[0]) == ["So<|im_end|>"]
    renderer, result = render(bare, messages, template=chatml, train_on="all")
    (sample,) = result.samples
    assert sorted(set(sample.weights.tolist())) == [0, 50, 100]
    assert renderer.tokenizer.decode(sample.ids[sample.weights == 0]) == "Now<|im_end|>"
    for message in messages:
        message.pop("train", None), message.update(weight=0)
    assert render(bare, messages, template=chatml)[1].dropped == "masked"


def test_too_long(bare, template_files):
    messages = turns("Hi", "Hello!", "Bye", "Now", "?", "So " * 50, system="Be brief.")
    chatml = str(template_files / "chatml")
    renderer, whole = render(bare, messages, template=chatml)
    _, two = render(bare, messages[:5], template=chatml)
    length = len(two.samples[0].ids)
    for seq in (length - 1, len(whole.samples[0].ids) - 2):
        _, cut = render(bare, messages, template=chatml, seq_length=seq)
        assert cut.truncated and cut.samples[0].ids.tolist() == two.samples[0].ids.tolist()
        assert cut.samples[0].weights.tolist() == two.samples[0].weights.tolist()
    _, exact = render(bare, messages, template=chatml, seq_length=len(whole.samples[0].ids) - 1)
    assert not exact.truncated and exact.samples[0].ids.tolist() == whole.samples[0].ids.tolist()
    _, one = render(bare, messages, template=chatml, seq_length=length - 2)
    assert trained_texts(renderer, one.samples[0]) == ["Hello!<|im_end|>"] and "Be brief." in one.samples[0].text
    assert render(bare, messages, template=chatml, seq_length=8)[1].dropped == "overlong"
    assert render(bare, messages, template=chatml, seq_length=length, overlong="drop")[1].dropped == "overlong"
    _, text = render(bare, messages, template=chatml, seq_length=length, train_on="all")
    assert text.samples[0].text == two.samples[0].text and text.samples[0].weights.all()


THOUGHTS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>Three and three.</think>6"},
]


def test_a_template_that_strips_earlier_reasoning_gives_a_sample_a_turn(tmp_path, bare):
    """What is trained is exactly what the model sees and writes at that turn."""
    (tmp_path / "thinking").write_text(THINKING)
    renderer, result = render(bare, THOUGHTS, template=str(tmp_path / "thinking"))
    assert result.split and len(result.samples) == 2
    for sample, count in zip(result.samples, (1, 3), strict=True):
        prompt = renderer.text(conversation(THOUGHTS), count, prompt=True)
        trained = [*np.flatnonzero(sample.weights)]
        assert renderer.tokenizer.decode(sample.ids[: trained[0]]) == prompt
        assert sample.ids[: trained[0]].tolist() == renderer.tokenizer(prompt, add_special_tokens=False).input_ids
    assert [trained_texts(renderer, sample) for sample in result.samples] == [
        ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"],
        ["<think>\nThree and three.\n</think>\n\n6<|im_end|>"],
    ]
    assert "Two and two" not in result.samples[1].text
    _, last = render(bare, THOUGHTS, template=str(tmp_path / "thinking"), train_on="last")
    assert not last.split and last.samples[0].ids.tolist() == result.samples[1].ids.tolist()
    _, short = render(bare, THOUGHTS, template=str(tmp_path / "thinking"), seq_length=len(result.samples[0].ids))
    assert short.truncated and [s.text for s in short.samples] == [result.samples[0].text]


def test_reasoning_where_the_template_knows_none(tmp_path, bare, template_files):
    renderer, result = render(bare, THOUGHTS, template=str(template_files / "chatml"))
    assert trained_texts(renderer, result.samples[0])[0] == "<think>\nTwo and two.\n</think>\n\n4<|im_end|>"
    renderer, result = render(bare, THOUGHTS, template=str(template_files / "chatml"), reasoning="drop")
    assert trained_texts(renderer, result.samples[0]) == ["4<|im_end|>", "6<|im_end|>"]
    # as DeepSeek-R1's: the prompt opens a thought that the template takes out of every turn
    stripping = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[/INST]{{ m.content.split('</think>')[-1] }}</s>{% else %}[INST]"
        "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[/INST]<think>\n{% endif %}"
    )
    (tmp_path / "stripping").write_text(stripping)
    with pytest.raises(UserError, match="leaves out the reasoning .* reasoning=drop"):
        render(bare, THOUGHTS, template=str(tmp_path / "stripping"))
    renderer, result = render(bare, THOUGHTS, template=str(tmp_path / "stripping"), reasoning="drop")
    assert trained_texts(renderer, result.samples[0]) == ["4</s>", "6</s>"]


def test_templates_that_refuse(tmp_path, bare, template_files):
    with pytest.raises(UserError, match="refuses the conversation: Only user and assistant roles"):
        render(bare, WITH_SYSTEM, template=str(template_files / "mistral"))
    (tmp_path / "broken").write_text("{% for m in messages %}{{ m.content }")
    with pytest.raises(UserError, match="the chat template .* refuses"):
        render(bare, WITH_SYSTEM, template=str(tmp_path / "broken"))
    (tmp_path / "hiding").write_text("{{ messages | length }} turns, the last says {{ messages[-1].content | length }}")
    with pytest.raises(UserError, match="does not show where turn 2, of the assistant, begins"):
        render(bare, turns("a", "b"), template=str(tmp_path / "hiding"))


def test_values_and_fingerprints(tmp_path, bare):
    (tmp_path / "dated").write_text("{{ date }}\n" + TEMPLATES["chatml"])
    settings = Settings(64, template=str(tmp_path / "dated"), values={"date": "1 May"})
    renderer = Renderer(bare, settings)
    assert renderer.text(conversation(turns("a", "b"))).startswith("1 May\n")
    others = [
        dataclasses.replace(settings, values={}),
        dataclasses.replace(settings, seq_length=65),
        dataclasses.replace(settings, train_on="last"),
        dataclasses.replace(settings, template=None),
    ]
    assert len({renderer.fingerprint, *(Renderer(bare, other).fingerprint for other in others)}) == 5
    assert Renderer(bare, settings).fingerprint == renderer.fingerprint
    with pytest.raises(UserError, match="train_on=some: choose assistant, all, last"):
        Settings(64, train_on="some")
