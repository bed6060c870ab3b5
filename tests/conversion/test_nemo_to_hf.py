"""NeMo -> Hugging Face: what was imported comes back bit for bit, from any layout, and inputs that are refused."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import save_worker
import tiny_models
import torch
from nemo_processes import run_group
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conversion import dist_checkpoint, families, hf_to_nemo, nemo_folder, nemo_to_hf, safetensors_io
from nemo_ext import run_folder
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

NAMES = list(tiny_models.configs())
SAVED = ["qwen2", "gemma3_text"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != nemo_folder.RECORD}


def same_tensors(a: Path, b: Path, dtype: torch.dtype | None = None) -> None:
    found, wanted = safetensors_io.open_folder(a), safetensors_io.open_folder(b)
    assert found.keys() == wanted.keys()
    for name, info in found.items():
        other = wanted[name].read()
        assert info.dtype == (dtype or other.dtype) and torch.equal(info.read(), other.to(info.dtype)), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder with hf/, in shards and with a tokenizer's files, and nemo/."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama", folder / "hf", max_shard_size="100KB")
    (folder / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "hf" / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    hf_to_nemo.convert(folder / "hf", folder / "nemo")
    return folder


@pytest.fixture
def broken(llama, tmp_path):
    """A copy of the checkpoint to break, and a check that the export says so and leaves nothing."""
    nemo = Path(shutil.copytree(llama / "nemo", tmp_path / "nemo"))

    def refused(message: str, **options) -> None:
        with pytest.raises(UserError, match=message) as error:
            nemo_to_hf.export(nemo, tmp_path / "hf", **options)
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["nemo"]

    refused.folder = nemo
    return refused


@pytest.mark.parametrize("shard_size", ["100KB", "5GB"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gemma3"])
def test_a_round_trip_gives_the_same_files(tmp_path, name, shard_size):
    """Byte for byte: tensors, their order, dtypes, headers, index, config.json and generation_config.json."""
    hf = tiny_models.save(name, tmp_path / "hf", max_shard_size=shard_size)
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    back = nemo_to_hf.export(nemo, tmp_path / "back", workers=3)
    assert contents(back) == contents(hf)
    assert len((nemo / "conversion.json").read_text()) < 16_000


def test_other_dtypes_orders_and_metadata_come_back(llama, tmp_path):
    """Tensors of three dtypes, in one Megatron tensor too, in an order and with metadata that no library writes."""
    hf = tmp_path / "hf"
    hf.mkdir()
    shutil.copyfile(llama / "hf" / "config.json", hf / "config.json")
    rng, tensors = random.Random(0), {name: info.read() for name, info in safetensors_io.open_folder(llama / "hf").items()}
    names = rng.sample(sorted(tensors), len(tensors))
    tensors = {name: tensors[name].to(rng.choice([torch.float32, torch.bfloat16, torch.float16])) for name in names}
    for file, part in (("first.safetensors", names[:17]), ("second.safetensors", names[17:])):
        places = safetensors_io.create(hf / file, {n: (tensors[n].dtype, tuple(tensors[n].shape)) for n in part}, {"by": file})
        for name, place in places.items():
            place.write(tensors[name])
    index = {"weight_map": {n: "first.safetensors" if n in names[:17] else "second.safetensors" for n in names}}
    index["metadata"] = {"total_size": 1, "note": "wrong and kept"}
    (hf / safetensors_io.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    back = nemo_to_hf.export(hf_to_nemo.convert(hf, tmp_path / "nemo"), tmp_path / "back")
    assert contents(back) == contents(hf)


def test_a_copy_of_a_tied_embedding_comes_back(tmp_path):
    hf = tiny_models.save("llama_tied_scaled", tmp_path / "hf")
    weights = load_file(hf / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    back = nemo_to_hf.export(hf_to_nemo.convert(hf, tmp_path / "nemo"), tmp_path / "back")
    assert contents(back) == contents(hf)


def test_buffers_are_left_out(llama, tmp_path):
    hf = tiny_models.save("llama", tmp_path / "hf")
    plain = contents(hf)
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    assert contents(nemo_to_hf.export(hf_to_nemo.convert(hf, tmp_path / "nemo"), tmp_path / "back")) == plain


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(tmp_path, seed):
    """Query groups from one to every head, head sizes that do not divide, odd vocabularies, one layer to many."""
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3, 4, 6])
    groups = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    name = rng.choice(["llama", "qwen2", "qwen3", "phi3"])
    head_dim = rng.choice([8, 16])
    sizes = dict(
        hidden_size=heads * head_dim,
        head_dim=head_dim,
        intermediate_size=rng.randrange(3, 70),
        vocab_size=rng.randrange(3, 200),
        num_hidden_layers=rng.randrange(1, 13),
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    hf = tmp_path / "hf"
    config = tiny_models.configs()[name]
    config.update(sizes | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "layer_types": None})
    config.architectures = ["Any"]
    config.save_pretrained(hf)
    a = families.architecture(json.loads((hf / "config.json").read_text()))
    torch.manual_seed(seed)
    weights = {
        canonical.format(**index): torch.randn(families.shape(symbols, a)).bfloat16()
        for row in families.FAMILIES[name].rows_of(a)
        for index in row.indices(a)
        for canonical, symbols in row.hf.items()
    }
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    back = nemo_to_hf.export(hf_to_nemo.convert(hf, tmp_path / "nemo"), tmp_path / "back", workers=1 + seed % 3)
    assert contents(back) == contents(hf)


def test_a_wrapped_model_comes_back_as_its_text_model(tmp_path):
    """Gemma 3 with a vision tower: transformers loads the export as Gemma3ForCausalLM, with the same logits for text."""
    import transformers

    hf = tiny_models.save("gemma3", tmp_path / "hf")
    back = nemo_to_hf.export(hf_to_nemo.convert(hf, tmp_path / "nemo"), tmp_path / "back")
    text, loading = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert type(text) is transformers.Gemma3ForCausalLM
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(hf)
    tokens = torch.randint(3, 240, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(text.eval()(tokens).logits, whole.eval()(tokens).logits)
    a, b = (families.architecture(hf_to_nemo.read_config(folder)) for folder in (hf, back))
    assert a == b
    again = nemo_to_hf.export(hf_to_nemo.convert(back, tmp_path / "nemo2"), tmp_path / "back2")
    assert contents(again) == contents(back)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Models saved by two processes: name/tp2 and name/pp2, each with optimizer state, beside name/hf."""
    folder = tmp_path_factory.mktemp("saved")
    for name in SAVED:
        hf_to_nemo.convert(tiny_models.save(name, folder / name / "hf"), folder / name / "nemo")
    run_group(2, save_worker.main, folder, SAVED, log=folder / "two.log")
    return folder


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("name", SAVED)
def test_saved_by_megatron_on_two_processes(saved, tmp_path, name, layout):
    """In the middle of a run: the chunks lie as the layout had them, the optimizer's state is left out."""
    nemo = saved / name / layout
    metadata = (nemo / "weights" / ".metadata").read_bytes()
    assert b"optimizer.state.exp_avg.module.decoder" in metadata
    found = dist_checkpoint.read(nemo / "weights")
    if layout == "tp2":
        assert len(found["module.embedding.word_embeddings.weight"].chunks) == 2
    assert contents(nemo_to_hf.export(nemo, tmp_path / "back")) == contents(saved / name / "hf")


def test_a_run_and_its_checkpoints(saved, tmp_path):
    """The newest checkpoint of a run, or the one that is named; what describes the model lies in the run."""
    run = tmp_path / "run"
    for step, layout in ((2, "tp2"), (4, "pp2")):
        shutil.copytree(saved / "qwen2" / layout / "weights", run / "checkpoints" / f"step-{step:06d}" / "weights")
    shutil.copytree(saved / "qwen2" / "nemo", run / run_folder.MODEL, ignore=shutil.ignore_patterns("weights"))
    for nemo, step in ((run, 4), (run / "checkpoints" / "step-000002", 2)):
        back = nemo_to_hf.export(nemo, tmp_path / f"back{step}")
        assert contents(back) == contents(saved / "qwen2" / "hf")
        assert json.loads((back / nemo_folder.RECORD).read_text())["source"].endswith(f"step-{step:06d}")


def test_trained_in_fp32_comes_back_in_its_own_dtype(llama, tmp_path):
    """Weights that a run keeps in fp32 go back as the bf16 that they were imported from; dtype= says otherwise."""
    hf = tmp_path / "hf"
    hf.mkdir()
    config = json.loads((llama / "hf" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (hf / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: info.read().bfloat16() for name, info in safetensors_io.open_folder(llama / "hf").items()}
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    shutil.rmtree(nemo / "weights")
    shutil.copytree(llama / "nemo" / "weights", nemo / "weights")  # the same model, not rounded
    assert contents(nemo_to_hf.export(nemo, tmp_path / "back")) == contents(hf)

    whole = nemo_to_hf.export(nemo, tmp_path / "whole", dtype="float32")
    same_tensors(whole, llama / "hf", torch.float32)
    assert hf_to_nemo.read_config(whole) == config | {"dtype": "float32"}


def test_imported_in_another_dtype(llama, tmp_path):
    """What dtype= asked of an import is the model's dtype from then on; the index and config.json say so."""
    nemo = hf_to_nemo.convert(llama / "hf", tmp_path / "nemo", dtype="bfloat16")
    back = nemo_to_hf.export(nemo, tmp_path / "back")
    same_tensors(back, llama / "hf", torch.bfloat16)
    index, original = (json.loads((folder / safetensors_io.INDEX).read_text()) for folder in (back, llama / "hf"))
    assert index["weight_map"] == original["weight_map"]
    assert index["metadata"]["total_size"] * 2 == original["metadata"]["total_size"]
    assert hf_to_nemo.read_config(back) == hf_to_nemo.read_config(llama / "hf") | {"dtype": "bfloat16"}


def test_other_shards(llama, tmp_path):
    back = nemo_to_hf.export(llama / "nemo", tmp_path / "back", max_shard_bytes=200_000)
    same_tensors(back, llama / "hf")
    files = sorted(back.glob("*.safetensors"))
    assert (
        all(file.name == f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, 1)) and len(files) > 2
    )
    assert all(sum(info.nbytes for info in safetensors_io.read_header(file).values()) <= 200_000 for file in files)
    index = json.loads((back / safetensors_io.INDEX).read_text())
    original = json.loads((llama / "hf" / safetensors_io.INDEX).read_text())
    assert index["metadata"] == original["metadata"]
    one = nemo_to_hf.export(llama / "nemo", tmp_path / "one", max_shard_bytes=10**9)
    assert [file.name for file in one.glob("*.safetensors*")] == ["model.safetensors"]
    with safe_open(one / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_model_that_was_not_imported(llama, tmp_path):
    """Trained here from random weights: no conversion.json, config.json from the architecture, ids from the tokenizer."""
    import transformers

    nemo = Path(shutil.copytree(llama / "nemo", tmp_path / "nemo"))
    (nemo / nemo_folder.RECORD).unlink()
    back = nemo_to_hf.export(nemo, tmp_path / "back")
    same_tensors(back, llama / "hf")
    config = hf_to_nemo.read_config(back)
    assert families.architecture(config) == nemo_folder.find(nemo).architecture
    assert (config["model_type"], config["torch_dtype"]) == ("llama", "float32")
    _, loading = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_a_model_that_has_changed_since_its_import(llama, tmp_path):
    """Another architecture than config.json's: a new one is written, and new files."""
    other = dataclasses.replace(nemo_folder.find(llama / "nemo").architecture, rotary_base=5e5)
    nemo = Path(shutil.copytree(llama / "nemo", tmp_path / "nemo"))
    (nemo / nemo_folder.ARCHITECTURE).write_text(json.dumps(other.to_dict()))
    config = hf_to_nemo.read_config(nemo_to_hf.export(nemo, tmp_path / "back"))
    assert families.architecture(config) == other


def test_tokenizer_and_template_travel(llama, tmp_path):
    back = nemo_to_hf.export(llama / "nemo", tmp_path / "back")
    assert (back / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (back / "generation_config.json").is_file() and (back / "tokenizer_config.json").is_file()


def test_more_padding_of_the_vocabulary_than_ours(llama, tmp_path):
    """Other trainers pad to other multiples: what lies beyond the vocabulary is cut off."""
    nemo = Path(shutil.copytree(llama / "nemo", tmp_path / "nemo"))
    found = dist_checkpoint.read(nemo / "weights")
    tensors = {key: saved.read() for key, saved in found.items()}
    for key in ("module.embedding.word_embeddings.weight", "module.output_layer.weight"):
        tensors[key] = torch.cat([tensors[key], torch.ones(128, 64)])
    shutil.rmtree(nemo / "weights")
    chunks = {k: [dist_checkpoint.Chunk((0,) * t.dim(), tuple(t.shape), lambda t=t: t)] for k, t in tensors.items()}
    stored = {k: dist_checkpoint.StoredTensor(tuple(t.shape), t.dtype, chunks[k]) for k, t in tensors.items()}
    dist_checkpoint.write(nemo / "weights", stored, {})
    assert contents(nemo_to_hf.export(nemo, tmp_path / "back")) == contents(llama / "hf")


def test_progress_and_resumption(llama, tmp_path):
    """A stop in the middle, then the same export: files that were finished are not read again, and the bytes add up."""
    seen = []

    def stop(done, total, unit):
        seen.append((done, total, unit))
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nemo_to_hf.export(llama / "nemo", tmp_path / "back", progress=stop, workers=1)
    partial = tmp_path / ".back.unfinished"
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    finished = [json.loads(line) for line in (partial / ".finished.jsonl").read_text().splitlines()[1:]]
    assert len(finished) > 2
    times = {line["file"]: (partial / line["file"]).stat().st_mtime_ns for line in finished}

    again = []
    back = nemo_to_hf.export(llama / "nemo", tmp_path / "back", progress=lambda *call: again.append(call), workers=2)
    assert contents(back) == contents(llama / "hf")
    assert {name: (back / name).stat().st_mtime_ns for name in times} == times
    total = sum(info.nbytes for info in safetensors_io.open_folder(llama / "hf").values())
    assert again[0][0] > 0 and again[-1] == (total, total, "B") and seen[0] == (0, total, "B")
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


def test_no_space(broken, monkeypatch):
    monkeypatch.setattr("conversion.atomic.free_bytes", lambda path: 1000)
    broken(r"needs 0.00 GiB, its disk has 0.00 GiB free")


def test_checked_before_it_appears(llama, tmp_path):
    def check(folder):
        assert not (tmp_path / "back").exists() and (folder / "config.json").is_file()
        return {"summary": "equal"}

    back = nemo_to_hf.export(llama / "nemo", tmp_path / "back", check=check)
    assert json.loads((back / nemo_folder.RECORD).read_text())["verified"] == {"summary": "equal"}


def test_an_unreadable_record_is_not_passed_over(llama, tmp_path):
    nemo = Path(shutil.copytree(llama / "nemo", tmp_path / "nemo"))
    (nemo / nemo_folder.RECORD).write_text("{")
    with pytest.raises(UserError, match="conversion.json cannot be read"):
        nemo_to_hf.export(nemo, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_no_nemo_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        nemo_to_hf.export(tmp_path / "nothing", tmp_path / "back")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no NeMo checkpoint"):
        nemo_to_hf.export(tmp_path / "empty", tmp_path / "back")


def test_unknown_dtype(broken):
    broken("dtype=int4 is not one of", dtype="int4")


def test_values_beyond_the_dtype(tmp_path):
    hf = tiny_models.save("llama", tmp_path / "hf")
    weights = load_file(hf / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, hf / "model.safetensors")
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    with pytest.raises(UserError, match="model.norm.weight has 1e.06, more than float16 can hold"):
        nemo_to_hf.export(nemo, tmp_path / "back", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "nemo"]


def test_unknown_family(broken):
    file = broken.folder / nemo_folder.ARCHITECTURE
    file.write_text(file.read_text().replace('"llama"', '"falcon"'))
    broken("'falcon', which does not convert; known: llama")


def test_another_shape(broken):
    file = broken.folder / nemo_folder.ARCHITECTURE
    a = Architecture(**json.loads(file.read_text()))
    file.write_text(json.dumps(dataclasses.replace(a, ffn_hidden_size=96).to_dict()))
    broken(r"linear_fc1.weight has shape \[4, 352, 64\], architecture.json asks for \[4, 192, 64\]")


def test_missing_and_unexpected_tensors(broken):
    file = broken.folder / nemo_folder.ARCHITECTURE
    a = Architecture(**json.loads(file.read_text()))
    file.write_text(json.dumps(dataclasses.replace(a, family="qwen2", add_qkv_bias=True).to_dict()))
    broken("lacks 1 of its 10 tensors, first module.decoder.layers.self_attention.linear_qkv.bias")
    file.write_text(json.dumps(dataclasses.replace(a, share_embeddings_and_output_weights=True).to_dict()))
    broken("has not: module.output_layer.weight")


def test_truncated_weights(broken):
    file = max((broken.folder / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    broken("truncated")


def test_a_record_in_the_middle_is_corrupt(broken):
    file = max((broken.folder / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[:64] = bytes(64)
    file.write_bytes(content)
    broken("corrupt")


def test_damaged_record(broken):
    (broken.folder / nemo_folder.RECORD).write_text('{"hf_files": {"shards": [{}]}}')
    broken("conversion.json cannot be read")
