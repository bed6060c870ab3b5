"""Bad input to the command: one line, the right exit code, no stack trace, nothing half-written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import folder, local, run
from nemo_ext import run_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(small, cached, tmp_path, monkeypatch, capsys):
    """command(*arguments) -> (exit code, standard output, standard error); it must not come to train."""
    monkeypatch.setattr(local, "run", lambda *args, **kwargs: pytest.fail("trains"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, keys=None):
        given = {argument.split("=")[0] for argument in arguments}
        base = [key for key in (small.keys if keys is None else keys) if key.split("=")[0] not in given]
        code = run.main([*base, *arguments])
        output, error = capsys.readouterr()
        return code, output, error

    return call


def refused(result, *patterns: str) -> None:
    """Exit code 2 and one line that says all of `patterns`, without a stack trace."""
    code, _, error = result
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for pattern in patterns:
        assert re.search(pattern, error), error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["recipe=cpt_lama3"], "cpt_llama3"),
        (["recipe=cpt_llama3", "learning_rat=1"], "learning_rat"),
        (["recipe=cpt_llama3", "hiden=3"], "did you mean hidden"),
        (["recipe=cpt_llama3", "lr=fast"], "lr=fast must be a number"),
        (["recipe=cpt_llama3", "steps=1.5"], "steps=1.5 must be a whole number"),
        (["recipe=cpt_llama3", "steps=0"], "steps=0 must be above 0"),
        (["recipe=cpt_llama3", "gpus"], "'gpus' is not key=value"),
        (["recipe=cpt_llama3", "size=9b"], "size=9b is not a size of llama3: 8b"),
        (["recipe=cpt_llama3", "precision=fp7"], "precision=fp7 is none of bf16"),
        (["recipe=cpt_llama3", "config=missing.yaml"], "config=missing.yaml: there is no such file"),
        (["recipe=cpt_llama3", "model=nowhere"], "model=nowhere: give hf:FOLDER"),
        (["recipe=cpt_llama3", "model=hf:nowhere"], "neither a folder nor a model"),
        (["recipe=cpt_llama3", "model=gguf:nowhere.gguf"], "there is no such file"),
        (["recipe=cpt_llama3", "model=hf:."], "holds no config.json"),
        (["recipe=cpt_llama3", "size=8b", "gpus=2"], "not in Hugging Face's local cache"),
        (["recipe=pretrain_llama3", "model=hf:."], "starts from random weights"),
        (["recipe=cpt_llama3", "device=gpu"], "no CUDA device"),
        (["recipe=cpt_llama3", "nodes=2"], "runs on one machine"),
        (["recipe=cpt_llama3", "gpus=1000"], r"this machine has room for \d+ CPU processes"),
        (["lr=1"], "recipe= is missing"),
    ],
)
def test_what_a_key_says_wrong(command, arguments, says):
    refused(command(*arguments, keys=[]), says if "\\" in says else re.escape(says))
    assert not Path("runs").exists()


def test_layouts_that_do_not_divide(command):
    refused(command("gpus=2", "tp=2", "heads=3", "kv_heads=3", "hidden=96"), "3", "tp")
    refused(command("gpus=2", "pp=2", "layers=3"), "3", "pp")
    refused(command("global_batch=3", "gpus=2", "tp=1", "pp=1"), "global_batch")
    refused(command("gpus=2", "tp=3"), "tp=3")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a\n- b\n", "holds no keys"),
        ("lr: [1, 2\n", "is not YAML"),
        ("lr: {a: 1}\n", "unknown key lr.a"),
        ("steps: many\n", "steps=many must be a whole number"),
        ("lr: true\n", "lr=True must be a number"),
        (b"\xff\xfe\x00lr", "config="),
    ],
)
def test_configuration_files(command, small, content, says):
    Path("given.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(command("config=given.yaml", keys=[key for key in small.keys if not key.startswith("lr=")]), re.escape(says))


def test_data(command, small):
    Path("empty.txt").write_text("")
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    Path("short.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    Path("latin.txt").write_bytes("déjà vu. ".encode("latin-1") * 500)
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("other.jsonl").write_text('{"body": "a"}\n')
    Path("picture.png").write_bytes(b"\x89PNG")
    Path("folder").mkdir()
    for data, says in {
        "missing.txt": "no such file",
        "*.nothing": "nothing matches",
        "folder": "no file of a known type",
        "picture.png": "unknown type of file",
        "empty.txt": "empty",
        "blank.jsonl": "empty",
        "short.jsonl": "sequence",
        "latin.txt": "latin.txt",
        "broken.jsonl": "broken.jsonl",
        "other.jsonl": "text",
    }.items():
        refused(command(f"data={data}", "out=new"), says)
        assert not Path("new").exists(), data


def test_tokenizers(command, small):
    refused(command("vocab=256"), "ids up to 511", "the model embeds 256")
    refused(command("tokenizer=nowhere"), "no such folder")
    Path("bare").mkdir()
    refused(command("tokenizer=bare"), "bare", "tokenizer")
    shutil.copytree(small.tokenizer, "endless")
    Path("endless/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    refused(command("tokenizer=endless"), "eos_token")
    shutil.copytree(small.tokenizer, "broken")
    Path("broken/tokenizer.json").write_text("{")
    refused(command("tokenizer=broken"), "broken")


def test_checkpoint_of_another_family(command):
    Path("qwen").mkdir()
    config = dict(model_type="qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=512, rms_norm_eps=1e-6, max_position_embeddings=512, hidden_act="silu",
                  rope_theta=10000.0, tie_word_embeddings=True, use_sliding_window=False)  # fmt: skip
    Path("qwen/config.json").write_text(json.dumps(config))
    refused(command("recipe=cpt_llama3", "model=hf:qwen", keys=[]), "qwen2 model", "trains llama")
    Path("qwen/config.json").write_text('{"model_type": "mystery"}')
    refused(command("recipe=cpt_llama3", "model=hf:qwen", keys=[]), "mystery")
    Path("qwen/config.json").write_text("{")
    refused(command("recipe=cpt_llama3", "model=hf:qwen", keys=[]), "config.json")


def test_folders_that_cannot_be_written(command, tmp_path):
    Path("file").write_text("")
    refused(command("out=file"), "out=.*file cannot be written: File exists")
    refused(command("out=file/below"), "out=.*cannot be written: Not a directory")
    refused(command("out=/proc/run"), "out=/proc/run cannot be written")
    assert Path("file").read_text() == ""


def test_a_full_disk_is_seen_before_the_start(command, monkeypatch):
    monkeypatch.setattr(folder, "free_bytes", lambda path: 1 << 20)
    refused(command("out=new", "steps=4"), "out=.*new: checkpoints need 0.0 GiB", "make space, lower keep=")
    assert not Path("new").exists()


def test_a_folder_that_another_command_uses(command):
    with folder.owned(Path("busy").absolute()):
        refused(command("out=busy"), "another command is running there")


def finished(folder: Path, small, steps=4, **changed) -> None:
    """A run's folder as a command leaves it that has made its first steps."""
    import recipes
    from launchers import grammar

    parsed = grammar.parse([*small.keys, f"steps={steps}", f"out={folder.absolute()}"])
    keys = recipes.resolve(parsed.recipe, parsed.keys, cuda=False)
    keys.update(tp=1, pp=1, vp=1, cp=1, sp=False, micro_batch=4, gpus=1, recompute="none")
    grammar.save(folder / run_folder.CONFIG, parsed.recipe, {**recipes.finish(keys), **changed}, {})


def test_a_folder_with_another_run(command, small):
    finished(Path("run"), small)
    refused(command("out=run", "steps=4", "lr=2e-3"), "holds a run with lr=0.001 and not 0.002: give another out=")
    refused(command("out=run", "steps=8"), "steps=4 and not 8")
    refused(command("out=run", "steps=4", "model.config.hidden_dropout=0.1"), "hidden_dropout=None and not 0.1")
    finished(Path("run"), small, warmup=2)  # given then, and not now: the default is another one
    refused(command("out=run", "steps=4"), "warmup=2 and not 1")
    (Path("run") / run_folder.CONFIG).write_text("lr: [1,\n")
    refused(command("out=run", "steps=4"), "holds a run that cannot be read")


def test_a_complete_run_says_so_at_once(command, small):
    finished(Path("run"), small)
    (Path("run") / "summary.json").write_text('{"broken')
    with pytest.raises(pytest.fail.Exception, match="trains"):
        command("out=run", "steps=4", "debug=true")
    from nemo_ext import report

    summary = report.summarise([{"step": 4, "loss": 2.0, "tokens": 1024}], [], {})
    run_folder.write_json(Path("run") / run_folder.SUMMARY_JSON, summary)
    code, output, _ = command("out=run", "steps=4", "gpus=2")
    assert code == 0 and "run is complete at step 4" in output and "4 (1,024 tokens)" in output


def test_damaged_checkpoints_are_set_aside(tmp_path, capsys):
    for step in (2, 4):
        step_folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        (step_folder / "weights").mkdir(parents=True)
        (step_folder / "weights" / "part").write_bytes(b"12345678")
        run_folder.write_manifest(step_folder)
    (tmp_path / "checkpoints" / "step-000006.partial").mkdir()
    assert folder.usable_checkpoint(tmp_path)[0] == 4
    (tmp_path / "checkpoints" / "step-000004" / "weights" / "part").write_bytes(b"1234")
    assert folder.usable_checkpoint(tmp_path)[0] == 2
    assert "step-000004 is damaged (weights/part has 4 bytes and not 8)" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004.damaged"]
    (tmp_path / "checkpoints" / "step-000002" / "weights" / "part").unlink()
    for _ in range(2):  # and not a silent start from the beginning the second time
        with pytest.raises(run.UserError, match="no checkpoint is left undamaged"):
            folder.usable_checkpoint(tmp_path)


def test_plan_needs_and_writes_nothing(command, tmp_path):
    code, output, error = command("plan=true", "data=missing.txt", "tokenizer=nowhere", "out=new")
    assert (code, error) == (0, "") and "TP" in output
    assert list(tmp_path.iterdir()) == []


def test_stack_traces_are_shown_on_demand(command):
    code, _, error = command("data=missing.txt", "debug=true", "out=new")
    assert code == 2 and "Traceback" in error and error.splitlines()[-1].startswith("error: data=missing.txt")


def test_sigterm_while_preparing(small, tmp_path):
    script = (
        "import os, signal, sys; from launchers import run, prepare\n"
        "prepare.corpus = lambda *a: os.kill(os.getpid(), signal.SIGTERM) or signal.pause()\n"
        "sys.exit(run.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "LLM_BUILDER_CACHE": str(small.cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *small.keys, f"out={tmp_path / 'new'}"], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 143 and done.stderr == "stopped by SIGTERM; the same command goes on\n"
    assert not (tmp_path / "new").exists()
