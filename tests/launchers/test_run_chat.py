"""Tuning on conversations through the command: a run that learns and exports, and data that is refused."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import local, run
from nemo_ext import run_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def chat(small, tmp_path_factory) -> tuple[str, ...]:
    """Keys of a small run: a random Llama as a Hugging Face folder with a tokenizer that has no chat template, and sums."""
    from nemo_ext import platform

    platform.activate()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, max_position_embeddings=256)).save_pretrained(folder / "hf")
    for file in small.tokenizer.iterdir():
        (folder / "hf" / file.name).write_bytes(file.read_bytes())
    numbers = random.Random(0)
    with open(folder / "sums.jsonl", "w") as data:
        for _ in range(200):
            a, b = numbers.randrange(50), numbers.randrange(50)
            turns = [{"role": "user", "content": f"{a}+{b}?"}, {"role": "assistant", "content": f"{a + b}, exactly"}]
            data.write(json.dumps({"messages": turns}) + "\n")
    keys = "recipe=sft_llama3 seq=96 global_batch=4 lr=1e-3 heldout=0.1 val_batches=2 tensorboard=false preview=1"
    return *keys.split(), f"model=hf:{folder / 'hf'}", f"data={folder / 'sums.jsonl'}"


def test_a_run_that_learns_and_exports(chat, small, tmp_path):
    """Loss falls on held-out conversations, the chosen template travels, and the export is what was trained."""
    environment = {**os.environ, "LLM_BUILDER_CACHE": str(small.cache), "COLUMNS": "200"}
    command = [sys.executable, "launchers/run.py", *chat, "steps=8", "gpus=2", "export=hf", f"out={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=400)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "format messages; template chatml" in done.stdout and "<|im_start|>assistant" in done.stdout
    assert "200 conversations (messages)" in done.stdout and "verified: logits" in done.stdout
    summary = run_folder.read_json(tmp_path / "run" / run_folder.SUMMARY_JSON)
    assert summary["steps"] == 8 and summary["val_loss_after"] < summary["val_loss_before"] - 0.1
    assert summary["layout"]["dp"] == 2

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1+1?"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n1+1?<|endoftext|>\n<|im_start|>assistant\n"  # its own end of text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").config.vocab_size == 512


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        ((), '{"messages": [', "data.jsonl, line 1"),
        ((), json.dumps({"words": "?"}), "data.jsonl, line 1: unknown format.*known are messages, sharegpt"),
        ((), json.dumps({"messages": [{"role": "assistant", "content": ""}]}), "data.jsonl, line 1"),
        (("columns=prompt",), None, "columns=prompt: give pairs such as prompt:question"),
        (("columns=prompt:q",), None, "columns= names prompt and completion together"),
        (("template=klingon",), None, "template=klingon"),
        (("train_on=everything",), None, "train_on=everything is none of assistant, all, last"),
        (("seq=4", "overlong=drop"), None, "200 of 200 conversations do not fit into seq=4 tokens"),
        (("model=hf:nowhere",), None, "neither a folder nor a model"),
    ],
)
def test_what_is_refused(chat, cached, tmp_path, monkeypatch, capsys, arguments, content, message):
    """Exit code 2, one line, and no folder."""
    import re

    monkeypatch.setattr(local, "run", lambda *args, **kwargs: pytest.fail("trains"))
    given = {argument.split("=")[0] for argument in arguments}
    keys = [key for key in chat if key.split("=")[0] not in given]
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content + "\n")
        keys = [key for key in keys if not key.startswith("data=")] + [f"data={tmp_path / 'data.jsonl'}"]
    code = run.main([*keys, *arguments, f"out={tmp_path / 'run'}"])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()
