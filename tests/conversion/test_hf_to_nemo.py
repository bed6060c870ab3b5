"""Hugging Face -> NeMo: contents, formats, other layouts, and inputs that are refused with nothing left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from conversion import hf_to_nemo
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("llama") / "hf")


@pytest.fixture(scope="module")
def nemo(llama) -> Path:
    return hf_to_nemo.convert(llama, llama.parent / "nemo")


def read(nemo: Path) -> dict[str, torch.Tensor]:
    """All tensors, through torch's own reader."""
    sizes = dcp.FileSystemReader(nemo / "weights").read_metadata().state_dict_metadata
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in sizes.items() if hasattr(v, "size")}
    dcp.load(state, storage_reader=dcp.FileSystemReader(nemo / "weights"), no_dist=True)
    return state


@pytest.fixture
def broken(llama, tmp_path):
    """A copy of the model to break, and a check that conversion says so and leaves nothing."""
    hf = Path(shutil.copytree(llama, tmp_path / "hf"))

    def refused(message: str, **options) -> None:
        with pytest.raises(UserError, match=message) as error:
            hf_to_nemo.convert(hf, tmp_path / "nemo", **options)
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["hf"]

    def change(edit) -> None:
        weights = load_file(hf / "model.safetensors")
        edit(weights)
        save_file(weights, hf / "model.safetensors")

    refused.folder, refused.change = hf, change
    return refused


def test_what_the_folder_holds(llama, nemo):
    assert sorted(p.name for p in nemo.iterdir()) == ["architecture.json", "conversion.json", "tokenizer", "weights"]
    a = Architecture(**json.loads((nemo / "architecture.json").read_text()))
    assert (a.family, a.num_layers, a.num_query_groups, a.vocab_size, a.padded_vocab_size) == ("llama", 4, 2, 250, 256)
    record = json.loads((nemo / "conversion.json").read_text())
    assert record["dtypes"] == ["float32"] and record["hf_config"]["model_type"] == "llama" and len(record["sha256"]) == 64
    assert (nemo / "tokenizer" / "generation_config.json").is_file()


def test_keys_and_shapes_are_megatrons(nemo):
    """Against the model itself: every tensor and every extra state it would load is there with its shape, and no other tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    from conversion import nemo_folder
    from conversion.compare import megatron

    with megatron.single_process():
        model = megatron.load_megatron(nemo_folder.find(nemo), seq_length=16)
        wanted = model.sharded_state_dict(prefix="module.")
        apply_factories(wanted)
        tensors = {t.key: tuple(t.global_shape) for t in nested_values(wanted) if isinstance(t, ShardedTensor)}
        objects = {o.unique_key for o in nested_values(wanted) if isinstance(o, ShardedObject)}
    stored = dcp.FileSystemReader(nemo / "weights").read_metadata().state_dict_metadata
    assert {k: tuple(v.size) for k, v in stored.items() if hasattr(v, "size")} == tensors
    assert objects <= set(stored)


def test_values_by_hand(llama, nemo):
    hf, state = load_file(llama / "model.safetensors"), read(nemo)
    fc1 = state["module.decoder.layers.mlp.linear_fc1.weight"]
    qkv = state["module.decoder.layers.self_attention.linear_qkv.weight"]
    for layer in range(4):
        name = f"model.layers.{layer}."
        assert torch.equal(fc1[layer, :176], hf[f"{name}mlp.gate_proj.weight"])
        assert torch.equal(fc1[layer, 176:], hf[f"{name}mlp.up_proj.weight"])
        assert torch.equal(qkv[layer, :32], hf[f"{name}self_attn.q_proj.weight"][:32])  # group 0: two queries of width 16
        assert torch.equal(qkv[layer, 32:48], hf[f"{name}self_attn.k_proj.weight"][:16])
        assert torch.equal(qkv[layer, 112:], hf[f"{name}self_attn.v_proj.weight"][16:])
    embedding = state["module.embedding.word_embeddings.weight"]
    assert embedding.shape == (256, 64) and torch.equal(embedding[:250], hf["model.embed_tokens.weight"])
    assert not embedding[250:].any()


def test_shards_and_threads_give_the_same(llama, nemo, tmp_path):
    sharded = tiny_models.save("llama", tmp_path / "hf", max_shard_size="100KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    seen = []
    other = read(hf_to_nemo.convert(sharded, tmp_path / "nemo", workers=3, progress=lambda *call: seen.append(call)))
    first = read(nemo)
    assert first.keys() == other.keys() and all(torch.equal(first[k], other[k]) for k in first)
    assert seen[-1][0] == seen[-1][1] and [done for done, *_ in seen] == sorted(done for done, *_ in seen)


def test_dtype(llama, tmp_path):
    state = read(hf_to_nemo.convert(llama, tmp_path / "nemo", dtype="bfloat16"))
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    hf = load_file(llama / "model.safetensors")
    assert torch.equal(state["module.decoder.final_layernorm.weight"], hf["model.norm.weight"].bfloat16())


def test_a_repeated_conversion_has_the_same_hash(llama, nemo, tmp_path):
    other = json.loads((hf_to_nemo.convert(llama, tmp_path / "nemo") / "conversion.json").read_text())
    assert other["sha256"] == json.loads((nemo / "conversion.json").read_text())["sha256"]


def test_a_copy_of_the_tied_embedding_is_accepted(tmp_path):
    hf = tiny_models.save("llama_tied_scaled", tmp_path / "hf")
    weights = load_file(hf / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, hf / "model.safetensors")
    assert "module.output_layer.weight" not in read(hf_to_nemo.convert(hf, tmp_path / "nemo"))
    weights["lm_head.weight"][0] += 1
    save_file(weights, hf / "model.safetensors")
    with pytest.raises(UserError, match="differs from model.embed_tokens.weight"):
        hf_to_nemo.convert(hf, tmp_path / "nemo2")


def test_no_model_folder(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        hf_to_nemo.convert(tmp_path, tmp_path / "nemo")


def test_config_not_json(broken):
    (broken.folder / "config.json").write_text("{")
    broken("not JSON")


def test_unknown_architecture(broken):
    (broken.folder / "config.json").write_text('{"model_type": "falcon"}')
    broken("known: llama")


def test_unknown_dtype(broken):
    broken("dtype=int4 is not one of", dtype="int4")


def test_missing_tensor(broken):
    broken.change(lambda w: w.pop("model.layers.2.mlp.up_proj.weight"))
    broken(r"lacks 1 of its 39 tensors, first model\.layers\.2\.mlp\.up_proj\.weight")


def test_unexpected_tensor(broken):
    broken.change(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    broken("1 tensors that a llama .* first model.layers.0.self_attn.q_proj.bias")


def test_rotary_buffers_are_ignored(llama, tmp_path):
    hf = Path(shutil.copytree(llama, tmp_path / "hf"))
    weights = load_file(hf / "model.safetensors")
    save_file(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, hf / "model.safetensors")
    hf_to_nemo.convert(hf, tmp_path / "nemo")


def test_wrong_shape(broken):
    broken.change(lambda w: w.update({"model.norm.weight": torch.zeros(65)}))
    broken(r"model.norm.weight has shape \[65\], config.json asks for \[64\]")


def test_integers(broken):
    broken.change(lambda w: w.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    broken("model.norm.weight is int8")


def test_truncated_weights(broken):
    file = broken.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    broken("truncated")


def test_missing_shard(broken):
    (broken.folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (broken.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    broken("lacks 1 of its 1 shards")


def test_pickled_weights(broken):
    (broken.folder / "model.safetensors").rename(broken.folder / "pytorch_model.bin")
    broken("save it as safetensors first")


def test_out_dir_taken(llama, tmp_path):
    (tmp_path / "nemo").mkdir()
    (tmp_path / "nemo" / "mine").write_text("1")
    with pytest.raises(UserError, match="exists already"):
        hf_to_nemo.convert(llama, tmp_path / "nemo")
    assert (tmp_path / "nemo" / "mine").read_text() == "1"


def test_a_shard_that_shrinks_meanwhile(llama, tmp_path, monkeypatch):
    """Failing in a writer's thread removes everything too."""
    hf = Path(shutil.copytree(llama, tmp_path / "hf"))
    opened = hf_to_nemo.safetensors_io.open_folder

    def shrink(folder):
        found = opened(folder)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-5000])
        return found

    monkeypatch.setattr(hf_to_nemo.safetensors_io, "open_folder", shrink)
    with pytest.raises(UserError, match="truncated"):
        hf_to_nemo.convert(hf, tmp_path / "nemo")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


KILLED = """
import os, signal, sys
from pathlib import Path
from conversion import hf_to_nemo

def die(done, total, unit):
    if done > total * 0.7:
        os.kill(os.getpid(), signal.SIGKILL)

hf_to_nemo.convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=die, workers=1)
"""


def test_a_killed_conversion_goes_on(llama, nemo, tmp_path):
    """SIGKILL after seven tenths: nothing has the final name, and the next one writes only what is missing."""
    command = [sys.executable, "-c", KILLED, str(llama), str(tmp_path / "nemo")]
    run = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    (partial,) = tmp_path.iterdir()
    assert partial.name == ".nemo.unfinished"
    kept = [json.loads(line)["file"] for line in (partial / ".finished.jsonl").read_text().splitlines()[1:]]
    times = {name: (partial / name).stat().st_mtime_ns for name in kept}
    assert len(kept) > 2

    seen = []
    other = hf_to_nemo.convert(llama, tmp_path / "nemo", workers=3, progress=lambda *call: seen.append(call))
    assert {name: (other / name).stat().st_mtime_ns for name in kept} == times
    assert seen[0][0] > seen[0][1] * 0.4 and seen[-1][0] == seen[-1][1]
    first, second = read(nemo), read(other)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert [path.name for path in tmp_path.iterdir()] == ["nemo"]


def test_a_changed_source_or_option_is_converted_anew(llama, tmp_path):
    hf = Path(shutil.copytree(llama, tmp_path / "hf"))

    def stop(done, total, unit):
        if done > total * 0.7:
            raise KeyboardInterrupt

    def first_call(**options) -> int:
        seen = []

        def once(done, total, unit):
            seen.append(done)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            hf_to_nemo.convert(hf, tmp_path / "nemo", progress=once, **options)
        return seen[0]

    with pytest.raises(KeyboardInterrupt):
        hf_to_nemo.convert(hf, tmp_path / "nemo", progress=stop, workers=1)
    assert first_call() > 0
    assert first_call(dtype="bfloat16") == 0
    with pytest.raises(KeyboardInterrupt):
        hf_to_nemo.convert(hf, tmp_path / "nemo", progress=stop, workers=1)
    assert first_call() > 0
    (hf / "model.safetensors").touch()
    assert first_call() == 0


def test_no_space(broken, monkeypatch):
    monkeypatch.setattr("conversion.atomic.free_bytes", lambda path: 1000)
    broken("its disk has 0.00 GiB free: make space")


def test_values_beyond_the_dtype(broken):
    broken.change(lambda w: w["model.layers.1.mlp.up_proj.weight"].view(-1)[7].fill_(1e5))
    broken(r"model.layers.1.mlp.up_proj.weight has 1e\+05, more than float16 can hold", dtype="float16")


def test_infinities_stay(broken, tmp_path):
    broken.change(lambda w: w["model.norm.weight"][7].fill_(float("inf")))
    state = read(hf_to_nemo.convert(broken.folder, tmp_path / "nemo", dtype="float16"))
    assert state["module.decoder.final_layernorm.weight"][7] == float("inf")


def test_checked_before_it_appears(llama, tmp_path):
    def check(folder):
        assert not (tmp_path / "nemo").exists()
        assert read(folder)["module.decoder.final_layernorm.weight"].shape == (64,)
        return {"summary": "equal"}

    nemo = hf_to_nemo.convert(llama, tmp_path / "nemo", check=check)
    assert json.loads((nemo / "conversion.json").read_text())["verified"] == {"summary": "equal"}


def test_a_failed_check_leaves_no_final_name_and_keeps_the_work(llama, tmp_path):
    def check(folder):
        raise UserError("the models differ")

    with pytest.raises(UserError, match="the models differ"):
        hf_to_nemo.convert(llama, tmp_path / "nemo", check=check)
    assert [path.name for path in tmp_path.iterdir()] == [".nemo.unfinished"]
    seen = []
    nemo = hf_to_nemo.convert(llama, tmp_path / "nemo", progress=lambda *call: seen.append(call))
    assert seen == [(seen[0][1], seen[0][1], "B")]
    assert json.loads((nemo / "conversion.json").read_text())["verified"] is False
