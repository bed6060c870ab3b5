"""Recipes as data: names, defaults, shapes against what NeMo and Hugging Face publish, overrides by path."""

import ast
import collections
import dataclasses
from pathlib import Path

import pytest

import recipes
from nemo_ext.errors import UserError
from recipes.models import FAMILIES, size

PARAMETERS = {  # as the published checkpoints count them
    ("llama3", "8b"): 8_030_261_248,
    ("llama3", "70b"): 70_553_706_496,
    ("llama3", "1b"): 1_235_814_400,
    ("llama3", "3b"): 3_212_749_824,
    ("llama3", "smoke"): 134_515_008,
    ("gemma3", "1b"): 999_885_952,
    ("gemma3", "4b"): 3_880_263_168,
    ("phi4", "14b"): 14_659_507_200,
    ("qwen2.5", "7b"): 7_615_616_512,
    ("qwen3", "8b"): 8_190_735_360,
    ("qwen3", "0.6b"): 596_049_920,
}


@pytest.mark.parametrize("family, name", PARAMETERS)
def test_parameters_are_the_published_ones(family, name):
    assert size(family, name).architecture.num_parameters() == PARAMETERS[family, name]


def test_custom_1b3_is_the_model_it_says():
    shape = size("custom", "1b3").architecture
    assert (shape.num_layers, shape.hidden_size, shape.num_attention_heads, shape.vocab_size) == (24, 2048, 16, 50_000)
    assert recipes.resolve("pretrain_custom", {"size": "1b3"}, cuda=True)["seq"] == 2048
    assert 1.25e9 < shape.num_parameters() < 1.35e9


def test_every_method_takes_every_family_it_names():
    assert {"cpt_llama3", "cpt_gemma3", "cpt_phi4", "cpt_qwen2.5", "cpt_qwen3", "pretrain_custom"} <= set(recipes.names())
    assert "cpt_custom" not in recipes.names()
    for name in recipes.names():
        method, family = recipes.split(name)
        assert family in method.families and FAMILIES[family].default_size in FAMILIES[family].sizes


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="recipe=cpt_lama3 is unknown, the nearest is cpt_llama3"):
        recipes.split("cpt_lama3")


def test_defaults_follow_the_device():
    cpu, gpu = (recipes.resolve("cpt_llama3", {}, cuda=cuda) for cuda in (False, True))
    assert (cpu["size"], cpu["precision"], cpu["device"], cpu["steps"]) == ("smoke", "fp32", "cpu", 10)
    assert (gpu["size"], gpu["precision"], gpu["device"], gpu["steps"]) == ("8b", "bf16", "gpu", None)


def test_conversations_have_defaults_and_keys_of_their_own():
    cpu, gpu = (recipes.resolve("sft_llama3", {}, cuda=cuda) for cuda in (False, True))
    assert (cpu["lr"], cpu["cp"], cpu["pack"], cpu["micro_batch"]) == (1e-5, 1, True, None)
    assert gpu["micro_batch"] == 1  # a packed row of Transformer Engine
    assert recipes.resolve("sft_llama3", {"pack": False}, cuda=True)["micro_batch"] is None
    assert recipes.resolve("sft_gemma2", {}, cuda=True)["pack"] is False
    with pytest.raises(UserError, match="pack=true: capped attention takes no packed rows on a GPU"):
        recipes.resolve("sft_gemma2", {"pack": True}, cuda=True)
    with pytest.raises(UserError, match="train_on= is for recipe=sft_llama3, not for cpt_llama3"):
        recipes.resolve("cpt_llama3", {"train_on": "all"}, cuda=False)
    recipes.resolve("cpt_llama3", {"train_on": "assistant"}, cuda=False)  # the default, as a saved configuration has it


def test_a_recipe_of_conversations(llm):
    from nemo_ext.data.chat.module import ChatDataModule

    recipe = recipes.load("sft_mixtral", size="smoke")
    assert recipe.data.__fn_or_cls__ is ChatDataModule and recipe.data.pack
    assert recipe.model.config.calculate_per_token_loss and recipe.model.config.moe_aux_loss_coeff == 0
    assert recipes.load("cpt_mixtral", size="smoke").model.config.moe_aux_loss_coeff > 0


def test_finish_fills_what_follows_from_the_steps():
    keys = recipes.finish({**recipes.resolve("cpt_llama3", {"lr": 4e-5}, cuda=True), "steps": 2000})
    assert (keys["warmup"], keys["every"], keys["val_every"]) == (60, 200, 200)
    assert keys["min_lr"] == pytest.approx(4e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"lr": -1.0}, "lr=-1.0 must be above 0"),
        ({"heldout": 1.5}, "heldout=1.5 must be at least 0 and below 1"),
        ({"schedule": "cosin"}, "schedule=cosin is none of cosine, wsd, linear, constant"),
        ({"size": "9b"}, "size=9b is not a size of llama3: 8b, 70b, 1b, 3b, smoke"),
        ({"layers": 3}, "layers= is for recipe=pretrain_custom"),
        ({"steps": 10, "warmup": 10}, "warmup=10 leaves no step of steps=10"),
        ({"steps": 10, "profile": 11}, "profile=11 is a step after the last of steps=10"),
        ({"min_lr": 1.0}, "min_lr=1.0 is above lr=2e-05"),
    ],
)
def test_bad_values_are_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        recipes.resolve("cpt_llama3", given, cuda=False)


def test_custom_shape_keys_change_the_shape():
    keys = recipes.resolve("pretrain_custom", {"layers": 3, "hidden": 128, "heads": 8, "vocab": 1000, "tied": False}, cuda=False)
    shape = recipes.architecture("pretrain_custom", keys)
    assert (shape.num_layers, shape.hidden_size, shape.kv_channels, shape.num_query_groups) == (3, 128, 16, 8)
    assert (shape.vocab_size, shape.padded_vocab_size, shape.share_embeddings_and_output_weights) == (1000, 1024, False)
    with pytest.raises(UserError, match="hidden=130 is not a multiple of heads=8"):
        recipes.architecture("pretrain_custom", {**keys, "hidden": 130})


@pytest.fixture(scope="module")
def llm():
    from nemo_ext import platform

    platform.activate()
    from nemo.collections import llm

    return llm


NEMO_CLASSES = {
    ("llama3", "8b"): "Llama31Config8B",
    ("llama3", "70b"): "Llama31Config70B",
    ("llama3", "1b"): "Llama32Config1B",
    ("llama3", "3b"): "Llama32Config3B",
    ("qwen2.5", "7b"): "Qwen25Config7B",
    ("qwen3", "8b"): "Qwen3Config8B",
    ("gemma3", "4b"): "Gemma3Config4B",
}


@pytest.mark.parametrize("family, name", NEMO_CLASSES)
def test_shapes_agree_with_nemos_own(llm, family, name):
    """The same model as NeMo's class of that size, apart from what NeMo has wrong or leaves to the tokenizer."""
    import fiddle as fdl

    ours = fdl.build(recipes.load(f"pretrain_{family}", size=name, device="gpu").model.config)
    theirs = getattr(llm, NEMO_CLASSES[family, name])()
    fields = ("num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups layernorm_epsilon rotary_base "
              "share_embeddings_and_output_weights normalization gated_linear_unit add_bias_linear "
              "add_qkv_bias qk_layernorm").split()  # fmt: skip
    if family == "gemma3":  # its layer always normalises queries and keys; its activation depends on what is fused
        fields.remove("qk_layernorm")
    else:
        fields.append("activation_func")
    for field in [
        *fields,
        *(f for f in ("scale_factor", "interleaved_attn_pattern", "rope_scaling_factor") if hasattr(theirs, f)),
    ]:
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.kv_channels == (theirs.kv_channels or theirs.hidden_size // theirs.num_attention_heads)


def test_load_returns_nemos_pretrain_and_takes_overrides(llm):
    recipe = recipes.load("pretrain_llama3", size="1b", tp=2, pp=2, vp=2, lr=1e-4,
                          overrides={"trainer.strategy.ckpt_parallel_save": False, "optim.config.adam_beta1": 0.8,
                                     "trainer.callbacks.Evaluation.every": 7, "model.config.hidden_dropout": 0.1})  # fmt: skip
    assert recipe.__fn_or_cls__ is llm.pretrain
    strategy = recipe.trainer.strategy
    assert (strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size) == (2, 2)
    assert strategy.virtual_pipeline_model_parallel_size == 2 and recipe.model.config.batch_p2p_comm is False
    assert strategy.sequence_parallel and strategy.ckpt_parallel_save is False
    assert (recipe.optim.config.lr, recipe.optim.config.adam_beta1, recipe.model.config.hidden_dropout) == (1e-4, 0.8, 0.1)
    assert [c.every for c in recipe.trainer.callbacks if c.__fn_or_cls__.__name__ == "Evaluation"] == [7]


@pytest.mark.parametrize(
    "path, value, message",
    [
        (
            "trainer.strategi.ckpt_parallel_save",
            True,
            "trainer.strategi is not a part of the recipe, did you mean trainer.strategy",
        ),
        ("trainer.max_stepz", 3, "trainer.max_stepz is not a field of Trainer, did you mean trainer.max_steps"),
        ("trainer.strategy.ckpt_parallel_save", "perhaps", "ckpt_parallel_save='perhaps' is of the wrong type: bool is wanted"),
        ("optim.config.adam_beta1", "high", "adam_beta1='high' is of the wrong type: float is wanted"),
        ("trainer.strategy", 3, "trainer.strategy is an object of the recipe"),
    ],
)
def test_overrides_are_checked(llm, path, value, message):
    with pytest.raises(UserError, match=message):
        recipes.load("pretrain_llama3", size="smoke", overrides={path: value})


def test_key_paths_exist_in_the_recipe(llm):
    """Every key that names a field of the recipe names one that is there, so that the path can be given instead."""
    from recipes.keys import fields
    from recipes.overrides import _child, _parameters

    loaded = {method: recipes.load(f"{method}_llama3", size="smoke") for method in recipes.METHODS}
    for name, f in fields().items():
        if not (path := f.metadata["path"]):
            continue
        node, parts = loaded[(f.metadata["only"] or ("pretrain",))[0]], path.split(".")
        for i, part in enumerate(parts[:-1]):
            node = _child(node, part, ".".join(parts[: i + 1]))
        assert parts[-1] in _parameters(node), f"{name}: {path}"


def test_schema_is_a_dataclass_with_help():
    assert all(f.metadata["help"] for f in dataclasses.fields(recipes.TrainKeys))


def test_no_key_is_declared_twice():
    """A dataclass takes the second without a word."""
    for file in ("keys.py", "grpo.py"):
        tree = ast.parse((Path(recipes.__file__).parent / file).read_text())
        for schema in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            names = collections.Counter(line.target.id for line in schema.body if isinstance(line, ast.AnnAssign))
            assert names and max(names.values()) == 1, names.most_common(1)
