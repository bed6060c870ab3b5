"""Command lines of other servers, as their references of each version have them."""

import json

import pytest

from deploy import backends
from deploy.backends import BACKENDS, Backend, Wanted, launch
from nemo_ext.errors import UserError


def at(name: str, version: str) -> Backend:
    return Backend(**{**vars(BACKENDS[name]), "version": version})


@pytest.fixture
def full(tmp_path):
    adapter = tmp_path / "polite"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 12}))
    keys = tmp_path / "keys.txt"
    keys.write_text("# ours\nsecret\n")
    return Wanted(tmp_path, "llama", "0.0.0.0", 9000, 4, 2, {"polite": adapter}, "bfloat16", 8192, 64, 2048, 0.8, keys)


@pytest.mark.parametrize("version", ["0.6.3", "0.14.1", "0.25.1"])
def test_vllm(full, version):
    found = launch(at("vllm", version), full)
    assert found.text == (
        f"vllm serve {full.model} --host 0.0.0.0 --port 9000 --tensor-parallel-size 4 --pipeline-parallel-size 2 "
        "--dtype bfloat16 --max-model-len 8192 --max-num-seqs 64 --max-num-batched-tokens 2048 --gpu-memory-utilization 0.8 "
        "--served-model-name llama --enable-lora --max-loras 1 --max-lora-rank 16 "
        f"--lora-modules polite={full.adapters['polite']}"
    )
    assert found.environment == {"VLLM_API_KEY": "secret"}


def test_trtllm(tmp_path):
    folder = tmp_path / "llama"
    wanted = dict(model=folder, host="0.0.0.0", port=9000, tp=4, pp=2, context=8192, rows=64, prefill_tokens=2048, gpu_memory=0.8)
    options = (
        "--host 0.0.0.0 --port 9000 --tp_size 4 --pp_size 2 --max_seq_len 8192 --max_batch_size 64 --max_num_tokens 2048 "
        "--kv_cache_free_gpu_memory_fraction 0.8"
    )
    for version in ("0.18.2", "1.0.0", "1.2.1"):
        found = launch(at("trtllm", version), Wanted(name="llama", **wanted))
        assert found.text == f"trtllm-serve {folder} --backend pytorch {options}" and not found.environment
        with pytest.raises(UserError, match="under its folder's name only"):
            launch(at("trtllm", version), Wanted(name="other", **wanted))
    found = launch(at("trtllm", "1.3.0rc5"), Wanted(name="other", **wanted))
    assert found.text == f"trtllm-serve {folder} --backend pytorch {options} --served_model_name other"


def test_defaults_are_the_backends(tmp_path):
    assert launch(at("vllm", "0.25.1"), Wanted(tmp_path, "m")).arguments == [
        "vllm", "serve", str(tmp_path), "--host", "127.0.0.1", "--port", "8000", "--served-model-name", "m",
    ]  # fmt: skip


def test_keys_without_a_counterpart(full, tmp_path):
    folder = tmp_path / "llama"
    for key, words in (("dtype", "dtype= has no"), ("adapters", "merge them"), ("api_keys", "put a proxy")):
        with pytest.raises(UserError, match=words):
            launch(at("trtllm", "1.2.1"), Wanted(folder, "llama", **{key: getattr(full, key)}))
    full.api_keys.write_text("one\ntwo\n")
    with pytest.raises(UserError, match="takes one key"):
        launch(at("vllm", "0.25.1"), full)
    with pytest.raises(UserError, match="older than 0.6"):
        launch(at("vllm", "0.5.4"), Wanted(folder, "llama"))
    (full.adapters["polite"] / "adapter_config.json").write_text(json.dumps({"r": 1024}))
    with pytest.raises(UserError, match="rank 1024"):
        launch(at("vllm", "0.25.1"), Wanted(folder, "llama", adapters=full.adapters))


def test_choice(monkeypatch):
    there = {"vllm": "0.25.1"}
    monkeypatch.setattr(backends, "_installed", there.get)
    monkeypatch.setattr(backends.shutil, "which", lambda program: f"/bin/{program}" if program != "trtllm-serve" else None)
    monkeypatch.setattr(backends.hardware, "has_cuda", lambda: True)
    assert backends.choose("auto").name == "vllm" and backends.choose("auto").version == "0.25.1"
    with pytest.raises(UserError, match="tensorrt_llm is not installed"):
        backends.choose("trtllm")
    there["tensorrt_llm"] = "1.2.1"
    with pytest.raises(UserError, match="the program trtllm-serve"):
        backends.choose("trtllm")
    monkeypatch.setattr(backends.shutil, "which", lambda program: f"/bin/{program}")
    assert backends.choose("auto").name == "trtllm"
    assert backends.choose("embedded") is None
    monkeypatch.setattr(backends.hardware, "has_cuda", lambda: False)
    assert backends.choose("auto") is None and backends.choose("vllm").name == "vllm"
