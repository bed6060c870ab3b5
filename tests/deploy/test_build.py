"""The lines of trtllm-build, and what is refused."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import build
from nemo_ext.command_line import parse
from nemo_ext.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {"architecture": "LlamaForCausalLM", "dtype": "bfloat16", "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(4):
        (folder / f"rank{rank}.safetensors").touch()
    return folder


def options(checkpoint: Path, *more: str) -> build.Options:
    return parse(build.Options, [f"checkpoint={checkpoint}", f"out={checkpoint.parent / 'engine'}", *more], "")


@pytest.mark.parametrize("version", ["0.18.2", "0.21.0", "1.0.0", "1.2.1"])
def test_line(checkpoint, version):
    keys = ["tp=2", "rows=64", "context=8192", "prompt=4096", "prefill_tokens=2048", "beams=4", "cache=paged", "gemm=auto",
            "context_fmha=enable", "log=error"]  # fmt: skip
    asked = options(checkpoint, *keys)
    assert shlex.join(build.line(asked, build.read_checkpoint(checkpoint), version)) == (
        f"trtllm-build --checkpoint_dir {checkpoint} --output_dir {checkpoint.parent}/engine --max_batch_size 64 "
        "--max_input_len 4096 --max_seq_len 8192 --max_num_tokens 2048 --max_beam_width 4 --kv_cache_type paged "
        "--gemm_plugin auto --use_paged_context_fmha enable --workers 4 --log_level error"
    )
    plain = build.line(options(checkpoint), build.read_checkpoint(checkpoint), version)
    assert plain[5:] == ["--workers", "4"]


def test_versions_without_a_builder(checkpoint):
    config = build.read_checkpoint(checkpoint)
    with pytest.raises(UserError, match="1.3.0 has no engine builder: serve"):
        build.line(options(checkpoint), config, "1.3.0")
    with pytest.raises(UserError, match="older than 0.18"):
        build.line(options(checkpoint), config, "0.9.0")


def test_without_tensorrt_llm_the_line_is_printed(checkpoint):
    run = subprocess.run(
        [sys.executable, "deploy/build.py", f"checkpoint={checkpoint}", f"out={checkpoint.parent}/engine", "rows=8"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2 and "is not installed here" in run.stderr
    assert run.stdout.startswith(f"trtllm-build --checkpoint_dir {checkpoint} ") and "--max_batch_size 8" in run.stdout


def test_the_builder_runs(checkpoint, tmp_path, monkeypatch):
    """A program of that name gets the line; its failure is ours."""
    program = tmp_path / "bin" / "trtllm-build"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit $CODE\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(build, "installed", lambda: "1.1.0")
    monkeypatch.setenv("CODE", "0")
    build.command(options(checkpoint, "rows=8"))
    assert (tmp_path / "asked").read_text().split()[4:6] == ["--max_batch_size", "8"]
    monkeypatch.setenv("CODE", "7")
    with pytest.raises(RunError, match="exit code 7"):
        build.command(options(checkpoint))


@pytest.mark.parametrize(
    "keys, words",
    [
        (["tp=4"], "the checkpoint was split for tp=2"),
        (["rows=0"], "1 or more"),
        (["prompt=9000", "context=8192"], "more than context=8192"),
        (["cache=odd"], "none of continuous"),
    ],
)
def test_refused(checkpoint, keys, words):
    with pytest.raises(UserError, match=words):
        build.command(options(checkpoint, *keys))


def test_what_is_no_checkpoint(checkpoint):
    (checkpoint / "rank3.safetensors").unlink()
    with pytest.raises(UserError, match="lacks rank3.safetensors of its 4"):
        build.command(options(checkpoint))
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="it is a Hugging Face folder"):
        build.command(options(checkpoint))
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        build.command(options(checkpoint))
    with pytest.raises(UserError, match="No such file"):
        build.command(options(checkpoint / "nowhere"))
