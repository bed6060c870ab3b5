"""Hugging Face -> GGUF -> Hugging Face for every family, and the real SmolLM2 in and out, read by the `gguf` package."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf_vocabulary_samples import TEXTS, encode, metadata
from safetensors.torch import load_file, save_file
from tiny_gguf_models import tiny

from conversion import families, gguf
from conversion.gguf import file as gguf_file
from conversion.gguf import tokenizer as gguf_tokenizer
from conversion.gguf import writer as gguf_writer
from conversion.gguf.architectures import ARCHITECTURES
from conversion.hf_to_nemo import read_config
from nemo_ext.errors import RunError, UserError


def model_names() -> list[str]:
    """Those of tiny_models that llama.cpp has an architecture for."""
    known = {family for table in ARCHITECTURES.values() for family in table.families}
    names = [name for name, config in tiny_models.configs().items() if families.family_of(config.to_dict()).name in known]
    return [name for name in names if name != "stablelm_12b"]  # refused


def logits(folder, length: int = 40) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

    wrapped = AutoConfig.from_pretrained(folder).model_type == "gemma3"
    kind = Gemma3ForConditionalGeneration if wrapped else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.arange(length)[None] * 7 % 240).logits


@pytest.mark.parametrize("name", model_names())
def test_round_trip(name, tmp_path):
    """f32: the same tensors, bit for bit, the same logits, the same architecture (Mistral comes back as a Llama)."""
    source = tiny(name, tmp_path / "hf")
    written = gguf_writer.from_hf(source, tmp_path / "x.gguf", "f32")
    assert written.largest_error == 0
    back = gguf.to_hf(written.file, tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    family = families.family_of(read_config(source))
    prefix = families.base_prefix(family, before)
    expected = {"model." + k.removeprefix(prefix) if k.startswith(prefix) else k: v for k, v in before.items()}
    expected = {k: v for k, v in expected.items() if k in after or not any(part in k for part in family.ignored)}
    assert after.keys() == expected.keys() - ({"lm_head.weight"} if "lm_head.weight" not in after else set())
    for key, value in after.items():
        assert torch.equal(value, expected[key]), key
    found, wanted = (families.architecture(read_config(folder)) for folder in (back, source))
    same = {"family": found.family, "init_method_std": 0.02}
    same |= {} if found.sliding_window else {"sliding_window": None}
    same["rotary_percent"] = int(wanted.rotary_percent * wanted.kv_channels) / wanted.kv_channels  # whole dimensions
    assert found == dataclasses.replace(wanted, **same)
    length = 40 if found.sliding_window == wanted.sliding_window else wanted.sliding_window.size
    assert torch.equal(logits(back, length), logits(source, length))


@pytest.mark.parametrize("name", model_names())
def test_names_are_the_gguf_packages(name):
    """Every tensor's name against the package's own mapping from Hugging Face's names."""
    model = families.architecture(tiny_models.configs()[name].to_dict())
    table = next(table for table in ARCHITECTURES.values() if model.family in table.families)
    arch = next(arch for arch, text in MODEL_ARCH_NAMES.items() if text == table.name)
    mapping = get_tensor_name_map(arch, model.num_layers)
    for row in families.FAMILIES[model.family].rows_of(model):
        for index in row.indices(model):
            for hf_name in (each.format(**index) for each in row.hf):
                expected = mapping.get_name(hf_name, try_suffixes=(".weight", ".bias"))
                canonical = hf_name if not index else hf_name.replace(f".{index['i']}.", ".{i}.", 1)
                assert table.tensor_name(canonical).format(**index) == expected


def test_gemma_keeps_llama_cpps_ids_and_adds_one_to_its_norms(tmp_path):
    """Norms as the file has them; a SentencePiece vocabulary through the file; weights rounded once where fp32 must."""
    values = metadata(vocab_size=900)
    configs = tiny_models.configs()
    config = configs["gemma3_text"]
    config.vocab_size, config.query_pre_attn_scalar = 900, 16
    from transformers import AutoTokenizer, Gemma3ForCausalLM

    torch.manual_seed(1)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.normal_(0, 0.3)
    source = tmp_path / "hf"
    model.save_pretrained(source)
    gguf_tokenizer.write(values | {"general.architecture": "gemma3", "gemma3.context_length": 256}, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    written = gguf_writer.from_hf(source, tmp_path / "x.gguf", "f16")
    reader = GGUFReader(written.file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = {
        "attn_norm": "input_layernorm", "attn_q_norm": "self_attn.q_norm", "post_ffw_norm": "post_feedforward_layernorm",
        "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    }  # fmt: skip
    for ours, theirs in names.items():
        norm = model.state_dict()[f"model.layers.1.{theirs}.weight"]
        assert stored[f"blk.1.{ours}.weight"].tensor_type == GGMLQuantizationType.F32
        assert np.array_equal(stored[f"blk.1.{ours}.weight"].data, (norm + 1).numpy())
    fields = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": "gemma3", "gemma3.attention.sliding_window": 12, "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0, "gemma3.attention.key_length": 16, "gemma3.rope.freq_base": 1e6,
        "gemma3.block_count": 8, "general.file_type": 1, "tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.eot_token_id": 5,
    }  # fmt: skip
    expected |= {key: values[key] for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.chat_template")}
    assert {key: fields[key] for key in expected} == expected
    assert not {key for key in fields if "pattern" in key or "swa" in key}  # llama.cpp's defaults
    back = gguf.to_hf(written.file, tmp_path / "back")
    weights = load_file(back / "model.safetensors")
    for key, value in model.state_dict().items():
        if "norm" in key:
            assert torch.allclose(weights[key], value, rtol=0, atol=2**-24)
        elif key in weights:
            assert torch.equal(weights[key], value.half().float())
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [1, 5]
    ids = AutoTokenizer.from_pretrained(back)
    for text in TEXTS.values():
        assert ids(text).input_ids == encode(values, text)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return gguf.to_hf(gguf.smollm2_gguf(), tmp_path_factory.mktemp("smollm2") / "hf")


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def written(request, smollm2, tmp_path_factory):
    file = tmp_path_factory.mktemp(request.param) / "x.gguf"
    calls = []
    result = gguf_writer.from_hf(smollm2, file, request.param, lambda *call: calls.append(call), name="SmolLM2")
    assert calls == [(n, 544, "tensors") for n in range(1, 545)]
    return request.param, result


def test_smollm2s_metadata_come_back(written):
    before, after = gguf_file.read(gguf.smollm2_gguf()).metadata, gguf_file.read(written[1].file).metadata
    ours = {f"general.{key}" for key in ("name", "file_type", "organization", "finetune", "basename", "license", "languages")}
    assert {key: after.get(key) for key in before.keys() - ours} == {key: before[key] for key in before.keys() - ours}
    added = {"llama.attention.key_length": 64, "llama.attention.value_length": 64, "tokenizer.ggml.add_eos_token": False}
    assert {key: after[key] for key in after.keys() - before.keys()} == added
    assert after["general.file_type"] == {"f16": 1, "q8_0": 7}[written[0]] and after["general.name"] == "SmolLM2"


def test_smollm2s_weights_come_back(written):
    """Against the original file: f16 is the cast, Q8_0 within half a step of each block; vectors are exact."""
    kind, result = written
    before = gguf_file.read(gguf.smollm2_gguf()).tensors
    after = {tensor.name: tensor for tensor in GGUFReader(result.file).tensors}
    assert before.keys() == after.keys()
    largest = relative = 0.0
    for name in [name for name in after if name.startswith(("token_embd", "output_norm", "blk.0.", "blk.29."))]:
        tensor, expected = after[name], before[name].values()
        values = dequantize(tensor.data, tensor.tensor_type)
        if expected.ndim == 1:
            assert tensor.tensor_type == GGMLQuantizationType.F32 and np.array_equal(values, expected)
        elif kind == "f16":
            assert tensor.tensor_type == GGMLQuantizationType.F16 and np.array_equal(values, expected.astype(np.float16))
            largest = max(largest, abs(values - expected).max())
        else:
            assert tensor.tensor_type == GGMLQuantizationType.Q8_0
            errors, steps = abs(values - expected).reshape(-1, 32), abs(expected.reshape(-1, 32)).max(axis=1) / 127
            largest, relative = max(largest, errors.max()), max(relative, (errors.max(axis=1) / np.maximum(steps, 1e-30)).max())
    print(kind, "largest error", largest, "in steps", relative)
    assert 0 < largest <= result.largest_error * (1 + 1e-6)
    assert relative < 0.5 + 127 / 2**11 + 1e-3  # the scale itself is fp16


def test_smollm2s_ids_and_answers_come_back(written, smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    back = gguf.to_hf(written[1].file, tmp_path / "back")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (back, smollm2))
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert (ours.chat_template, ours.special_tokens_map) == (theirs.chat_template, theirs.special_tokens_map)
    assert read_config(back) == read_config(smollm2)
    tokens = ours.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True,
                                      return_tensors="pt", return_dict=True)  # fmt: skip
    found, expected = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (back, smollm2))
    with torch.inference_mode():
        answer = found.generate(**tokens, max_new_tokens=12, do_sample=False)[0]
        one, two = (model(**tokens).logits.log_softmax(-1) for model in (found, expected))
    assert "Paris" in ours.decode(answer)
    assert (two.exp() * (two - one)).sum(-1).mean() < {"f16": 1e-5, "q8_0": 1e-2}[written[0]]


def test_only_the_header_is_needed_for_the_shape(monkeypatch):
    from recipes.models import SMOLLM2_135M

    monkeypatch.setattr(gguf_file.GGUFTensor, "chunks", None)
    assert gguf.architecture(gguf.smollm2_gguf()) == SMOLLM2_135M


def test_rows_that_blocks_do_not_divide_stay_f16(tmp_path):
    """tiny_models' MLP is 176 wide."""
    written = gguf_writer.from_hf(tiny("llama", tmp_path / "hf"), tmp_path / "x.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(written.file).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"], kinds["output_norm.weight"]) == ("F16", "Q8_0", "F32")
    assert 0 < gguf_writer.check(tmp_path / "hf", written.file, "q8_0") == written.largest_error
    with pytest.raises(RunError, match="is .* not"):
        gguf_writer.check(tmp_path / "hf", written.file, "bf16")


def test_a_changed_byte_is_found(tmp_path):
    written = gguf_writer.from_hf(tiny("llama", tmp_path / "hf"), tmp_path / "x.gguf", "bf16")
    place = gguf_file.read(written.file).tensors["blk.2.attn_k.weight"].offset
    with open(written.file, "r+b") as stream:
        stream.seek(place + 1)
        stream.write(bytes([stream.read(1)[0] ^ 1]) if stream.seek(place + 1) else b"")
    with pytest.raises(RunError, match="blk.2.attn_k.weight differs from its source"):
        gguf_writer.check(tmp_path / "hf", written.file, "bf16")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **values):
    (folder / "config.json").write_text(json.dumps(read_config(folder) | values))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("q3_k", lambda folder: None, "kind=q3_k is not one of f32, f16, bf16, q8_0, q4_0, q4_k"),
        ("q4_k", lambda folder: None, "token_embd.weight has rows of 64, q4_k has blocks of 256"),
        ("f16", lambda folder: change_config(folder, model_type="gpt_neox"), "gpt_neox"),
        ("f16", lambda folder: change_weights(folder, lambda w: w.pop("model.norm.weight")), "lacks 1 of .* model.norm.weight"),
        ("f16", lambda folder: change_weights(folder, lambda w: w["lm_head.weight"][3].fill_(1e5)), "1e.05, which f16 cannot"),
        ("q8_0", lambda folder: change_weights(folder, lambda w: w["lm_head.weight"][3].fill_(float("nan"))), "not finite"),
        ("f16", lambda folder: change_config(folder, intermediate_size=100), "config.json asks for"),
        ("f16", lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        ("f16", lambda folder: (folder.parent / "x.gguf").write_text("mine"), "exists already"),
    ],
)  # fmt: skip
def test_sources_that_are_refused(tmp_path, kind, change, message):
    folder = tiny("llama", tmp_path / "hf")
    (folder / "special_tokens_map.json").unlink()
    change(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        gguf_writer.from_hf(folder, tmp_path / "x.gguf", kind)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_models_llama_cpp_would_run_differently(tmp_path):
    folder = tiny("gemma3_text", tmp_path / "hf")
    change_config(folder, query_pre_attn_scalar=24)
    with pytest.raises(UserError, match="scales attention scores by .* llama.cpp takes 0.25"):
        gguf_writer.from_hf(folder, tmp_path / "x.gguf")
    with pytest.raises(UserError, match="norms of each head"):
        gguf_writer.from_hf(tiny("stablelm_12b", tmp_path / "12b"), tmp_path / "x.gguf")
    with pytest.raises(UserError, match="mixtral is not written as GGUF; known: llama, mistral, qwen2"):
        gguf_writer.from_hf(tiny("mixtral", tmp_path / "moe"), tmp_path / "x.gguf")


def test_an_interruption_a_kill_and_a_full_disk(tmp_path, monkeypatch):
    folder = tiny("llama", tmp_path / "hf")

    def stop(done, total, unit):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf_writer.from_hf(folder, tmp_path / "x.gguf", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (tmp_path / ".x.gguf.unfinished").mkdir()
    (tmp_path / ".x.gguf.unfinished" / "x.gguf").write_bytes(b"what a killed process left" * 100_000)
    gguf_writer.from_hf(folder, tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "x.gguf"]
    (tmp_path / "x.gguf").unlink()
    monkeypatch.setattr("conversion.atomic.free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="needs 0.00 GiB, its disk has 0.00 GiB free"):
        gguf_writer.from_hf(folder, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


KILLED = """
import os, signal, sys
from pathlib import Path
from conversion import atomic
from conversion.gguf import writer

def die(done, total, unit):
    if done > total * 0.35:
        os.kill(os.getpid(), signal.SIGKILL)

atomic.GROWTH = 1 << 14
writer.from_hf(Path(sys.argv[1]), Path(sys.argv[2]), progress=die)
"""


def interrupt(convert, source, target, share: float, **options) -> None:
    """Stop `convert`(source, target) when more than `share` of it is done."""

    def stop(done, total, unit):
        if done > share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, progress=stop, **options)
    assert not target.exists()


def test_writing_that_was_killed_goes_on(tmp_path, monkeypatch):
    """Killed while it writes, then stopped while it reads back."""
    folder, file = tiny("llama", tmp_path / "hf"), tmp_path / "x.gguf"
    expected = gguf_writer.from_hf(folder, tmp_path / "expected.gguf")
    command = [sys.executable, "-c", KILLED, str(folder), str(file)]
    run = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)
    assert run.returncode == -9 and not file.exists(), run.stderr
    encoded = []
    encode = gguf_writer._encode
    monkeypatch.setattr(gguf_writer, "_encode", lambda name, tensor: (encoded.append(name), encode(name, tensor))[1])
    interrupt(gguf_writer.from_hf, folder, file, 0.75)
    assert 0 < len(encoded) < len(GGUFReader(expected.file).tensors) * 0.8
    encoded.clear()
    assert gguf_writer.from_hf(folder, file).largest_error == expected.largest_error and not encoded
    assert file.read_bytes() == expected.file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.gguf", "hf", "x.gguf"]


def test_reading_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """Within the one file that it writes; files of another size begin anew."""
    file = gguf_writer.from_hf(tiny("llama", tmp_path / "hf"), tmp_path / "x.gguf", "f32").file
    expected = gguf.to_hf(file, tmp_path / "expected")
    monkeypatch.setattr("conversion.atomic.GROWTH", 1 << 14)
    interrupt(gguf.to_hf, file, tmp_path / "back", 0.6)
    read, progress = [], []
    stored = gguf.HFTensor.read
    monkeypatch.setattr(gguf.HFTensor, "read", lambda tensor: (read.append(tensor.name), stored(tensor))[1])
    gguf.to_hf(file, tmp_path / "back", progress=lambda *call: progress.append(call))
    assert 0 < len(read) < len(load_file(expected / "model.safetensors"))
    assert progress[0][0] > 0.4 * progress[0][1] and progress[-1][0] == progress[-1][1] and progress[-1][2] == "B"
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }
    interrupt(gguf.to_hf, file, tmp_path / "shards", 0.6)
    read.clear()
    gguf.to_hf(file, tmp_path / "shards", max_shard_bytes=100_000)
    assert len(read) == len(load_file(expected / "model.safetensors"))
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "shards"), logits(expected))
