"""Problems out of files of every kind, as prompts; what is refused, left out and held out."""

import json

import pytest
from grpo_models import write_tokenizer

from nemo_ext.errors import UserError
from nemo_ext.grpo import data

RECORDS = [{"question": f"{i} + 1 =", "answer": str(i + 1), "tests": [f"assert {i}"]} for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    write_tokenizer(folder)
    return folder


@pytest.fixture
def lines(tmp_path):
    def write(records, name="problems.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(file)

    return write


def test_a_record_becomes_a_row_with_prompt_and_ids(tokenizer, lines):
    from transformers import AutoTokenizer

    found = data.load(lines(RECORDS), tokenizer, system="Add.", heldout=0.0)
    row = found.train[3]
    assert found.heldout == [] and len(found.train) == 40
    assert {name: row[name] for name in ("question", "answer", "tests")} == RECORDS[3]
    assert row["prompt"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "3 + 1 ="}]
    text = "<|system|>Add.<|end|><|user|>3 + 1 =<|end|><|assistant|>"
    assert row["ids"] == AutoTokenizer.from_pretrained(tokenizer).encode(text)
    assert found.template is None


def test_files_of_every_kind_give_the_same_problems(tokenizer, lines, tmp_path):
    import datasets

    records = [{k: r[k] for k in ("question", "answer")} for r in RECORDS]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in records))
    table = datasets.Dataset.from_list(records)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    wanted = data.load(lines(records), tokenizer)
    for name in ("a.json", "a.csv", "a.parquet", "saved"):
        found = data.load(str(tmp_path / name), tokenizer)
        assert (found.train, found.heldout) == (wanted.train, wanted.heldout), name


def test_columns_by_name_and_chat_prompts(tokenizer, lines):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "1+1"}]
    file = lines([{"problem": turns, "solution": 2}])
    (row,) = data.load(file, tokenizer, question_key="problem", answer_key="solution", heldout=0.0).train
    assert row["question"] == "1+1" and row["answer"] == "2" and row["prompt"] == turns


def test_prompt_and_system_files(tokenizer, lines, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.\n")
    (tmp_path / "prompt.txt").write_text("Solve {question} now; {braces} stay\n")
    settings = dict(system=str(tmp_path / "system.txt"), prompt=str(tmp_path / "prompt.txt"), heldout=0.0)
    row = data.load(lines(RECORDS), tokenizer, **settings).train[0]
    assert [m["content"] for m in row["prompt"]] == ["Be brief.", "Solve 0 + 1 = now; {braces} stay"]
    assert row["question"] == "0 + 1 ="  # the reward sees the problem itself


def test_the_template_that_is_used_is_told(tokenizer, lines):
    found = data.load(lines(RECORDS), tokenizer, template="chatml", heldout=0.0)
    assert found.template.count("im_start") >= 1


def test_what_is_held_out_does_not_depend_on_place_or_neighbours(tokenizer, lines):
    first = data.load(lines(RECORDS), tokenizer, heldout=0.3, seed=5)
    held = {row["question"] for row in first.heldout}
    assert 4 <= len(held) <= 20 and not held & {row["question"] for row in first.train}
    again = data.load(lines(RECORDS[::-1][:30], "other.jsonl"), tokenizer, heldout=0.3, seed=5)
    there = {row["question"] for row in RECORDS[::-1][:30]}
    assert {row["question"] for row in again.heldout} == held & there
    assert {row["question"] for row in data.load(lines(RECORDS), tokenizer, heldout=0.3, seed=6).heldout} != held


def test_one_problem_is_held_out_of_few(tokenizer, lines):
    found = data.load(lines(RECORDS[:3]), tokenizer, heldout=0.001)
    assert len(found.heldout) == 1 and len(found.train) == 2


def test_what_is_left_out_is_counted(tokenizer, lines):
    long = {"question": "9" * 200, "answer": "1"}
    found = data.load(lines([*RECORDS, *RECORDS[:5], long]), tokenizer, max_prompt=60)
    assert len(found.train) + len(found.heldout) == 40
    assert found.report()[1:] == ["left out: 5 that occur twice", "left out: 1 with a prompt of more than 60 tokens"]


def test_a_blend_repeats_nothing(tokenizer, lines):
    few = lines([{"question": f"few {i}", "answer": "1"} for i in range(10)], "few.jsonl")
    many = lines([{"question": f"many {i}", "answer": "1"} for i in range(100)], "many.jsonl")
    found = data.load(f"[{few}:0.25,{many}:0.75]", tokenizer, heldout=0.0)
    names = [row["question"].split()[0] for row in found.train]
    assert (names.count("few"), names.count("many")) == (10, 30)


def test_problems_of_reasoning_gym(tokenizer):
    name = "reasoning-gym:chain_sum:size=30:min_terms=2:max_terms=2:min_digits=2:max_digits=2"
    found = data.load(name, tokenizer, seed=7)
    rows = found.train + found.heldout
    assert 25 <= len(rows) <= 30 and all(row["metadata"]["source_dataset"] == "chain_sum" for row in rows)
    expression = rows[0]["metadata"]["expression"]
    assert rows[0]["answer"] == str(eval(expression)) and expression in rows[0]["prompt"][-1]["content"]
    assert data.load(name, tokenizer, seed=7).train == found.train != data.load(name, tokenizer, seed=8).train


@pytest.mark.parametrize(
    "records, settings, words",
    [
        (
            [{"question": "1", "label": "2"}],
            {},
            'line 1: no "answer": the fields are question, label; name the answer with answer_key=',
        ),
        ([{"text": "1", "answer": "2"}], {}, 'no "question": the fields are text, answer; name the question with question_key='),
        ([{"question": " ", "answer": "2"}], {}, '"question" is empty'),
        ([{"question": [{"role": "assistant", "content": "x"}], "answer": "2"}], {}, "end with the user's"),
        ([{"question": [{"role": "user"}], "answer": "2"}], {}, "has a turn that is not"),
        (RECORDS, {"max_prompt": 5}, "no prompt fits into max_prompt=5 tokens"),
        (RECORDS[:1], {"heldout": 0.5}, "nothing is left to train on"),
        (RECORDS, {"prompt": "nowhere.txt"}, "prompt=nowhere.txt cannot be read"),
        ([], {}, "there is no problem in it"),
    ],
)
def test_bad_input_is_one_line(tokenizer, lines, records, settings, words):
    with pytest.raises(UserError) as error:
        data.load(lines(records), tokenizer, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("reasoning-gym:chain_sums", "did you mean chain_sum"),
        ("reasoning-gym:chain_sum:min_terms", "'min_terms' is not setting=value"),
        ("reasoning-gym:chain_sum:size=many", "must be a whole number"),
        ("reasoning-gym:chain_sum:no_such=1", "no_such"),
        ("python-docs", "not a source"),
        ("missing.jsonl", "no such file"),
    ],
)
def test_bad_sources(tokenizer, name, words):
    with pytest.raises(UserError, match=words):
        data.load(name, tokenizer)


def test_a_prompt_file_without_a_place(tokenizer, lines, tmp_path):
    (tmp_path / "p.txt").write_text("Solve it")
    with pytest.raises(UserError, match="has no {question}"):
        data.load(lines(RECORDS), tokenizer, prompt=str(tmp_path / "p.txt"))
