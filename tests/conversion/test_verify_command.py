"""python conversion/verify.py: what it prints, writes and returns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from conversion import hf_to_nemo, verify
from nemo_ext.command_line import main

SCRIPT = Path(verify.__file__)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """hf and nemo, equal, and a wrong one."""
    folder = tmp_path_factory.mktemp("command")
    hf = tiny_models.save("qwen2", folder / "hf")
    nemo = hf_to_nemo.convert(hf, folder / "nemo")
    shutil.copytree(hf, folder / "wrong")
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.bias"] += 0.5
    save_file(weights, folder / "wrong" / "model.safetensors", metadata={"format": "pt"})
    return {"hf": f"hf:{hf}", "nemo": f"nemo:{nemo}", "wrong": f"hf:{folder / 'wrong'}"}


def run(*arguments: str) -> int:
    return main(verify.Options, verify.command, list(arguments), about="", example="")


def test_equal(folders, tmp_path, capsys):
    assert run(f"a={folders['hf']}", f"b={folders['nemo']}", f"out={tmp_path / 'report.json'}") == 0
    printed = capsys.readouterr().out
    assert "50: 50 equal bit for bit" in printed and "random ids, seed 2" in printed and "equal  (" in printed
    assert max(map(len, printed.splitlines())) < 400 and "\x1b" not in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and report["failure"] is None and report["tensors"]["bitwise"] == 50
    assert [p["tokens"] for p in report["prompts"]] == [64, 33, 7] and report["prompts"][0]["difference"]["max_abs"] < 1e-5


def test_different(folders, tmp_path, capsys):
    assert run(f"a={folders['wrong']}", f"b={folders['nemo']}", f"out={tmp_path / 'report.json'}") == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert (
        "model.layers.1.self_attn.v_proj.bias" in line
        and "model.layers.1.self_attn (decoder.layers.1.self_attention in b)" in line
    )
    assert "FAILED" in captured.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"] and report["first_difference"]["point"] == "layers.1.attention"


def test_tensors_alone_and_logits_alone(folders, capsys):
    assert run(f"a={folders['wrong']}", f"b={folders['nemo']}", "logits=false") == 1
    assert "worst model.layers.1.self_attn.v_proj.bias: differs by up to 0.5 " in capsys.readouterr().err
    assert run(f"a={folders['hf']}", f"b={folders['nemo']}", "tensors=false") == 0
    assert "tensors  " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra, message",
    [
        (["tp=3"], "tp=3 does not divide"),
        (["dtype=int8"], "dtype=int8 is none of float32, bfloat16"),
        (["logits=false", "tensors=false"], "nothing to compare"),
        (["seq=4"], "unknown key seq"),
        (["prompts=nowhere.txt"], "cannot be read"),
    ],
)
def test_bad_input(folders, capsys, extra, message):
    assert run(f"a={folders['hf']}", f"b={folders['nemo']}", *extra) == 2
    assert message in capsys.readouterr().err


def test_missing_checkpoint(folders, capsys):
    assert run(f"a={folders['hf']}", "b=nemo:/nowhere") == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert run(f"a={folders['hf']}") == 2
    assert "b= is missing" in capsys.readouterr().err


def test_the_script_itself(folders):
    """Its own folder, with a gguf.py, does not stand before the packages; the help needs no torch."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    help = subprocess.run([sys.executable, SCRIPT, "--help"], env=environment, capture_output=True, text=True, timeout=60)
    assert help.returncode == 0 and "max_tokens=" in help.stdout and not help.stderr
    command = [sys.executable, SCRIPT, f"a={folders['hf']}", f"b={folders['hf']}", "logits=false"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "equal  (" in done.stdout, done.stderr
