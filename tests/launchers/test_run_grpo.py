"""`recipe=grpo_FAMILY` through the command: killed while it samples and gone on with, finished, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import run
from nemo_ext import run_folder

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/nemo_ext/grpo"))

from grpo_models import write_model, write_problems  # noqa: E402


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> list[str]:
    """Keys of a run of moments on a model of random weights."""
    from nemo_ext import platform

    platform.activate()
    folder = tmp_path_factory.mktemp("grpo")
    model, problems = write_model(folder / "model"), write_problems(folder / "sums.jsonl")
    text = (
        f"recipe=grpo_llama3 model=hf:{model} data={problems} reward=length:100,numeric:0.5 prompts=3 group=4 max_prompt=64 "
        "max_answer=6 steps=8 every=2 val_every=4 val_samples=4 heldout=0.2 kl=0.05 lr=1e-3 tensorboard=false"
    )
    return text.split()


def start(keys: list[str], out: Path, **more: str) -> subprocess.Popen:
    environment = {**os.environ, "COLUMNS": "300", "OMP_NUM_THREADS": "1", "LLM_BUILDER_CACHE": str(out.parent / "cache"), **more}
    command = [sys.executable, "launchers/run.py", *keys, f"out={out}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def steps_of(out: Path) -> list[dict]:
    return run_folder.read_records(out)[0]


@pytest.mark.slow
def test_killed_and_gone_on_with_like_one_that_was_left_alone(keys, tmp_path, capsys, monkeypatch):
    alone, killed = start(keys, tmp_path / "alone"), start(keys, tmp_path / "killed")
    end = time.monotonic() + 240
    while len(steps_of(tmp_path / "killed")) < 5 and time.monotonic() < end:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)  # in the rollout of the next step
    killed.communicate(timeout=60)
    assert len(steps_of(tmp_path / "killed")) < 8
    assert run_folder.newest_checkpoint(tmp_path / "killed/checkpoints")[0] in (4, 6)
    again = start(keys, tmp_path / "killed")
    output, error = alone.communicate(timeout=240)
    assert alone.returncode == 0, error
    resumed, error = again.communicate(timeout=240)
    assert again.returncode == 0, error

    assert "continuing" in resumed and "held-out reward" in output and "step 8/8" in output
    expected, found = steps_of(tmp_path / "alone"), steps_of(tmp_path / "killed")
    assert [record["reward"] for record in found] == [record["reward"] for record in expected]
    assert [record["loss"] for record in found] == [record["loss"] for record in expected]
    weights = [(tmp_path / name / "hf/model.safetensors").read_bytes() for name in ("alone", "killed")]
    assert weights[0] == weights[1]

    summary = json.loads((tmp_path / "killed/summary.json").read_text())
    assert summary["steps"] == 8 and summary["resumed_from_step"] in (4, 6) and summary["heldout_answers"] == 4
    assert summary["val_reward_after"] == summary["reward_after"][0] and set(summary["seconds"]) == {
        "step", "generation", "scoring", "training",
    }  # fmt: skip
    text = (tmp_path / "killed/summary.md").read_text()
    assert "| held-out reward (interval of 95%) |" in text and "## Answers before and after" in text
    names = {path.stem for path in (tmp_path / "killed/plots").iterdir()}
    assert {"reward", "val_reward", "length", "kl", "entropy"} <= names and all(f"plots/{name}.png" in text for name in names)

    monkeypatch.chdir(ROOT)
    assert run.main([*keys, f"out={tmp_path / 'killed'}"]) == 0
    assert "is complete at step 8" in capsys.readouterr().out
    other = [key if not key.startswith("kl=") else "kl=0.1" for key in keys]
    assert run.main([*other, f"out={tmp_path / 'killed'}"]) == 2
    assert "holds a run with kl=0.05 and not 0.1" in capsys.readouterr().err
    assert not any(path.name in ("optimizer.pt", "files.json") for path in (tmp_path / "killed/hf").iterdir())

    from conversion import convert

    target = tmp_path / "nemo"  # what was trained is a model like any other
    convert.command(convert.Options(from_=f"hf:{tmp_path / 'killed/hf'}", to=f"nemo:{target}", verify=False))
    assert (target / "weights").is_dir()


@pytest.mark.slow
def test_a_run_that_stands_still_ends_in_a_line_with_its_stacks(keys, tmp_path):
    """The worker falls asleep while it scores the answers of step 3: four times hang_timeout later it is over."""
    out = tmp_path / "hung"
    path = os.pathsep.join(filter(None, [str(Path(__file__).with_name("grpo_hanging")), os.environ.get("PYTHONPATH")]))
    run_ = start([*keys, "hang_timeout=8"], out, PYTHONPATH=path, HANG_STEP="3")
    output, error = run_.communicate(timeout=240)
    assert run_.returncode == 1 and len(steps_of(out)) == 2
    logs = out / "logs"
    where = f"{logs}/rank0.stacks has the stacks; logs are in {logs}"
    assert error == f"error: the run stood still for 32 s at step 3 (generation): {where}\n"
    stacks = (logs / "rank0.stacks").read_text()
    assert "fall_asleep" in stacks and "in train" in stacks
    assert run_folder.newest_checkpoint(out / "checkpoints")[0] == 2  # from which the same command goes on


@pytest.mark.parametrize(
    "more, words",
    [
        ("answer_key=nothing", 'no "nothing": the fields are question, answer, level; name the answer with answer_key='),
        ("max_prompt=3", "no prompt fits into max_prompt=3 tokens"),
        ("turns=2", "turns=2 needs tools="),
        ("tools=pyton", "tools=pyton: there is no tool pyton, did you mean python"),
        ("tools=python", "the chat template (the tokenizer's own) shows the model no tools: template=chatml does"),
        ("updates=0", "updates=0 must be above 0"),
        ("tp=2", "tp=2: the embedded engine trains on one device"),
        ("precision=fp8", "precision=fp8"),
        ("backend=vllm", "backend=vllm: it needs a GPU"),
        ("engine=nemo_rl", "engine=nemo_rl: it needs GPUs"),
        ("group=1", "group=1: an answer is compared to the others of its group"),
        ("micro_batch=5", "micro_batch=5 does not divide the prompts=3 x group=4 answers of a step"),
        ("max_answer=250", "max_prompt=64 and max_answer=250 are more than the model's 256 positions"),
        ("warmup=8", "warmup=8 leaves no step of steps=8"),
        ("reward=maths", "did you mean math"),
        ("grup=4", "unknown key grup, did you mean group"),
        ("loss=ppo", "loss=ppo is none of token, sequence, dr_grpo"),
        ("global_batch=8", "unknown key global_batch"),
        ("trainer.max_steps=8", "unknown key trainer.max_steps"),
        ("nemo_rl.grpo.seed=8", "the embedded engine has no fields beside its keys"),
        ("gpu_memory=0.01", "does not fit"),
        ("on_spike=skip", "on_spike= is not for grpo_llama3: the loss of a policy is about zero at every step"),
        ("straggler_factor=2", "straggler_factor= is not for grpo_llama3: the embedded engine is one process"),
        ("on_nan=perhaps", "on_nan=perhaps is none of stop, skip, rollback"),
        ("restarts=-1", "restarts=-1 must not be negative"),
    ],
)
def test_bad_input_stops_with_one_line(keys, tmp_path, capsys, more, words):
    name = more.partition("=")[0]
    given = [key for key in keys if key.partition("=")[0] != name]
    assert run.main([*given, more, f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out/config.yaml").exists()


def test_the_plan_shows_policy_reference_and_generation(keys, capsys):
    assert run.main([*keys, "plan=true", "device=gpu", "gpu_memory=80", "engine=embedded"]) == 0
    lines = capsys.readouterr().out
    assert all(f"\n{name}" in lines for name in ("policy", "reference", "generation", "together"))
    assert run.main(["recipe=grpo_llama3", "size=8b", "gpu=h100", "gpus=8", "plan=true", "engine=nemo_rl"]) == 0
    lines = capsys.readouterr().out
    assert all(name in lines for name in ("the policy", "the reference", "generation", "TP", "8 H100, 79.1 GiB each"))
    assert "expected" not in lines  # nothing of NeMo-RL was measured
    assert run.main(["recipe=grpo_llama3", "gpu=a100", "gpus=8", "plan=true", "engine=nemo_rl", "precision=fp8"]) == 2
    assert capsys.readouterr().err == "error: precision=fp8: A100 has no FP8: precision=bf16\n"
    assert run.main(["recipe=grpo_llama3", "gpu=l40", "gpus=8", "plan=true", "engine=nemo_rl", "precision=fp8"]) == 2
    assert capsys.readouterr().err == "error: precision=fp8: L40 has no scales of blocks: precision=bf16\n"


def test_recipes_load_as_objects_of_nemo_run():
    import nemo_run

    import recipes

    partial = recipes.load("grpo_qwen3", size="0.6b", device="gpu", engine="embedded", data="x.jsonl")
    assert isinstance(partial, nemo_run.Partial) and partial.keys["group"] == 8 and partial.keys["precision"] == "bf16"
    script = recipes.load("grpo_qwen3", device="gpu", engine="nemo_rl", data="x.jsonl", out="there")
    assert isinstance(script, nemo_run.Script) and "run=there" in script.args
