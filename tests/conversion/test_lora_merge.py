"""Merging against PEFT's own merge_and_unload and against PEFT running the adapter beside the base."""

import json
import math

import lora_adapters
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from conversion import safetensors_io
from conversion.lora import adapter as lora
from conversion.lora import merge as lora_merge
from nemo_ext.errors import RunError, UserError

# gpt2: linears stored [in, out]; mixtral: experts; a wrapped gemma3: checkpoint names that differ from the modules'
CASES = {
    "llama": dict(),
    "llama rslora": dict(use_rslora=True, r=6, lora_alpha=5),
    "llama patterns": dict(
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"^model.layers.0.self_attn.k_proj": 3, "v_proj": 16}
    ),
    "llama regex": dict(target_modules=r".*layers\.[02]\.self_attn\.(q|v)_proj"),
    "llama layers": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 3]),
    "llama dora": dict(use_dora=True),
    "llama modules": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "llama embeddings": dict(target_modules=["embed_tokens", "lm_head", "k_proj"]),
    "llama_tied_scaled": dict(),
    "qwen2 dora": dict(use_dora=True, target_modules=["q_proj", "o_proj"]),
    "phi3": dict(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gemma3_text": dict(),
    "gemma3": dict(target_modules=r".*language_model.*_proj"),
    "mixtral": dict(target_modules=["q_proj", "gate", "w1", "w2"]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(name):
        if name not in made:
            made[name] = tiny_models.save(name, tmp_path_factory.mktemp("bases") / name)
        return made[name]

    return base


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case, bases, tmp_path):
    from peft import PeftModel

    base = bases(case.split()[0])
    adapted = lora_adapters.make(base, tmp_path / "adapter", **CASES[case])
    merged = lora_merge.merge(base, tmp_path / "adapter", tmp_path / "merged", measure=False)
    found = lora_adapters.plain_logits(tmp_path / "merged")
    scale = adapted.abs().max().item()
    assert (lora_adapters.plain_logits(base) - adapted).abs().max() > 1e-2 * scale  # the adapter does something
    assert (found - adapted).abs().max() < 1e-5 * scale
    assert merged.tensors > 0 and merged.rounding < 1e-5

    reference = PeftModel.from_pretrained(lora_adapters.load(base), tmp_path / "adapter").merge_and_unload()
    reference.save_pretrained(tmp_path / "reference")
    ours, theirs = (safetensors_io.open_folder(tmp_path / name) for name in ("merged", "reference"))
    assert set(ours) == set(theirs)
    for name, info in theirs.items():
        torch.testing.assert_close(ours[name].read(), info.read(), rtol=1e-5, atol=1e-5)


def test_measures_what_it_did(bases, tmp_path):
    adapted = lora_adapters.make(bases("llama"), tmp_path / "adapter")
    merged = lora_merge.merge(bases("llama"), tmp_path / "adapter", tmp_path / "merged")
    assert 0 < merged.difference.max_abs < 1e-5 * merged.difference.largest_logit
    assert merged.difference.top1_agreement == 1.0
    assert merged.effect.max_abs > 0.01 * adapted.abs().max()
    record = json.loads((tmp_path / "merged" / "conversion.json").read_text())
    assert record["difference"]["max_abs"] == merged.difference.max_abs and record["tensors"] == merged.tensors == 28


def test_bfloat16_keeps_dtype_shards_and_files(bases, tmp_path):
    """Stored in the base's bf16: the exact sum, rounded once; untouched tensors and files bit for bit; shards as they were."""
    base = tmp_path / "base"
    lora_adapters.load(bases("llama")).to(torch.bfloat16).save_pretrained(base, max_shard_size="100KB")
    (base / "tokenizer.json").write_text('{"some": "tokenizer"}')
    lora_adapters.make(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged = lora_merge.merge(base, tmp_path / "adapter", tmp_path / "merged")
    before, after = (safetensors_io.open_folder(folder) for folder in (base, tmp_path / "merged"))
    assert {n: (i.file.name, i.dtype, i.shape) for n, i in before.items()} == {
        n: (i.file.name, i.dtype, i.shape) for n, i in after.items()
    }
    assert len(safetensors_io.files_of(before)) > 2
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, info in before.items():
        expected = info.read()
        if "q_proj" in name:
            a, b = (adapter[f"base_model.model.{name.replace('weight', f'lora_{x}.weight')}"] for x in "AB")
            expected = (expected.float() + 2.0 * (b @ a)).bfloat16()
        assert torch.equal(after[name].read(), expected), name
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()
    assert 1e-4 < merged.rounding < 0.1
    assert 1e-5 < merged.difference.relative < merged.effect.relative / 5


def test_goes_on_after_a_kill(bases, tmp_path, monkeypatch):
    """A second call writes only the shards that the first one had not finished."""
    base = tmp_path / "base"
    lora_adapters.load(bases("llama")).save_pretrained(base, max_shard_size="100KB")
    lora_adapters.make(base, tmp_path / "adapter")
    expected = lora_merge.merge(base, tmp_path / "adapter", tmp_path / "expected", measure=False)

    def killed(done, total, unit):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_merge.merge(base, tmp_path / "adapter", tmp_path / "merged", progress=killed, measure=False)
    assert not (tmp_path / "merged").exists()
    written = []
    write_file = safetensors_io.write_file
    monkeypatch.setattr(safetensors_io, "write_file", lambda file, *rest: (written.append(file.name), write_file(file, *rest)))
    merged = lora_merge.merge(base, tmp_path / "adapter", tmp_path / "merged", measure=False)
    shards = sorted((tmp_path / "expected").glob("*.safetensors"))
    assert 0 < len(written) < len(shards) and merged.rounding == expected.rounding
    for shard in shards:
        assert (tmp_path / "merged" / shard.name).read_bytes() == shard.read_bytes()


def test_other_dtype(bases, tmp_path):
    lora_adapters.make(bases("llama"), tmp_path / "adapter")
    lora_merge.merge(bases("llama"), tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16", measure=False)
    assert {info.dtype for info in safetensors_io.open_folder(tmp_path / "merged").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("torch_dtype", config.get("dtype")) == "bfloat16"


def test_linears_stored_in_by_out(tmp_path):
    """GPT-2's Conv1D: fan_in_fan_out."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=250, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    tf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    options = dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    adapted = lora_adapters.make(tmp_path / "base", tmp_path / "adapter", **options)
    # the module is transformer.h.0, its tensor has the same name only in a causal LM's checkpoint
    lora_merge.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", measure=False)
    assert (lora_adapters.plain_logits(tmp_path / "merged") - adapted).abs().max() < 1e-5 * adapted.abs().max()


def test_is_target_as_peft(bases):
    """Which modules a configuration means, against PEFT's own function."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    names = [name.removesuffix(".weight") for name in safetensors_io.open_folder(bases("mixtral"))]
    for options in (
        dict(target_modules=["q_proj", "w1"]),
        dict(target_modules=["q_proj", "w1"], layers_to_transform=[1, 2]),
        dict(target_modules=["q_proj", "w1"], layers_to_transform=1, layers_pattern="layers"),
        dict(target_modules=["q_proj", "k_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
        dict(target_modules=r".*\.[12]\..*(gate|v_proj)", exclude_modules=r".*\.1\..*"),
        dict(target_modules=["lm_head", "o_proj"], modules_to_save=["lm_head"]),
    ):
        config = LoraConfig(**options)
        expected = {name for name in names if check_target_module_exists(config, name)}
        expected = {name for name in expected if not _excluded(check_target_module_exists(config, name))}
        assert {name for name in names if lora.is_target(config.to_dict(), name)} == expected and expected


def _excluded(result) -> bool:
    return type(result).__name__ == "_ExcludedModule"


def test_wrong_result_is_refused(bases, tmp_path, monkeypatch):
    lora_adapters.make(bases("llama"), tmp_path / "adapter")
    right = lora_merge._merged
    monkeypatch.setattr(lora_merge, "_merged", lambda weight, *rest: right(weight * 1.001, *rest))
    with pytest.raises(RunError, match="nothing was written"):
        lora_merge.merge(bases("llama"), tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def _edit_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(bias="all"), "bias='all'"),
        (dict(peft_type="IA3"), "peft_type='IA3'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (dict(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
        (dict(target_parameters=["w1"]), "target_parameters"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(r=5), "gives it rank 5"),
        (dict(r=0), "positive integer"),
        (dict(use_dora=True), "lacks a magnitude"),
        (dict(target_modules="q_(proj"), "not a regular expression"),
        (dict(target_modules=5), "neither a list"),
        (dict(lora_alpha="much"), "is not a PEFT configuration"),
        (dict(rank_pattern=[3]), "is not a PEFT configuration"),
        (dict(target_modules=["q_proj", "k_proj"]), "targets model.layers.0.self_attn.k_proj and 3 more"),
    ],
)
def test_refused_configurations(values, message, bases, tmp_path):
    lora_adapters.make(bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    _edit_config(tmp_path / "adapter", **values)
    with pytest.raises(UserError, match=message) as caught:
        lora_merge.merge(bases("llama"), tmp_path / "adapter", tmp_path / "merged")
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


def test_refused_tensors(bases, tmp_path):
    lora_adapters.make(bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    good = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"

    def refused(tensors, message):
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            lora_merge.merge(bases("llama"), tmp_path / "adapter", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    refused({k: v for k, v in good.items() if k != f"{key}B.weight"}, "lacks lora_B of model.layers.0.self_attn.q_proj")
    refused(good | {f"{key}A.weight": torch.zeros(4, 63)}, r"q_proj by \[64, 63\].*another base")
    refused({k.replace("layers.3", "layers.4"): v for k, v in good.items()}, "layers.4.self_attn.q_proj, which .* does not have")
    refused({k: v.to(torch.float8_e4m3fn) for k, v in good.items()}, "quantized")
    refused(good | {f"{key}B.bias": torch.zeros(64)}, "not a tensor of LoRA")
    refused({}, "no tensors")
    refused(good | {"base_model.model.lm_head.weight": torch.zeros(252, 64)}, r"replaces lm_head.weight by \[252, 64\]")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        lora_merge.merge(bases("llama"), tmp_path / "adapter", tmp_path / "merged")


def test_refused_bases(bases, tmp_path):
    lora_adapters.make(bases("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    quantized = tmp_path / "quantized"
    lora_adapters.load(bases("llama")).save_pretrained(quantized)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UserError, match=r"quantized \(bitsandbytes\)"):
        lora_merge.merge(quantized, tmp_path / "adapter", tmp_path / "merged")
    (quantized / "config.json").write_text(json.dumps(config))
    weights = load_file(quantized / "model.safetensors")
    weights["model.layers.2.self_attn.q_proj.weight"] = weights["model.layers.2.self_attn.q_proj.weight"].to(torch.int8)
    save_file(weights, quantized / "model.safetensors")
    with pytest.raises(UserError, match="layers.2.self_attn.q_proj.weight is int8"):
        lora_merge.merge(quantized, tmp_path / "adapter", tmp_path / "merged")


def test_tied_embeddings_are_refused(bases, tmp_path):
    base = bases("llama_tied_scaled")
    lora_adapters.make(base, tmp_path / "adapts", target_modules=["embed_tokens", "q_proj"])
    lora_adapters.make(base, tmp_path / "replaces", target_modules=["q_proj"], modules_to_save=["lm_head"])
    for name in ("adapts", "replaces"):
        with pytest.raises(UserError, match=f"{name} (model.embed_tokens|lm_head.weight), but in .* shares"):
            lora_merge.merge(base, tmp_path / name, tmp_path / "merged")


def test_refused_folders(bases, tmp_path):
    for name in ("one", "two"):
        lora_adapters.make(bases("llama"), tmp_path / "several" / name, target_modules=["q_proj"])
    for folder, message in (
        (tmp_path / "several", r"holds 2 adapters \(one, two\)"),
        (tmp_path / "none", "not a PEFT adapter"),
        (bases("llama"), "not a PEFT adapter"),
    ):
        with pytest.raises(UserError, match=message):
            lora_merge.merge(bases("llama"), folder, tmp_path / "merged")


def test_scale_by_hand():
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"^m.0.q_proj": 6}}
    assert lora.scaling(config, "m.0.q_proj") == (9, 6 / 9)
    assert lora.scaling(config, "m.1.q_proj") == (9, 8 / 9)
    assert lora.scaling(config | {"use_rslora": True}, "m.1.k_proj") == (4, 8 / math.sqrt(4))
