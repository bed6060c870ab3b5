"""Adapters in NeMo's model: its logits against PEFT's on Hugging Face's model, its checkpoints, and the way back."""

import json
import math
import shutil

import lora_adapters
import lora_worker
import pytest
import tiny_models
import torch
from nemo_processes import run_group
from safetensors.torch import load_file, save_file

from conversion import dist_checkpoint, hf_to_nemo, nemo_folder
from conversion.compare.megatron import load_megatron, single_process
from conversion.lora import from_nemo as lora_from_nemo
from conversion.lora import nemo as lora_nemo
from conversion.lora import to_nemo as lora_to_nemo
from nemo_ext.errors import UserError

Q_V = dict(target_modules=["q_proj", "v_proj"])
# name, kind, what PEFT's LoraConfig says
LOGITS = [
    ("llama", "canonical_lora", {}),
    ("llama", "lora", {}),
    ("llama", "dora", dict(use_dora=True)),
    ("llama", "canonical_dora", dict(use_dora=True, target_modules=["k_proj", "v_proj", "up_proj", "down_proj"])),
    ("qwen2", "canonical_dora", dict(use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})),
    ("phi", "canonical_dora", dict(use_dora=True)),
    ("phi3", "canonical_dora", dict(use_dora=True)),
    ("gemma3_text", "canonical_dora", dict(use_dora=True, use_rslora=True)),
    ("llama_tied_scaled", "canonical_lora", dict(target_modules=["k_proj", "up_proj"], use_rslora=True, r=6, lora_alpha=5)),
    ("qwen2", "canonical_lora", {}),
    ("qwen2", "lora", dict(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 3})),
    ("qwen3", "canonical_lora", Q_V | dict(layers_to_transform=[0, 2])),
    ("phi3", "canonical_lora", {}),
    ("phi3", "dora", dict(use_dora=True)),
    ("gemma3_text", "canonical_lora", {}),
    ("gemma3_text", "lora", {}),
    ("gemma3", "canonical_lora", dict(target_modules=r".*language_model.*_proj")),
    ("mistral", "canonical_lora", {}),
    ("gemma2", "canonical_lora", {}),
    ("phi", "canonical_lora", {}),
    ("phi", "lora", {}),
    ("stablelm", "canonical_lora", {}),
    ("stablelm_12b", "lora", {}),
    ("mixtral", "canonical_lora", dict(target_modules=["q_proj", "o_proj"])),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("bases")
            hf = tiny_models.save(name, folder / "hf")
            made[name] = hf, hf_to_nemo.convert(hf, folder / "nemo")
        return made[name]

    return base


def megatron_logits(nemo, adapter=None):
    """[b, s, vocab] of NeMo's model with the adapter's transform applied to it."""
    checkpoint = nemo_folder.find(nemo)
    b, s = lora_adapters.TOKENS.shape
    with single_process():
        model = load_megatron(checkpoint, s)
        if adapter is not None:
            lora_nemo.load_megatron(adapter, model)
        mask = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None]
        with torch.inference_mode():
            logits = model(lora_adapters.TOKENS, torch.arange(s).expand(b, s), mask)
    return logits[..., : checkpoint.architecture.vocab_size]


@pytest.mark.parametrize(("name", "kind", "options"), LOGITS)
def test_logits_and_round_trip(name, kind, options, bases, tmp_path):
    hf, nemo = bases(name)
    adapted = lora_adapters.make(hf, tmp_path / "peft", **options)
    lora_to_nemo.convert(tmp_path / "peft", hf, tmp_path / "nemo", kind)
    found = megatron_logits(nemo, tmp_path / "nemo")
    scale = adapted.abs().max().item()
    assert (lora_adapters.plain_logits(hf) - adapted).abs().max() > 1e-2 * scale
    assert (found - adapted).abs().max() < 1e-5 * max(scale, 1.0)

    lora_from_nemo.convert(tmp_path / "nemo", tmp_path / "back")
    exact = "alpha_pattern" not in options or kind == "canonical_lora"
    assert_same_adapter(tmp_path / "peft", tmp_path / "back", exact)


def assert_same_adapter(a, b, exact=True):
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        if exact:
            assert torch.equal(after[key], tensor), key
        else:
            torch.testing.assert_close(after[key], tensor, rtol=1e-6, atol=0)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (a, b)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi"])
def test_checkpoint_is_what_megatron_saves(name, bases, tmp_path):
    """Keys, shapes, values and objects beside them, for both kinds, as Megatron's own save writes them."""
    from megatron.core import dist_checkpointing

    hf, nemo = bases(name)
    lora_adapters.make(hf, tmp_path / "peft")
    for kind in ("lora", "canonical_lora"):
        ours = lora_to_nemo.convert(tmp_path / "peft", hf, tmp_path / kind, kind) / "weights"
        theirs = tmp_path / f"{kind}-saved"
        theirs.mkdir()
        with single_process():
            model = lora_nemo.load_megatron(tmp_path / kind, load_megatron(nemo_folder.find(nemo), 24))
            assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapter." not in n)
            assert all(p.requires_grad for n, p in model.named_parameters() if ".adapter." in n)
            state = {key: value for key, value in model.sharded_state_dict(prefix="module.").items() if ".adapter." in key}
            dist_checkpointing.save({"state_dict": state}, str(theirs))
        assert _all_keys(ours) == _all_keys(theirs)
        assert_same_tensors(ours, theirs)


def _all_keys(weights):
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(weights).read_metadata().state_dict_metadata)


def assert_same_tensors(a, b):
    a, b = dist_checkpoint.read(a), dist_checkpoint.read(b)
    assert set(a) == set(b)
    for key in a:
        assert torch.equal(a[key].read(), b[key].read()), key


def test_loads_into_nemos_own_lora(bases, tmp_path):
    """The fused form is for NeMo's stock transform, with the settings' arguments."""
    from megatron.core import dist_checkpointing
    from nemo.collections.llm import fn
    from nemo.collections.llm.peft import LoRA

    hf, nemo = bases("qwen2")
    adapted = lora_adapters.make(hf, tmp_path / "peft")
    lora_to_nemo.convert(tmp_path / "peft", nemo, tmp_path / "nemo", "lora")
    settings = json.loads((tmp_path / "nemo" / "adapter.json").read_text())
    assert (settings["dim"], settings["alpha"], settings["kind"]) == (12, 24, "lora")  # q, k and v of rank 4 side by side
    assert json.loads((tmp_path / "nemo" / "weights" / "adapter_metadata.json").read_text()) == {"model_ckpt_path": str(nemo)}
    peft = LoRA(**{name: settings[name] for name in ("target_modules", "dim", "alpha")})
    with single_process():
        model = load_megatron(nemo_folder.find(nemo), 24)
        fn.walk(model, peft.transform)
        state = model.sharded_state_dict(prefix="module.")
        wanted = {key: value for key, value in state.items() if ".adapter." in key}
        loaded = dist_checkpointing.load({"state_dict": wanted}, str(tmp_path / "nemo" / "weights"))["state_dict"]
        model.load_state_dict({key.removeprefix("module."): value for key, value in loaded.items()}, strict=False)
        b, s = lora_adapters.TOKENS.shape
        with torch.inference_mode():
            logits = model(lora_adapters.TOKENS, torch.arange(s).expand(b, s), torch.ones(s, s).triu(1).bool()[None, None])
    assert (logits[..., :250] - adapted).abs().max() < 1e-5 * adapted.abs().max()


def test_trained_in_nemo(bases, tmp_path):
    """A fused adapter whose B is full: its A goes to all parts, and PEFT computes the same."""
    from peft import PeftModel

    hf, nemo = bases("llama")
    lora_adapters.make(hf, tmp_path / "peft", target_modules=["q_proj", "k_proj", "v_proj", "gate_proj"])
    lora_to_nemo.convert(tmp_path / "peft", hf, tmp_path / "source", "lora")
    settings = json.loads((tmp_path / "source" / "adapter.json").read_text())
    stored = dist_checkpoint.read(tmp_path / "source" / "weights")
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for key, tensor in stored.items():
        value = torch.randn(tensor.shape, generator=generator) * 0.1
        chunks = [
            dist_checkpoint.Chunk((i, 0, 0), (1, *tensor.shape[1:]), lambda value=value, i=i: value[i]) for i in range(len(value))
        ]
        tensors[key] = dist_checkpoint.StoredTensor(tensor.shape, torch.float32, chunks)
    trained = tmp_path / "trained"
    (trained / "weights").mkdir(parents=True)
    objects = lora_to_nemo._extra_states([], nemo_folder.find(nemo).architecture)
    dist_checkpoint.write(trained / "weights", tensors, objects)
    (trained / "adapter.json").write_text(json.dumps(settings))

    lora_from_nemo.convert(trained, tmp_path / "back")
    model = PeftModel.from_pretrained(lora_adapters.load(hf), tmp_path / "back").eval()
    with torch.inference_mode():
        logits = model(lora_adapters.TOKENS).logits
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.2.self_attn."
    assert torch.equal(back[f"{layer}q_proj.lora_A.weight"], back[f"{layer}v_proj.lora_A.weight"])
    lora_to_nemo.convert(tmp_path / "back", hf, tmp_path / "again", "lora")
    assert_same_tensors(trained / "weights", tmp_path / "again" / "weights")  # A's that are equal keep the rank
    found = megatron_logits(nemo, tmp_path / "again")
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()

    # a run's newest checkpoint, with the settings beside its model
    run = tmp_path / "run"
    shutil.copytree(trained / "weights", run / "checkpoints" / "step-7" / "weights")
    (run / "model").mkdir()
    (run / "model" / "adapter.json").write_text(json.dumps(settings))
    (run / "model" / "architecture.json").write_text(json.dumps(settings["architecture"]))
    for path in (run, run / "checkpoints" / "step-7"):
        shutil.rmtree(tmp_path / "from_run", ignore_errors=True)
        lora_from_nemo.convert(path, tmp_path / "from_run")
        assert_same_adapter(tmp_path / "from_run", tmp_path / "back")

    # without the settings alpha must be said
    (trained / "adapter.json").unlink()
    (trained / "architecture.json").write_text(json.dumps(settings["architecture"]))
    with pytest.raises(UserError, match="alpha=32 for example"):
        lora_from_nemo.convert(trained, tmp_path / "bare")
    lora_from_nemo.convert(trained, tmp_path / "bare", alpha=settings["alpha"])
    assert_same_adapter(tmp_path / "bare", tmp_path / "back")


@pytest.mark.parametrize("kind", ["lora", "canonical_lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_bit_for_bit(dtype, kind, bases, tmp_path):
    """Also where the scales differ by factors that are no powers of two: B is kept in fp32 then."""
    hf, _ = bases("llama")
    options = dict(rank_pattern={"k_proj": 3, "layers.2.mlp.gate_proj": 2}, alpha_pattern={"o_proj": 5}, use_rslora=True)
    lora_adapters.make(hf, tmp_path / "peft", dtype, **options)
    lora_to_nemo.convert(tmp_path / "peft", hf, tmp_path / "nemo", kind)
    lora_from_nemo.convert(tmp_path / "nemo", tmp_path / "back")
    assert_same_adapter(tmp_path / "peft", tmp_path / "back")


def test_layout_by_hand(bases, tmp_path):
    """Where a rank component of k and v lies: [group: 2 queries, key, value], head dimension 16."""
    hf, _ = bases("llama")
    lora_adapters.make(hf, tmp_path / "peft", target_modules=["k_proj", "v_proj"], layers_to_transform=[1])
    lora_to_nemo.convert(tmp_path / "peft", hf, tmp_path / "nemo", "lora")
    peft = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    tensors = dist_checkpoint.read(tmp_path / "nemo" / "weights")
    prefix = "module.decoder.layers.self_attention.linear_qkv.adapter."
    assert set(tensors) == {f"{prefix}linear_in.weight", f"{prefix}linear_out.weight"}
    a, b = (tensors[f"{prefix}linear_{x}.weight"].read() for x in ("in", "out"))
    assert a.shape == (4, 8, 64) and b.shape == (4, 128, 8)
    module = "base_model.model.model.layers.1.self_attn."
    assert torch.equal(a[1, :4], peft[f"{module}k_proj.lora_A.weight"])
    assert torch.equal(a[1, 4:], peft[f"{module}v_proj.lora_A.weight"])
    assert torch.equal(b[1, 32:48, :4], peft[f"{module}k_proj.lora_B.weight"][:16])
    assert torch.equal(b[1, 112:128, 4:], peft[f"{module}v_proj.lora_B.weight"][16:])
    assert not a[0].any() and not b[0].any() and not b[1, :32].any() and not b[1, 32:48, 4:].any()


def test_padding_stays_zero_in_training(bases, tmp_path):
    """What fills a smaller rank up gets no gradient."""
    hf, nemo = bases("llama")
    lora_adapters.make(
        hf, tmp_path / "peft", rank_pattern={"q_proj": 2}, layers_to_transform=[0, 3], target_modules=["q_proj", "o_proj"]
    )
    lora_to_nemo.convert(tmp_path / "peft", hf, tmp_path / "nemo")
    b, s = lora_adapters.TOKENS.shape
    with single_process():
        model = lora_nemo.load_megatron(tmp_path / "nemo", load_megatron(nemo_folder.find(nemo), s))
        logits = model(lora_adapters.TOKENS, torch.arange(s).expand(b, s), torch.ones(s, s).triu(1).bool()[None, None])
        logits.square().mean().backward()
        padded = [p for n, p in model.named_parameters() if "adapter_q" in n]
        for a, up in zip(padded[::2], padded[1::2], strict=True):
            assert not a.grad[2:].any() and not up.grad[:, 2:].any()
        assert padded[0].grad[:2].any() and padded[1].grad[:, :2].any()
        assert not padded[2].grad.any() and not padded[3].grad.any()  # layer 1 has none


def test_two_tensor_parallel_ranks(bases, tmp_path):
    """Loaded at TP2 the logits are PEFT's, and what two ranks save is what one rank loaded."""
    cases, adapted = [], {}
    for name, model, kind, sequence_parallel in (
        ("canonical", "qwen2", "canonical_lora", True),
        ("fused", "llama", "lora", False),
        ("postnorm", "gemma3_text", "canonical_lora", True),
        ("ungated", "phi", "lora", False),
    ):
        hf, nemo = bases(model)
        adapted[name] = lora_adapters.make(hf, tmp_path / name / "peft")
        adapter = lora_to_nemo.convert(tmp_path / name / "peft", hf, tmp_path / name / "nemo", kind)
        cases.append((name, str(nemo), str(adapter), sequence_parallel))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_group(2, lora_worker.main, tmp_path, log=tmp_path / "two.log")
    for name, logits in adapted.items():
        found = torch.load(tmp_path / f"{name}.pt")
        assert (found - logits).abs().max() < 1e-5 * max(logits.abs().max(), 1.0), name
        assert_same_tensors(tmp_path / name / "nemo" / "weights", tmp_path / f"{name}-saved" / "weights")


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("llama", dict(target_modules=["q_proj", "embed_tokens"]), None, "adapts model.embed_tokens, which NeMo's LoRA"),
        ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), None, "modules_to_save.*merge it"),
        ("mixtral", dict(target_modules=["w1"]), None, "experts.0.w1, which NeMo's LoRA of a mixtral does not"),
        ("llama", dict(use_dora=True, target_modules=["q_proj"]), None, "k_proj lacks some"),
        ("llama", dict(use_dora=True), "lora", "kind=lora does not hold"),
        ("llama", {}, "dora", "has no DoRA magnitudes"),
        ("llama", {}, "ia3", "kind=ia3 is not one of canonical_lora, lora, dora"),
        ("qwen2", dict(use_dora=True), None, "scales the bias of linear_qkv"),
        ("gemma3_text", dict(use_dora=True), None, "scales the norm of linear_proj"),
        ("gemma3", dict(target_modules=["q_proj"]), None, "vision_tower"),
    ],
)
def test_what_nemo_cannot_hold_is_refused(name, options, kind, message, bases, tmp_path):
    hf, _ = bases(name)
    lora_adapters.make(hf, tmp_path / "peft", **options)
    with pytest.raises(UserError, match=message):
        lora_to_nemo.convert(tmp_path / "peft", hf, tmp_path / "nemo", kind)
    assert not (tmp_path / "nemo").exists()


def test_other_bases_and_folders_are_refused(bases, tmp_path):
    llama, nemo = bases("llama")
    lora_adapters.make(llama, tmp_path / "peft", target_modules=["q_proj", "o_proj"])
    for other, message in (("gemma3_text", "layers.4.self_attn.*lacks its tensors"), ("qwen3", r"\[64, 64\].*\[64, 96\]")):
        with pytest.raises(UserError, match=message):
            lora_to_nemo.convert(tmp_path / "peft", bases(other)[0], tmp_path / "nemo")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("layers.3", "layers.7"): value for key, value in tensors.items()}, file)
    with pytest.raises(UserError, match="layers.7.self_attn.*the base has 4 layers"):
        lora_to_nemo.convert(tmp_path / "peft", nemo, tmp_path / "nemo")
    with pytest.raises(UserError, match="has no adapters: it is a whole model"):
        lora_from_nemo.convert(nemo, tmp_path / "back", alpha=1)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe an adapter"):
        lora_from_nemo.convert(tmp_path / "damaged", tmp_path / "back", alpha=1)
    with pytest.raises(UserError, match="no such folder"):
        lora_from_nemo.convert(tmp_path / "nothing", tmp_path / "back")


def test_alpha_that_is_not_whole(bases, tmp_path):
    hf, _ = bases("llama")
    lora_adapters.make(hf, tmp_path / "peft", target_modules=["q_proj"], use_rslora=True, r=3, lora_alpha=2)
    lora_to_nemo.convert(tmp_path / "peft", hf, tmp_path / "nemo")
    settings = json.loads((tmp_path / "nemo" / "adapter.json").read_text())
    assert settings["alpha"] / settings["dim"] == pytest.approx(2 / math.sqrt(3)) and settings["dim"] == 3
    with pytest.raises(UserError, match="leave alpha= out"):
        lora_from_nemo.convert(tmp_path / "nemo", tmp_path / "back", alpha=2)


def test_killed_conversions_go_on(bases, tmp_path, monkeypatch):
    """Both ways: what the first call had on disk is not written again, and the result is that of one that was not stopped."""
    hf, _ = bases("llama")
    lora_adapters.make(hf, tmp_path / "adapter")
    whole = lora_to_nemo.convert(tmp_path / "adapter", hf, tmp_path / "whole")
    back = lora_from_nemo.convert(whole, tmp_path / "back")

    def killed(share, convert, *arguments):
        """The share that was there when it went on."""
        seen = []

        def stop(done, total, unit):
            if done > share * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(*arguments, progress=stop)
        convert(*arguments, progress=lambda done, total, unit: seen.append(done / total))
        return seen[0]

    monkeypatch.setattr("conversion.atomic.GROWTH", 256)
    assert killed(0.7, lora_to_nemo.convert, tmp_path / "adapter", hf, tmp_path / "nemo") > 0.4
    assert killed(0.7, lora_from_nemo.convert, whole, tmp_path / "peft") > 0.6
    expected, found = dist_checkpoint.read(whole / "weights"), dist_checkpoint.read(tmp_path / "nemo" / "weights")
    assert expected.keys() == found.keys() and all(torch.equal(expected[k].read(0), found[k].read(0)) for k in expected)
    for file in back.iterdir():
        assert (tmp_path / "peft" / file.name).read_bytes() == file.read_bytes()
