"""python launchers/evaluate.py: one command, one report; what is finished is not run again; bad input is one line."""

import json
import math
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launchers import evaluate
from nemo_ext import platform
from nemo_ext.command_line import main
from nemo_ext.evaluation.model import Model

platform.activate()
SCRIPT = Path(evaluate.__file__)


@pytest.fixture(scope="module")
def models(small, tmp_path_factory) -> dict[str, Path]:
    """Two random models of different weights, with the tests' tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        for file in small.tokenizer.iterdir():
            shutil.copyfile(file, folder / name / file.name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "notes.md").write_text("The argument parser reads a list of strings and returns a namespace. " * 12)
    rows = [f"What is {i} + {i}?,{i},{2 * i},{3 * i},0,B" for i in range(1, 9)]
    (folder / "questions.csv").write_text("\n".join(rows) + "\n")
    prompts = [{"prompt": f"Say {word}.", "reference": f"{word} {i}"} for i, word in enumerate(("this", "that", "nothing"))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return folder


@pytest.fixture
def judge_url():
    """An endpoint that rates with 6 and finds the answer shown first better."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            reply = "Verdict: A" if "answer_A" in body else "Rating: 6"
            data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def run(*arguments: str) -> int:
    return main(evaluate.Options, evaluate.command, list(arguments), about=evaluate.ABOUT, example=evaluate.EXAMPLE)


def test_one_command_one_report(models, files, tmp_path, judge_url, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = [
        f"model=[hf:{models['one']},hf:{models['two']}]",
        f"tasks=[ppl:{files}/notes.md,mcq:{files}/questions.csv,generate:{files}/prompts.jsonl,judge:{files}/prompts.jsonl]",
        f"out={out}", "max_new_tokens=8", "shots=2", "window=64", f"judge_url={judge_url}", "judge_model=rules", "score=both",
    ]  # fmt: skip
    assert run(*arguments) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["models"]) == ["one", "two"]
    assert set(report["tasks"]) == {"ppl:notes.md", "mcq:questions.csv", "generate:prompts.jsonl", "judge:prompts.jsonl"}

    model = Model(models["two"], "two")  # the perplexity again, from the library's parts
    from nemo_ext.evaluation import perplexity

    direct = perplexity.evaluate(model, [(files / "notes.md").read_text()], window=64)
    shown = {m["name"]: m for m in report["tasks"]["ppl:notes.md"]["two"]["metrics"]}
    assert shown["perplexity"]["value"] == pytest.approx(direct.metrics[0].value, rel=1e-5)
    assert shown["perplexity"]["value"] == pytest.approx(math.exp(shown["nats per token"]["value"]))

    accuracy = report["tasks"]["mcq:questions.csv"]["one"]["metrics"][0]
    assert accuracy["count"] == 6 and accuracy["interval"] == "Wilson"  # two of the eight are examples
    assert [m["name"] for m in report["tasks"]["generate:prompts.jsonl"]["one"]["metrics"]] == [
        "BLEU", "ROUGE-L", "exact match", "numeric match",
    ]  # fmt: skip
    assert report["tasks"]["judge:prompts.jsonl"]["two"]["metrics"][0]["value"] == 6.0
    assert report["pairwise"]["judge:prompts.jsonl"]["two"]["metrics"][0]["value"] == 0.5
    differences = {(d["task"], d["metric"]): d for d in report["differences"]}
    values = [report["tasks"]["ppl:notes.md"][name]["metrics"][2]["value"] for name in ("one", "two")]
    assert differences["ppl:notes.md", "bits per byte"]["value"] == pytest.approx(values[1] - values[0])

    text = (out / "report.md").read_text()
    assert "| task | metric | one | two |" in text and "| ppl:notes.md | bits per byte ↓ |" in text
    assert "two against one: win rate 0.5000" in text and "Less one, on the same units" in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    (rows,) = [path for path in (out / "outputs").iterdir() if path.name.startswith("two.generate")]
    assert json.loads(rows.read_text().splitlines()[0])["prompt"] == "Say this."
    assert "1,464" not in capsys.readouterr().err

    def refuse(*args, **kwargs):
        raise AssertionError("a finished task was run again")

    before = (out / "report.md").read_text()
    monkeypatch.setattr(Model, "__init__", refuse)
    monkeypatch.setattr("nemo_ext.evaluation.judge.Judge._post", refuse)
    assert run(*arguments) == 0
    assert (out / "report.md").read_text() == before and "finished earlier" in capsys.readouterr().out
    assert run(*[a for a in arguments if not a.startswith("window")], "window=32") == 1  # other input: it would run again


def test_a_changed_file_is_evaluated_again(models, tmp_path):
    file = tmp_path / "a.md"
    found = []
    for text in ("one text", "another text, longer"):
        file.write_text(text)
        assert run(f"model=hf:{models['one']}", f"tasks=ppl:{file}", f"out={tmp_path / 'out'}") == 0
        found.append(json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]["ppl:a.md"]["one"]["about"][0])
    assert "8 bytes" in found[0] and "20 bytes" in found[1]


def test_a_nemo_checkpoint_is_as_its_hugging_face_folder(models, files, tmp_path):
    from conversion import hf_to_nemo

    nemo = hf_to_nemo.convert(models["one"], tmp_path / "nemo")
    out = tmp_path / "out"
    assert run(f"model=[hf:{models['one']},nemo:{nemo}]", f"tasks=ppl:{files}/notes.md", f"out={out}", "window=64") == 0
    by_model = json.loads((out / "report.json").read_text())["tasks"]["ppl:notes.md"]
    assert by_model["one"]["metrics"] == by_model["nemo"]["metrics"]
    assert not (out / ".exported").exists()


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["model=hf:missing", "tasks=ppl:{f}/notes.md"], "model=hf:missing: no such folder"),
        (["model=hg:{m}", "tasks=ppl:{f}/notes.md"], "give hf:FOLDER, nemo:RUN or lora:FOLDER; did you mean hf:?"),
        (["model=hf:{f}", "tasks=ppl:{f}/notes.md"], "the folder has no config.json"),
        (["model=nemo:{f}", "tasks=ppl:{f}/notes.md"], "no NeMo checkpoint"),
        (["model=[hf:{m},hf:{m}]", "tasks=ppl:{f}/notes.md"], "is given twice"),
        (["model=hf:{m}", "tasks=ppl:{f}/none.md"], "tasks=: ppl:{f}/none.md: no such file"),
        (["model=hf:{m}", "tasks=pll:{f}/notes.md"], "did you mean ppl?"),
        (["model=hf:{m}", "tasks=mcq:{f}/notes.md"], "unknown type of file"),
        (["model=hf:{m}", "tasks=mcq:{f}/prompts.jsonl"], 'prompts.jsonl, line 1: no "question"'),
        (["model=hf:{m}", "tasks=generate:{f}/questions.csv"], 'questions.csv, line 2: no "reference"'),
        (["model=hf:{m}", "tasks=judge:{f}/prompts.jsonl"], "judge_url= is missing"),
        (["model=hf:{m}", "tasks=ppl:{f}/notes.md", "windw=3"], "unknown key windw, did you mean window?"),
        (["model=hf:{m}", "tasks=ppl:{f}/notes.md", "window=300"], "window=300 is more than the 256 positions of one"),
        (["model=hf:{m}", "tasks=ppl:{f}/notes.md", "window=8", "stride=9"], "stride=9 is more than window=8"),
        (["model=hf:{m}", "tasks=ppl:{f}/notes.md", "limit=0"], "limit=0 must be 1 or more"),
        (["model=hf:{m}", "tasks=mcq:{f}/questions.csv", "shots=8"], "shots=8: 8 questions are too few"),
        (["model=hf:{m}", "tasks=mcq:{f}/questions.csv", "dev={f}/questions.csv"], "it goes with shots="),
        (["model=hf:{m}", "tasks=mcq:{f}/questions.csv", "score=best"], "score=best is none of letter, text, both"),
        (["model=hf:{m}", "tasks=generate:{f}/prompts.jsonl@bleuu"], "unknown metric bleuu"),
        (
            ["model=hf:{m}", "tasks=generate:{f}/prompts.jsonl"],
            " tokens and max_new_tokens=256 are more than the 256 positions of one",
        ),
        (["model=hf:{m}", "tasks=ppl:{f}/notes.md", "batch=many"], "batch=many must be a whole number"),
    ],
)
def test_bad_input_is_one_line(models, files, tmp_path, capsys, arguments, words):
    places = {"m": models["one"], "f": files}
    assert run(*[a.format(**places) for a in arguments], f"out={tmp_path / 'out'}") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1 and words.format(**places) in errors[0]


def test_lm_eval_that_is_not_installed(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(f"model=hf:{models['one']}", "tasks=lm_eval:arc_easy", f"out={tmp_path}") == 2
    assert "lm_eval:arc_easy needs lm-eval-harness, which is not installed: pip install" in capsys.readouterr().err


def test_lm_eval_on_local_data(models, tmp_path):
    """A task of one's own; the accuracy of the harness is that of likelihoods by hand."""
    pytest.importorskip("lm_eval", reason="lm-eval-harness is not installed")
    import torch

    rows = [{"q": f"What is {i} + {i}?", "choices": ["a list", "some strings", f"{2 * i}", "x"], "gold": i % 4} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/data.jsonl\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\ndoc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 1.0\n"
    )
    assert run(f"model=hf:{models['one']}", f"tasks=lm_eval:{tmp_path}/mine.yaml", f"out={tmp_path / 'out'}") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (metric,) = report["tasks"]["lm_eval:mine.yaml"]["one"]["metrics"]

    model, hits = Model(models["one"], "one"), 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            ids, start = model.encode(f"{row['q']} {choice}"), len(model.encode(row["q"]))
            with torch.inference_mode():
                log_p = torch.log_softmax(model.network(torch.tensor([ids])).logits[0], -1)
            scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
        hits += scores.index(max(scores)) == row["gold"]
    assert metric["name"] == "acc" and metric["count"] == 9 and metric["value"] == pytest.approx(hits / 9)


def test_the_script_says_what_it_is():
    """Quickly: without torch."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), "--help"], capture_output=True, text=True, cwd="/", timeout=60
    )
    assert done.returncode == 0 and "ppl:FILE, mcq:FILE, generate:FILE, judge:FILE or lm_eval:NAME" in done.stdout
    assert "| torch\n" not in done.stderr and "transformers" not in done.stderr


def test_a_real_model(files, tmp_path):
    """SmolLM2 finds a text of English likelier than its words in reverse."""
    from conversion import gguf

    folder = gguf.to_hf(gguf.smollm2_gguf(), tmp_path / "smollm2")
    for name, step in (("forward", 1), ("backward", -1)):
        words = "The argument parser reads a list of strings and returns a namespace with one attribute for each option.".split()
        (tmp_path / f"{name}.md").write_text(" ".join(words[::step]))
    tasks = f"tasks=[ppl:{tmp_path}/forward.md,ppl:{tmp_path}/backward.md]"
    assert run(f"model=hf:{folder}", tasks, f"out={tmp_path / 'out'}") == 0
    by_task = json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]
    bits = [by_task[f"ppl:{name}.md"]["smollm2"]["metrics"][2]["value"] for name in ("forward", "backward")]
    assert bits[0] < 1.5 < 2.0 < bits[1]
