"""An adapter through the command: trained, exported, merged; and what is refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_run import Command

from launchers import local, run
from nemo_ext import platform, run_folder

platform.activate()


@pytest.fixture(scope="module")
def chat(small, tmp_path_factory) -> SimpleNamespace:
    """A small Hugging Face model with the tokenizer of the tests, and conversations."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(1)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**shape, vocab_size=512, max_position_embeddings=128, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    PreTrainedTokenizerFast.from_pretrained(small.tokenizer).save_pretrained(folder / "base")
    data = folder / "chat.jsonl"
    records = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"A number, {n}."}]}
        for n in range(80)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    keys = (
        f"recipe=lora_llama3 model=hf:{folder / 'base'} data={data} seq=64 global_batch=4 steps=4 every=2 lr=1e-2 rank=4 "
        "heldout=0.1 val_batches=1 tensorboard=false preview=0"
    )
    return SimpleNamespace(base=folder / "base", keys=keys.split(), cache=small.cache)


@pytest.fixture(scope="module")
def trained(chat, tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("adapter") / "run"
    done = Command(chat, f"out={out}", "gpus=2", "tp=2", "export=hf").end()
    assert done.code == 0, done.error
    return done


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] * 11 % 500).logits


def test_a_run_exports_an_adapter_that_peft_loads_and_the_merged_model(trained, chat):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    steps, _ = run_folder.read_records(trained.out)
    assert [record["step"] for record in steps] == [1, 2, 3, 4] and steps[-1]["loss"] < steps[0]["loss"]
    assert "trained; " in trained.output
    config = json.loads((trained.out / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 32, str(chat.base))
    base = logits(AutoModelForCausalLM.from_pretrained(chat.base))
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat.base), trained.out / "lora"))
    merged = logits(AutoModelForCausalLM.from_pretrained(trained.out / "hf"))
    assert (adapted - base).abs().max() > 1e-2
    assert (adapted - merged).abs().max() < 1e-5
    for folder in ("lora", "hf"):  # the base has no template
        assert "im_start" in AutoTokenizer.from_pretrained(trained.out / folder).chat_template


def test_its_checkpoints_hold_no_model(trained, chat, tmp_path, capsys, monkeypatch):
    from conversion import convert

    monkeypatch.setenv("LLM_BUILDER_CACHE", str(chat.cache))
    keys = [key for key in chat.keys if not key.startswith(("model=", "recipe=", "rank="))]
    for arguments in (["recipe=sft_llama3"], ["recipe=lora_llama3"]):
        assert run.main([*keys, *arguments, f"model=nemo:{trained.out}", f"out={tmp_path / 'other'}"]) == 2
        assert "holds an adapter, not a model" in capsys.readouterr().err
    with pytest.raises(convert.UserError, match="holds an adapter, not a model"):
        convert.command(convert.Options(from_=f"nemo:{trained.out}", to=f"hf:{tmp_path / 'hf'}"))


def test_a_base_without_a_hugging_face_folder_has_nothing_to_merge_into(chat, tmp_path, capsys, monkeypatch):
    from launchers import prepare

    monkeypatch.setenv("LLM_BUILDER_CACHE", str(chat.cache))
    weights = prepare.weights(prepare.find(f"hf:{chat.base}"))
    keys = [key for key in chat.keys if not key.startswith("model=")]
    assert run.main([*keys, f"model=nemo:{weights}", "export=hf", f"out={tmp_path / 'run'}"]) == 2
    assert "export=lora" in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("rank=0", "rank=0 must be above 0"),
        ("dropout=1", "dropout=1.0 must be at least 0 and below 1"),
        ("targets=q_proj,c_attn", "c_attn, which is no linear of a llama model: q_proj, k_proj, .*all-linear, attention, mlp"),
        ("targets=[]", r"targets=\[\] names no linear: q_proj"),
        ("recipe=lora_mixtral size=8x7b targets=mlp", "mlp, which is no linear of a mixtral model"),
        ("rank=3 gpus=2 tp=2", "rank=3 is not a multiple of tp=2"),
        ("recipe=sft_llama3 rank=8", "rank= is for recipe=lora_llama3, not for sft_llama3"),
        ("recipe=sft_llama3 rank=16 export=lora", "export=lora is for recipe=lora_llama3"),
    ],
)
def test_what_is_refused(chat, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setenv("LLM_BUILDER_CACHE", str(chat.cache))
    monkeypatch.setattr(local, "run", lambda *args, **kwargs: pytest.fail("trains"))
    given = arguments.split()
    names = {argument.split("=")[0] for argument in given}
    kept = [key for key in chat.keys if key.split("=")[0] not in names and not (key.startswith("model=") and "size" in names)]
    assert run.main([*kept, *given, f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and re.search(says, error), error
