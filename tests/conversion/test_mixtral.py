"""Mixtral: routing, gradients and checkpoints as Hugging Face has them, at one process and at EP 2, TP 2 and PP 2."""

import json
from pathlib import Path

import mixtral_worker
import pytest
import tiny_models
import torch
import torch.distributed.checkpoint as dcp
from nemo_processes import run_group
from safetensors.torch import load_file, save_file

from conversion import families, hf_to_nemo, nemo_folder, nemo_to_hf
from conversion.compare import activations, megatron
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from recipes import models

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """FOLDER/hf converted to FOLDER/nemo."""
    folder = tmp_path_factory.mktemp("mixtral")
    hf_to_nemo.convert(tiny_models.save("mixtral", folder / "hf"), folder / "nemo")
    return folder


@pytest.fixture(scope="module")
def two(folder) -> dict[str, list]:
    """{layout: [(logits, parameters) of each of two processes]}."""
    run_group(2, mixtral_worker.main, folder, log=folder / "two.log")
    return {name: [torch.load(folder / f"{name}-rank{rank}.pt") for rank in range(2)] for name in mixtral_worker.LAYOUTS}


def stored(nemo: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, through torch's own reader."""
    sizes = dcp.FileSystemReader(nemo / "weights").read_metadata().state_dict_metadata
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in sizes.items() if hasattr(v, "size")}
    dcp.load(state, storage_reader=dcp.FileSystemReader(nemo / "weights"), no_dist=True)
    return state


def test_mixtral_8x7b():
    a = families.architecture(MIXTRAL_8X7B)
    assert (a.num_moe_experts, a.moe_router_topk, a.rotary_base, a.layernorm_epsilon) == (8, 2, 1e6, 1e-5)
    assert a.num_parameters() == 46_702_792_704  # the model card's 46.7B, 12.9B of them for a token
    assert a.num_active_parameters() == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336 == 12_879_925_248
    assert a.moe_aux_loss_coeff == 0.02 * 2 / 32  # Hugging Face's loss is 2 when balanced; Megatron adds 32 that are 1
    larger = dict(hidden_size=6144, intermediate_size=16384, num_attention_heads=48, num_hidden_layers=56,
                  max_position_embeddings=65536, router_aux_loss_coef=0.001)  # fmt: skip
    assert models.size("mixtral", "8x7b").architecture == a
    assert models.size("mixtral", "8x22b").architecture == families.architecture(MIXTRAL_8X7B | larger)


def test_the_configuration_comes_back():
    """transformers reads what we write as the same architecture and balancing loss, and counts the parameters alike."""
    import transformers

    tiny = json.loads(tiny_models.configs()["mixtral"].to_json_string())
    for config in (MIXTRAL_8X7B, tiny):
        a = families.architecture(config)
        again = transformers.MixtralConfig(**families.hf_config(a))
        assert families.architecture(json.loads(again.to_json_string())) == a
        assert again.router_aux_loss_coef == config["router_aux_loss_coef"]
    model = transformers.MixtralForCausalLM(again)
    assert a.num_parameters() == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert a.num_active_parameters() == a.num_parameters() - experts // 2  # two of four


def test_operations_are_those_of_the_chosen_experts():
    """3 x (2 (layers (2 h^2 + 2 h kv + 2 x 3 h ffn + 8 h) + h vocab) + 2 seq h layers) a token."""
    seq, h, kv, ffn, layers, vocab = 4096, 4096, 1024, 14336, 32, 32000
    by_hand = 3 * (2 * (layers * (2 * h * h + 2 * h * kv + 2 * 3 * h * ffn + 8 * h) + h * vocab) + 2 * seq * h * layers)
    assert families.architecture(MIXTRAL_8X7B).flops_per_token(seq) == by_hand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ({"num_experts_per_tok": 9}, "moe_router_topk=9 is not between 1 and num_moe_experts=8"),
        ({"num_local_experts": 0}, "moe_router_topk=2 is not between"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"num_local_experts": "eight"}, "does not describe a mixtral model"),
    ],
)
def test_what_does_not_convert_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        families.architecture(MIXTRAL_8X7B | change)


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok"])
def test_a_missing_key_is_named(key):
    with pytest.raises(UserError, match=f"lacks {key}"):
        families.architecture({k: v for k, v in MIXTRAL_8X7B.items() if k != key})


def test_a_missing_or_additional_expert_is_named(folder, tmp_path):
    weights = load_file(folder / "hf" / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "hf" / "config.json").read_text())
    expert = "model.layers.2.block_sparse_moe.experts.3.w3.weight"
    save_file({k: v for k, v in weights.items() if k != expert}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks 1 of its 79 tensors, first {expert}"):
        hf_to_nemo.convert(tmp_path, tmp_path / "nemo")
    more = expert.replace("experts.3", "experts.4")
    save_file(weights | {more: weights[expert].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"has 1 tensors that a mixtral .* has not, first {more}"):
        hf_to_nemo.convert(tmp_path, tmp_path / "nemo")


def test_keys_and_shapes_are_megatrons(folder):
    """Against the model itself: every tensor and every extra state it would load is there with its shape, and no other tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    with megatron.single_process():
        model = megatron.load_megatron(nemo_folder.find(folder / "nemo"), seq_length=16)
        wanted = model.sharded_state_dict(prefix="module.")
        apply_factories(wanted)
        tensors = {t.key: tuple(t.global_shape) for t in nested_values(wanted) if isinstance(t, ShardedTensor)}
        objects = {o.unique_key for o in nested_values(wanted) if isinstance(o, ShardedObject)}
    metadata = dcp.FileSystemReader(folder / "nemo" / "weights").read_metadata().state_dict_metadata
    assert {k: tuple(v.size) for k, v in metadata.items() if hasattr(v, "size")} == tensors
    assert tensors["module.decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (4, 4, 192, 64)
    assert objects <= set(metadata)
    assert sum("experts" in key for key in objects) == 4 * 4 * 2


def test_values_by_hand_and_one_expert_at_a_time(folder):
    hf, state = load_file(folder / "hf" / "model.safetensors"), stored(folder / "nemo")
    fc1 = state["module.decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    fc2 = state["module.decoder.layers.mlp.experts.experts.linear_fc2.weight"]
    for layer in range(4):
        moe = f"model.layers.{layer}.block_sparse_moe."
        assert torch.equal(state["module.decoder.layers.mlp.router.weight"][layer], hf[f"{moe}gate.weight"])
        for e in range(4):
            w1, w2, w3 = (hf[f"{moe}experts.{e}.w{n}.weight"] for n in (1, 2, 3))
            assert torch.equal(fc1[layer, e], torch.cat([w1, w3])) and torch.equal(fc2[layer, e], w2)
    metadata = dcp.FileSystemReader(folder / "nemo" / "weights").read_metadata().state_dict_metadata
    for name, shape in (("linear_fc1", (1, 1, 192, 64)), ("linear_fc2", (1, 1, 64, 96))):
        chunks = metadata[f"module.decoder.layers.mlp.experts.experts.{name}.weight"].chunks
        assert [tuple(chunk.sizes) for chunk in chunks] == [shape] * 16


def test_nemos_own_importer_gives_the_same_tensors(folder):
    """NeMo's connector builds both models in memory; its Megatron model has our checkpoint's parameters."""
    import fiddle
    import transformers
    from nemo.collections.llm.gpt.model.mixtral import HFMixtralImporter

    from nemo_ext.modeling import model_config

    checkpoint = nemo_folder.find(folder / "nemo")
    a = checkpoint.architecture
    source = transformers.MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    with megatron.single_process():
        ours = dict(megatron.load_megatron(checkpoint, seq_length=16).named_parameters())
        theirs = fiddle.build(model_config(a, 16, params_dtype=torch.float32, bf16=False))
        theirs.configure_model()
        HFMixtralImporter(str(folder / "hf")).convert_state(source, theirs)
        theirs = dict(theirs.module.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        rows = slice(0, a.vocab_size) if value.shape[0] == a.padded_vocab_size else slice(None)  # they leave padding as it was
        assert torch.equal(value[rows], theirs[name][rows]), name


@pytest.mark.parametrize(("layers", "coefficient", "window"), [(4, 0.0, 12), (1, 0.2, None)])
def test_gradients_are_hugging_faces(layers, coefficient, window, tmp_path):
    """Every parameter's gradient of the cross entropy, and in one layer, where the two losses are one, of the balancing loss."""
    import transformers

    config = tiny_models.configs()["mixtral"]
    config.update(dict(num_hidden_layers=layers, router_aux_loss_coef=coefficient, num_experts_per_tok=3,
                       sliding_window=window))  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    reference = transformers.MixtralForCausalLM(config).train()
    reference.save_pretrained(tmp_path / "hf")
    nemo = hf_to_nemo.convert(tmp_path / "hf", tmp_path / "nemo")
    tokens = mixtral_worker.tokens()
    labels = tokens.roll(-1, dims=1)
    out = reference(tokens, output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    (loss + coefficient * out.aux_loss).backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}

    a = nemo_folder.find(nemo).architecture
    assert (a.sliding_window.size if a.sliding_window else None) == window
    with megatron.single_process():
        model = megatron.load_megatron(nemo_folder.find(nemo), mixtral_worker.SEQ).train()
        logits = mixtral_worker.run(model, tokens)[..., : a.vocab_size]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
    seen = set()
    for row in families.FAMILIES["mixtral"].rows_of(a):
        for index in row.indices(a):
            name = row.megatron.format(**index).replace("experts.experts.", "experts.local_experts.")
            expected = row.layout.merge(a, [gradients[hf_name.format(**index)] for hf_name in row.hf])
            assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-6), name
            seen.add(name)
    assert seen == set(found)
    assert sum(g.abs().max() > 1e-3 for n, g in found.items() if "router" in n) == layers  # the router learns


def test_logits_at_one_process_and_at_every_split(folder, two):
    import transformers

    vocab = nemo_folder.find(folder / "nemo").architecture.vocab_size
    reference = transformers.MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = reference(mixtral_worker.tokens()).logits
    with megatron.single_process(), torch.inference_mode():
        model = megatron.load_megatron(nemo_folder.find(folder / "nemo"), mixtral_worker.SEQ)
        one = [(mixtral_worker.run(model, mixtral_worker.tokens()), None)]
    for name, ranks in {"one process": one, **two}.items():
        seen = [logits for logits, _ in ranks if logits is not None]
        assert len(seen) == (2 if name in ("ep2", "tp2") else 1)
        for logits in seen:
            found = activations.compare(expected, logits[..., :vocab])
            assert found.largest_logit > 0.5  # the comparison is of something
            assert found.max_abs < 1e-5, name
            assert found.top1_agreement == 1.0


def test_each_process_has_its_experts(folder, two):
    """From the Hugging Face tensors by hand: EP cuts the experts, TP each expert, PP the layers."""
    hf = load_file(folder / "hf" / "model.safetensors")

    def expert(layer: int, e: int) -> list[torch.Tensor]:
        return [hf[f"model.layers.{layer}.block_sparse_moe.experts.{e}.w{n}.weight"] for n in (1, 3, 2)]

    for rank in range(2):
        ep, tp, pp = (two[name][rank][1] for name in ("ep2", "tp2", "pp2"))
        for layer in range(4):
            local = f"decoder.layers.{layer}.mlp.experts.local_experts."
            assert sum(name.startswith(local) for name in ep) == 4  # two experts of two matrices
            for e in range(2):
                gate, up, down = expert(layer, 2 * rank + e)
                assert torch.equal(ep[f"{local}{e}.linear_fc1.weight"], torch.cat([gate, up]))
                assert torch.equal(ep[f"{local}{e}.linear_fc2.weight"], down)
            for e in range(4):
                gate, up, down = expert(layer, e)
                mine = slice(48 * rank, 48 * rank + 48)
                assert torch.equal(tp[f"{local}{e}.linear_fc1.weight"], torch.cat([gate[mine], up[mine]]))
                assert torch.equal(tp[f"{local}{e}.linear_fc2.weight"], down[:, mine])
            for parameters in (ep, tp):
                router = parameters[f"decoder.layers.{layer}.mlp.router.weight"]
                assert torch.equal(router, hf[f"model.layers.{layer}.block_sparse_moe.gate.weight"])
        for layer in range(2):
            for e in range(4):
                gate, up, down = expert(2 * rank + layer, e)
                local = f"decoder.layers.{layer}.mlp.experts.local_experts.{e}."
                assert torch.equal(pp[f"{local}linear_fc1.weight"], torch.cat([gate, up]))
                assert torch.equal(pp[f"{local}linear_fc2.weight"], down)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "300KB"}], ids=["one file", "shards"])
def test_there_and_back_is_bitwise(options, tmp_path):
    """Tensors, files, the shards' index and the configuration."""
    hf = tiny_models.save("mixtral", tmp_path / "hf", **options)
    back = nemo_to_hf.export(hf_to_nemo.convert(hf, tmp_path / "nemo"), tmp_path / "back")
    files = sorted(file.name for file in hf.glob("model*"))
    assert sorted(file.name for file in back.glob("model*")) == files and len(files) == (7 if options else 1)
    for name in files:
        if name.endswith(".json"):
            assert json.loads((back / name).read_text()) == json.loads((hf / name).read_text())
        else:
            assert (back / name).read_bytes() == (hf / name).read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads((hf / "config.json").read_text())


def test_architectures_of_experts_are_checked():
    sizes = dict(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, num_query_groups=1, vocab_size=8)
    with pytest.raises(ValueError, match="go together"):
        Architecture("mixtral", **sizes, num_moe_experts=4)
    with pytest.raises(ValueError, match="moe_router_topk=5"):
        Architecture("mixtral", **sizes, num_moe_experts=4, moe_router_topk=5)
