"""Multiple choice against log-softmax by hand, and the formats of questions."""

import json

import numpy as np
import pytest
import torch

from nemo_ext.errors import UserError
from nemo_ext.evaluation import multiple_choice, questions
from nemo_ext.evaluation.multiple_choice import exam
from nemo_ext.evaluation.questions import Question
from nemo_ext.evaluation.tasks import files

ROWS = [
    ("What is 2 + 2?", ("3", "4", "5", "6"), 1, "sums"),
    ("Which is an animal?", ("a text", "the lazy dog", "a model", "a word"), 1, "things"),
    ("What is 2 + 4?", ("6", "2", "4", "5"), 0, "sums"),
    ("Which is quick?", ("the fox", "the dog", "the loss", "the tokenizer"), 0, "things"),
    ("What is 4 + 4?", ("4", "2", "6", "8"), 3, "sums"),
    ("Which jumps over the lazy dog?", ("a model", "the text", "the fox", "a byte"), 2, "things"),
]
QUESTIONS = [Question(*row, place=f"line {i}") for i, row in enumerate(ROWS, 1)]


def read(path) -> list[Question]:
    return questions.read(files("mcq", str(path), f"mcq:{path}"))


def log_likelihood(model, prompt: str, answer: str) -> float:
    """ln p(answer | prompt), where the prompt's tokens begin those of prompt + answer."""
    before, whole = ([0, *model.tokenizer.encode(text, add_special_tokens=False)] for text in (prompt, prompt + answer))
    assert whole[: len(before)] == before
    with torch.inference_mode():
        log_p = torch.log_softmax(model.network(torch.tensor([whole])).logits[0].double(), -1)
    return sum(float(log_p[i - 1, whole[i]]) for i in range(len(before), len(whole)))


def test_letters_by_hand(chat_model):
    hits = []
    for text, choices, answer, _ in ROWS:
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
        prompt = f"The following are multiple choice questions (with answers).\n\n{text}\n{listed}Answer:"
        scores = [log_likelihood(chat_model, prompt, f" {letter}") for letter in "ABCD"]
        hits.append(int(np.argmax(scores)) == answer)
    plain = [Question(q.text, q.choices, q.answer, "", q.place) for q in QUESTIONS]
    result = multiple_choice.evaluate(chat_model, exam(plain))
    assert [pair[0] == 1.0 for pair in result.metrics[0].pairs] == hits
    assert result.metrics[0].value == sum(hits) / 6
    shown = [float(line.rsplit("(", 1)[1][:-1]) for line in result.examples[0]["answer"].splitlines()[1:]]
    text, choices, *_ = ROWS[0]
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
    prompt = f"The following are multiple choice questions (with answers).\n\n{text}\n{listed}Answer:"
    assert shown == pytest.approx([log_likelihood(chat_model, prompt, f" {letter}") for letter in "ABCD"], abs=6e-4)


def test_texts_by_hand(chat_model):
    found, skipped = multiple_choice._scores(chat_model, exam(QUESTIONS), QUESTIONS, "text", None)
    assert skipped == 0
    for (text, choices, *_), scores in zip(ROWS, found, strict=True):
        wanted = [log_likelihood(chat_model, f"{text}\nAnswer:", f" {c}") / len(c.encode()) for c in choices]
        assert scores == pytest.approx(wanted, abs=1e-5)


def test_batch_size_does_not_change_scores(chat_folder):
    from nemo_ext.evaluation.model import Model

    found = []
    for batch in (1, 7, 32):
        model = Model(chat_folder, "tiny", batch=batch)
        found.append([multiple_choice._scores(model, exam(QUESTIONS), QUESTIONS, kind, None)[0] for kind in ("letter", "text")])
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[0], found[2], rtol=0, atol=1e-5)


def test_examples_of_the_subject_stand_before_the_question():
    chosen = exam(QUESTIONS, shots=2)
    assert [q.place for q in chosen.questions] == ["line 5", "line 6"]  # two of each subject are examples
    prompt = multiple_choice.prompt(chosen, chosen.questions[1], letters=True)
    assert prompt == (
        "The following are multiple choice questions (with answers) about things.\n\n"
        "Which is an animal?\nA. a text\nB. the lazy dog\nC. a model\nD. a word\nAnswer: B\n\n"
        "Which is quick?\nA. the fox\nB. the dog\nC. the loss\nD. the tokenizer\nAnswer: A\n\n"
        "Which jumps over the lazy dog?\nA. a model\nB. the text\nC. the fox\nD. a byte\nAnswer:"
    )
    assert "the first 2 questions of each subject are the examples, and not scored" in chosen.about
    dev = exam(QUESTIONS[4:], shots=1, dev=QUESTIONS[:2])
    assert len(dev.questions) == 2 and [q.place for q in dev.examples["things"]] == ["line 2"]
    assert len(exam(QUESTIONS, limit=4).questions) == 4


def test_too_few_examples():
    with pytest.raises(UserError, match="shots=3: 3 questions of sums are too few"):
        exam(QUESTIONS, shots=3)
    with pytest.raises(UserError, match="0 examples in dev= of things are too few"):
        exam(QUESTIONS, shots=1, dev=QUESTIONS[:1])


def test_examples_go_where_the_context_is_short(chat_model):
    """256 positions hold a question, but not with eight examples."""
    short = [Question(f"{i} + {i}?", (str(i), str(2 * i), "a word"), 1, "", f"line {i}") for i in range(12)]
    chosen = exam(short, shots=8)
    result = multiple_choice.evaluate(chat_model, chosen)
    assert "4 questions with fewer examples, to fit the model's context" in result.about
    requests, skipped = multiple_choice._requests(chat_model, chosen, chosen.questions[0], True)
    assert 0 < skipped < 8 and max(len(r.ids) for r in requests) <= 257
    longer = [0, *chat_model.encode(multiple_choice.prompt(chosen, chosen.questions[0], True, skipped - 1) + " A")]
    assert len(longer) > 257
    with pytest.raises(UserError, match=r"line 0: the question has \d+ tokens, tiny-chat 256 positions"):
        multiple_choice.evaluate(chat_model, exam([Question("word " * 300, ("3", "4"), 1, "", "line 0")]))


def test_chinese_words_around_chinese_questions():
    chosen = exam([Question("中国的首都是？", ("上海", "北京"), 1, "地理", "line 1")])
    prompt = multiple_choice.prompt(chosen, chosen.questions[0], letters=True)
    assert prompt.startswith("以下是关于地理的单项选择题") and prompt.endswith("A. 上海\nB. 北京\n答案：")


def test_subjects_and_both_scores(chat_model):
    seen = []
    result = multiple_choice.evaluate(chat_model, exam(QUESTIONS), "both", progress=seen.append)
    assert [m.name for m in result.metrics] == ["accuracy", "accuracy by text"] and seen[-1] == 12
    table = result.tables[0]
    assert [row[0] for row in table.rows] == ["sums", "things", "mean of the subjects"]
    assert table.rows[2][1] == pytest.approx((table.rows[0][1] + table.rows[1][1]) / 2)
    assert table.rows[0][4] == 3


def test_formats(tmp_path):
    wanted = ("Which, then?", ("one", "two, or so", "three", "four"), 2)
    contents = {
        "mmlu_test.csv": 'Which\\, then?,one,"two, or so",three,four,C\n'.replace("Which\\, then?", '"Which, then?"'),
        "ceval_val.csv": 'id,question,A,B,C,D,answer,explanation\n0,"Which, then?",one,"two, or so",three,four,C,because\n',
        "cmmlu.csv": ',Question,A,B,C,D,Answer\n0,"Which, then?",one,"two, or so",three,four,C\n',
        "letters.jsonl": {"question": "Which, then?", "A": "one", "B": "two, or so", "C": "three", "D": "four", "answer": "c"},
        "index.jsonl": {"question": "Which, then?", "choices": ["one", "two, or so", "three", "four"], "answer": 2},
        "text.json": [{"question": "Which, then?", "choices": ["one", "two, or so", "three", "four"], "answer": "three"}],
        "arc.jsonl": {
            "question": "Which, then?",
            "choices": {"text": ["one", "two, or so", "three", "four"], "label": ["1", "2", "3", "4"]},
            "answerKey": "3",
        },
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
        (found,) = read(path)
        assert (found.text, found.choices, found.answer) == wanted, name
        assert found.subject == ""


def test_subjects_of_a_column_and_of_a_folder(tmp_path):
    (tmp_path / "with.jsonl").write_text('{"question": "q", "choices": ["x", "y"], "answer": 0, "subject": "law"}\n')
    assert read(tmp_path / "with.jsonl")[0].subject == "law"
    folder = tmp_path / "test"
    folder.mkdir()
    for name in ("world_religions_test.csv", "anatomy_test.csv"):
        (folder / name).write_text("q,1,2,3,4,A\n")
    assert [q.subject for q in read(folder)] == ["anatomy", "world_religions"]


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("a.csv", "q,1,2,3,4,A\nq,1,2,3,4\n", "a.csv, line 2: 5 fields where 6 belong"),
        ("a.csv", "q,1,2,3,4,E\n", "line 1: the answer 'E' is none of the 4 choices"),
        ("a.csv", "q,1,,3,4,A\n", "line 1: choice B is missing or empty"),
        ("a.csv", "question,answer\nq,A\n", "line 2: no choices"),
        ("a.csv", "q,A\n", "line 1: 2 fields are not question,A,B,C,D,answer"),
        ("a.csv", "", "there is no question in it"),
        ("a.csv", 'q,1,"2,3,4,A\n', "not CSV"),
        ("a.jsonl", '{"question": "q", "choices": ["x"], "answer": 0}\n', "line 1: no choices"),
        ("a.jsonl", '{"question": "q", "choices": ["x", "y"], "answer": 2}\n', "line 1: the answer 2 is none"),
        ("a.jsonl", '{"question": "q", "choices": ["x", "y"]}\n', 'line 1: no "answer"'),
        ("a.jsonl", '{"choices": ["x", "y"], "answer": 0}\n', 'line 1: no "question"'),
        ("a.jsonl", '{"question": "q", "choices": "xy", "answer": 0}\n', "line 1: the choices are a str"),
        ("a.jsonl", '{"question": "q", "choices": ["x", "y"], "answer": 0}\n{"question"\n', "line 2: not JSON"),
        ("a.txt", "q", "unknown type of file"),
    ],
)
def test_broken_files(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert words in str(error.value) and "\n" not in str(error.value)
