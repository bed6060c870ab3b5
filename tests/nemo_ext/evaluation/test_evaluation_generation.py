"""Answers against a greedy search by hand, and the records that prompts come from."""

import json

import pytest
import torch

from nemo_ext.errors import UserError
from nemo_ext.evaluation import generation
from nemo_ext.evaluation.generation import Prompt
from nemo_ext.evaluation.model import Answer, Model
from nemo_ext.evaluation.tasks import files

WANTED = dict(max_new_tokens=12, temperature=0.0, seed=0)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(({"role": "user", "content": text},), ("",), f"line {i}") for i, text in enumerate(texts, 1)]


def greedy(model: Model, ids: list[int], steps: int) -> list[int]:
    """The likeliest token after another, without a cache."""
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < steps:
            token = int(model.network(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == 1:
                break
            new.append(token)
    return new


TEXTS = ("The quick brown", "A", "Perplexity is the exponential of the mean loss; bits", "Which of these is right?")


def test_greedy_answers_by_hand(model):
    found = generation.answers(model, prompts(*TEXTS), **WANTED)
    for text, answer in zip(TEXTS, found, strict=True):
        new = greedy(model, [0, *model.encode(text)], 12)
        assert answer.text == model.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer.tokens == len(new) and answer.complete == (len(new) < 12)
    assert len({answer.text for answer in found}) > 1


def test_answers_do_not_depend_on_the_batch(folder, model):
    alone = generation.answers(Model(folder, "tiny", batch=1), prompts(*TEXTS), **WANTED)
    assert alone == generation.answers(model, prompts(*TEXTS), **WANTED)


def test_chat_template_where_there_is_one(chat_model):
    (found,) = generation.answers(chat_model, prompts("What is 2 + 2?"), **WANTED)
    ids = chat_model.encode("<user>What is 2 + 2?<assistant>")
    assert found.text == chat_model.tokenizer.decode(greedy(chat_model, ids, 12)).strip()
    (plain,) = generation.answers(chat_model, prompts("What is 2 + 2?"), chat=False, **WANTED)
    assert plain.text == chat_model.tokenizer.decode(greedy(chat_model, [0, *chat_model.encode("What is 2 + 2?")], 12)).strip()


def test_sampling_follows_its_seed(model):
    def sample(seed: int) -> list[Answer]:
        return generation.answers(model, prompts(*TEXTS), max_new_tokens=12, temperature=1.0, seed=seed)

    assert sample(1) == sample(1) != sample(2)


def test_end_and_stop_texts(model):
    (whole,) = generation.answers(model, prompts(TEXTS[0]), **WANTED)
    stop = whole.text[3:5]
    (cut,) = generation.answers(model, prompts(TEXTS[0]), stop=[stop], **WANTED)
    assert cut.text == whole.text[: whole.text.find(stop)].strip() and cut.complete and cut.tokens < whole.tokens
    assert model._answer([5, 6, 1, 7], {1}, ()) == Answer(model.tokenizer.decode([5, 6]).strip(), 2, True)


def test_prompts_that_cannot_be(model, chat_model):
    with pytest.raises(UserError, match=r"line 1: \d+ tokens and max_new_tokens=60 are more than the 64 positions of tiny"):
        generation.answers(model, prompts("The quick brown fox"), max_new_tokens=60, temperature=0.0, seed=0)
    turns = tuple({"role": role, "content": "x"} for role in ("user", "assistant", "user"))
    with pytest.raises(UserError, match="line 9: a prompt of 3 turns needs a chat template; tiny has none"):
        generation.answers(model, [Prompt(turns, (), "line 9")], **WANTED)
    with pytest.raises(UserError, match="chat=true: the tokenizer of tiny has no chat template"):
        generation.answers(model, prompts("x"), chat=True, **WANTED)
    assert len(generation.answers(chat_model, [Prompt(turns, (), "line 9")], **WANTED)) == 1


def read(path, need_references=True):
    return generation.read(files("generate", str(path), str(path)), need_references=need_references)


@pytest.mark.parametrize(
    "record,messages,references",
    [
        ({"prompt": "p", "reference": "r"}, [("user", "p")], ("r",)),
        ({"prompt": "p", "references": ["r", "s"], "system": "be"}, [("system", "be"), ("user", "p")], ("r", "s")),
        ({"question": "q", "answer": "#### 4"}, [("user", "q")], ("#### 4",)),
        ({"question": "q", "target": 4}, [("user", "q")], ("4",)),
        ({"instruction": "i", "input": "", "output": "o"}, [("user", "i")], ("o",)),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, [("user", "u")], ("a",)),
        ({"messages": [{"role": "user", "content": "u"}], "reference": "r"}, [("user", "u")], ("r",)),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, [("user", "u")], ("a",)),
    ],
)
def test_records(tmp_path, record, messages, references):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    (found,) = read(tmp_path / "a.jsonl")
    assert [(m["role"], m["content"]) for m in found.messages] == messages and found.references == references


@pytest.mark.parametrize(
    "content,words",
    [
        ('{"prompt": "p"}\n', 'line 1: no "reference"'),
        ('{"prompt": "p", "reference": "r"}\n{"reference": "r"}\n', 'line 2: no "prompt": the fields are reference'),
        ('{"prompt": "p", "reference": {}}\n', 'line 1: no "reference"'),
        ("[1]\n", "line 1: a list instead of an object"),
        ("{\n", "line 1: not JSON"),
        ("", "there is no prompt in it"),
    ],
)
def test_broken_records(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / "a.jsonl")


def test_a_judge_needs_no_reference(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"}\n{"messages": [{"role": "user", "content": "u"}]}\n')
    assert [(p.text, p.references) for p in read(tmp_path / "a.jsonl", need_references=False)] == [("p", ()), ("u", ())]


def test_scores_and_rows():
    asked = [
        Prompt(({"role": "user", "content": "2+2"},), ("4",), "line 1"),
        Prompt(({"role": "user", "content": "x"},), ("y",), ""),
    ]
    found = [Answer("it is 4", 3, True), Answer("y", 9, False)]
    result, rows = generation.score(asked, found, ("exact", "numeric"), ["how"])
    assert [(m.name, m.value, m.count) for m in result.metrics] == [("exact match", 0.5, 2), ("numeric match", 1.0, 1)]
    assert result.about == ["2 prompts", "how", "1 of 2 answers were cut off at the limit of new tokens"]
    assert rows[0] == {"prompt": "2+2", "references": ["4"], "output": "it is 4", "complete": True, "exact": 0.0, "numeric": 1.0}
    with pytest.raises(UserError, match="no reference has a number"):
        generation.score(asked[1:], found[1:], ("numeric",), [])
