"""Recipes: what to train and how. A recipe is a method times a model family, never a file for a pair.

    recipes.names()                          # {"cpt_llama3": "continue pre-training: Llama 3.1 and 3.2", ...}
    recipes.load("cpt_llama3", size="8b")    # a NeMo-Run object: print it, change it, diff it

Listing recipes and resolving their keys imports neither torch nor NeMo; `load` does.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nemo_ext import adapters
from nemo_ext.architecture import Architecture
from nemo_ext.command_line import check_value
from nemo_ext.errors import UserError
from nemo_ext.multimodal import freezing, towers
from nemo_ext.multimodal.description import AUDIO, VISION, Sense
from recipes import device, grpo, kernels, models
from recipes.grpo import GrpoKeys
from recipes.keys import TEXT, TrainKeys, fields
from recipes.models import FAMILIES


@dataclass(frozen=True)
class Method:
    """A way of training: its description, the families it takes, and its defaults where they differ from the schema's."""

    description: str
    families: tuple[str, ...]
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs_weights: bool = False
    conversations: bool = False  # what it learns, rather than documents
    adapter: str | None = None  # the kind of adapter that it trains, rather than all weights: nemo_ext.adapters.KINDS
    nf4: bool = False  # whether the frozen linears are in 4 bits
    modality: str | None = None  # the sense that it gives the model: "vision" or "audio"
    schema: type = TrainKeys


PUBLISHED = tuple(family for family in FAMILIES if family != "custom")  # what there are weights of


def _tuning(description: str, lr: float, **more: Any) -> Method:
    """A method that learns conversations from published weights."""
    defaults = {"lr": lr, "weight_decay": 0.0}
    if "modality" in more:
        defaults["skip_bad"] = True  # of many media some are always broken
    return Method(description, PUBLISHED, defaults, needs_weights=True, conversations=True, **more)


METHODS = {
    "cpt": Method("continue pre-training", PUBLISHED, needs_weights=True),
    "sft": _tuning("tune on conversations", 1e-5),
    "lora": _tuning("train an adapter on conversations (LoRA)", 2e-4, adapter="lora"),
    "qlora": _tuning("train an adapter of a 4-bit model on conversations (QLoRA)", 2e-4, adapter="lora", nf4=True),
    "dora": _tuning("train an adapter of magnitudes and directions (DoRA)", 2e-4, adapter="dora"),
    "moe_dora": _tuning("train DoRA experts and routers of the last layers (MoE-DoRA)", 2e-4, adapter="moe_dora"),
    "adalora": _tuning("train an adapter that finds its ranks on conversations (AdaLoRA)", 1e-3, adapter="adalora"),
    "fourierft": _tuning("train an adapter's spectrum on conversations (FourierFT)", 3e-3, adapter="fourierft"),
    "neva": _tuning("give a model eyes, from images with conversations (LLaVA, NeVA)", 1e-3, modality=VISION),
    "alm": _tuning("give a model ears, from sounds with conversations", 1e-3, modality=AUDIO),
    "grpo": Method("learn to reason from rewards of sampled answers (GRPO)", PUBLISHED, needs_weights=True, schema=GrpoKeys),
    "pretrain": Method("pre-train from random weights", tuple(FAMILIES), {"lr": 3e-4}),
}
# How a CPU teaches the smallest model to read characters within minutes: a fresh tower and projector learn, with steps that are
# small and many, to tell a frozen language model what it sees. Where that one learns too, they need a rate of their own.
GLYPHS = {"data": "glyphs:10", "tower": "random:glyphs", "feature_layer": -1, "train_tower": "full", "template": "plain",
          "seq": 64, "global_batch": 2, "epochs": 2.0, "every": 100, "val_every": 100, "export": "hf", "answers": 10}  # fmt: skip
GLYPHS_LR = 2e-3
SHAPE_KEYS = {"layers": "num_layers", "hidden": "hidden_size", "ffn": "ffn_hidden_size", "heads": "num_attention_heads",
              "kv_heads": "num_query_groups", "vocab": "vocab_size", "tied": "share_embeddings_and_output_weights"}  # fmt: skip


def names() -> dict[str, str]:
    """Every recipe with a line about it."""
    return {
        f"{method}_{family}": f"{m.description}: {FAMILIES[family].description}"
        for method, m in METHODS.items()
        for family in m.families
    }


def split(name: str) -> tuple[Method, str]:
    """The method and family of a recipe's name. Raises UserError that names the nearest recipe."""
    import difflib

    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)
        raise UserError(f"recipe={name} is unknown, the nearest is {near[0]}; run without arguments to list all")
    method = method_of(name)
    return METHODS[method], name.removeprefix(f"{method}_")


def method_of(name: str) -> str:
    """The method's part of a recipe's name: `moe_dora` of `moe_dora_llama3`."""
    return next(method for method in METHODS for family in METHODS[method].families if name == f"{method}_{family}")


def schema(name: str | None) -> type:
    """The dataclass of a recipe's keys; that of training recipes for a name that is none."""
    return split(name)[0].schema if name in names() else TrainKeys


def resolve(name: str, given: dict[str, Any], *, cuda: bool) -> dict[str, Any]:
    """All keys of a recipe: the given ones over the method's and size's defaults.

    What only the data or the plan can tell (`steps`, `tp`, `micro_batch` ...) stays None. Raises UserError.
    """
    method, family = split(name)
    if method.schema is GrpoKeys:
        return grpo.resolve(name, family, given, cuda=cuda)
    if (unknown := set(given) - set(fields())) != set():
        raise UserError(f"{name} has no key {', '.join(sorted(unknown))}")
    for key, field in fields().items():
        only, value = field.metadata["only"], given.get(key)
        unused = value in (None, field.default) or (value is False and field.default is None)  # as a plan leaves it
        if only and method_of(name) not in only and not unused:
            raise UserError(f"{key}= is for recipe={only[0]}_{family}, not for {name}")
    keys = {**{n: f.default for n, f in fields().items()}, **method.defaults}
    keys.update({k: v for k, v in given.items() if v is not None})
    device.settle(keys, fields(), cuda)
    on_cpu = keys["device"] == "cpu"
    keys["size"] = keys["size"] or ("smoke" if on_cpu and not keys["model"] else FAMILIES[family].default_size)
    smoke = on_cpu and keys["size"] == "smoke"
    glyphs = smoke and method.modality == VISION and _of_glyphs(given)
    if glyphs:
        keys |= {k: v for k, v in GLYPHS.items() if given.get(k) is None}
    longest = models.size(family, keys["size"]).architecture.max_position_embeddings
    defaults = {
        "data": "glyphs" if method.modality == VISION else "python-docs",
        **device.defaults(keys),
        "gpus": 1 if on_cpu else None,
        "steps": 10 if smoke and not glyphs else None,
        "out": f"runs/{name}-{keys['size']}",
    }
    defaults["seq"] = min(defaults["seq"], longest)
    if method.conversations:
        defaults["cp"] = 1  # packed conversations are not split over devices
        capped = models.size(family, keys["size"]).architecture.attn_logit_softcapping is not None
        if not on_cpu and capped:
            if given.get("pack"):
                raise UserError("pack=true: capped attention takes no packed rows on a GPU: pack=false")
            keys["pack"] = False
        if keys["pack"] and not on_cpu:
            defaults["micro_batch"] = 1  # Transformer Engine takes one packed row
    keys.update({k: v for k, v in defaults.items() if keys[k] is None})
    if any(keys[k] is not None for k in SHAPE_KEYS) and family != "custom":
        bad = next(k for k in SHAPE_KEYS if keys[k] is not None)
        raise UserError(f"{bad}= is for recipe=pretrain_custom: the shape of {name} is its checkpoint's")
    if method.modality:
        _values(keys)
        _senses(method.modality, keys, given)
        if glyphs:
            keys |= {k: v for k, v in _rates_of_glyphs(keys).items() if given.get(k) is None}
    for check in (_values, _numbers):
        check(keys)
    kernels.check(keys, models.size(family, keys["size"]).architecture, method_of(name) in TEXT)
    if method.nf4 and keys["precision"] == "fp8":
        raise UserError(f"precision=fp8: {name}'s weights are rounded to 4 bits, FP8 would round them again: precision=bf16")
    if method.modality and keys["export"] == "lora" and not saves_part(method, keys):
        raise UserError(f"export=lora: {name} trains no adapter: train_language=lora, train_tower=lora, or export=hf")
    if kind := adapter(method, keys):
        shape = models.size(family, keys["size"]).architecture
        adapters.ranks(shape.family, keys)
        adapters.alphas(shape.family, keys)
        if not keys["model"]:  # else the checkpoint's shape says more than the size's
            adapters.trained(shape, kind, keys)
        if kind == "moe_dora":
            _experts(name, keys)
    elif keys["export"] == "lora" and not method.modality:
        raise UserError(f"export=lora is for recipe=lora_{family}: {name} trains all weights")
    return keys


def finish(keys: dict[str, Any]) -> dict[str, Any]:
    """Fill what follows from the number of steps. `keys["steps"]` must be known."""
    steps = keys["steps"]
    defaults = {
        "warmup": max(round(0.03 * steps), min(10, steps // 4), min(1, steps - 1)),
        "min_lr": keys["lr"] / 10,
        "every": min(500, steps // 10) if steps > 100 else steps // 2 if steps > 20 else steps,
        "val_every": max(1, steps // 10) if steps > 100 else max(1, steps // 2),
    }
    adapters.rank_schedule(keys)
    return {**keys, **{k: v for k, v in defaults.items() if keys[k] is None}}


def check_layout(name: str, keys: dict[str, Any], shape: Architecture | None = None) -> None:
    """Refuse what the planned layout does not allow. `shape` is a checkpoint's, if not the size's. Raises UserError."""
    method, family = split(name)
    kernels.check_attention(keys, shape or architecture(name, keys))
    if adapter(method, keys) != "lora":
        return
    for linear, rank in adapters.ranks(models.size(family, keys["size"]).architecture.family, keys).items():
        if rank % keys["tp"]:
            given = f"rank={rank}" if rank == keys["rank"] else f"ranks={linear}:{rank}"
            raise UserError(f"{given} is not a multiple of tp={keys['tp']}: tensor parallelism splits the adapter too")


def architecture(name: str, keys: dict[str, Any]) -> Architecture:
    """The shape that a recipe's size (and, for custom, its shape keys) describes."""
    _, family = split(name)
    shape = models.size(family, keys["size"]).architecture
    changes = {field: keys[k] for k, field in SHAPE_KEYS.items() if keys[k] is not None}
    if not changes:
        return shape
    if "num_attention_heads" in changes and "num_query_groups" not in changes:
        changes["num_query_groups"] = changes["num_attention_heads"]
    try:
        changed = dataclasses.replace(shape, **changes, kv_channels=0)
    except ValueError as error:
        raise UserError(str(error)) from None
    if changed.hidden_size % changed.num_attention_heads:
        raise UserError(f"hidden={changed.hidden_size} is not a multiple of heads={changed.num_attention_heads}")
    return changed


def load(name: str, *, shape: Architecture | None = None, overrides: dict[str, Any] | None = None,
         senses: list[dict[str, Any]] | None = None, **given: Any):  # fmt: skip
    """The recipe as a NeMo-Run object (`run.Partial` of `llm.pretrain`, or of grpo's engine).

    Keys that are planned or measured before a run take their simplest value here when not given: one device per model
    replica, 1,000 steps. `shape` replaces the size's architecture (a checkpoint of another shape); `overrides` sets fields by
    path (`{"trainer.strategy.ckpt_parallel_save": False}`). `senses` are those of a model that sees or hears and how their inputs
    are made (`nemo_ext.data.multimodal.inputs`' dictionaries). Reads and writes no file. Raises UserError.
    """
    from nemo_ext import platform

    cpu = platform.activate()
    keys = resolve(name, given, cuda=not cpu)
    if split(name)[0].schema is GrpoKeys:
        return grpo.load(keys, overrides or {})
    simplest = dict(gpus=1, tp=1, pp=1, vp=1, cp=1, ep=1, micro_batch=1, steps=1000)
    keys.update({k: v for k, v in simplest.items() if keys[k] is None})
    keys["sp"] = keys["tp"] > 1 if keys["sp"] is None else keys["sp"]
    keys = finish(keys)
    check_layout(name, keys, shape)
    method, _ = split(name)
    from recipes import training
    from recipes.overrides import apply

    if method.modality:
        senses = senses or _default_senses(method.modality, keys)
    recipe = training.build(
        keys, shape or architecture(name, keys), method.conversations, adapter(method, keys), method.nf4, senses
    )
    apply(recipe, overrides or {})
    return recipe


def bind(recipe, *, run_dir: str, tokenizer: str, blend: list, weights: str | None, checkpoint: str | None):
    """Put this machine's paths into a recipe: the run's folder, the tokenizer's, the corpus, and where to start from.

    `weights` is a converted checkpoint whose weights start a new run, or every start of an adapter's; `checkpoint` one of this
    run, continued exactly.
    """
    if grpo.is_embedded(recipe):
        return grpo.bind(recipe, run_dir=run_dir, weights=weights, checkpoint=checkpoint)
    from recipes import binding

    return binding.bind(recipe, run_dir=run_dir, tokenizer=tokenizer, blend=blend, weights=weights, checkpoint=checkpoint)


def _numbers(keys: dict[str, Any]) -> None:
    if keys["keep"] == 0 and "rollback" in (keys["on_nan"], keys["on_spike"]):
        raise UserError("on_nan= and on_spike=rollback go back to a checkpoint, and keep=0 saves none: keep=1")
    if keys["min_lr"] is not None and keys["min_lr"] > keys["lr"]:
        raise UserError(f"min_lr={keys['min_lr']} is above lr={keys['lr']}")
    if keys["steps"] and keys["warmup"] is not None and keys["warmup"] >= keys["steps"]:
        raise UserError(f"warmup={keys['warmup']} leaves no step of steps={keys['steps']}")
    if keys["steps"] and keys["profile"] > keys["steps"]:
        raise UserError(f"profile={keys['profile']} is a step after the last of steps={keys['steps']}")


def _senses(modality: str, keys: dict[str, Any], given: dict[str, Any]) -> None:
    """Fill what the stage and the modality decide. Rates are LLaVA's (arXiv:2310.03744), an adapter's LoRA's."""
    language, tower = freezing.STAGES[keys["stage"]]
    keys["train_language"] = keys["train_language"] or language
    keys["train_tower"] = keys["train_tower"] or tower
    if keys["scored"] is None:
        keys["scored"] = 200 if str(keys["data"]).startswith("glyphs") else 0
    if keys["downsample"] is None:
        keys["downsample"] = 4 if modality == AUDIO else 1
    trained = trained_parts(keys)
    if given.get("lr") is None:
        keys["lr"] = 2e-4 if trained.adapter else 2e-5 if freezing.FULL in (trained.language, trained.tower) else 1e-3
    if keys["tower_lr"] is not None and trained.tower == freezing.FROZEN:
        raise UserError(f"tower_lr={keys['tower_lr']}: the tower is frozen: train_tower=full or lora")
    if keys["cp"] not in (None, 1):
        raise UserError(f"cp={keys['cp']}: embeddings of media are not split over devices: cp=1")
    keys["cp"] = 1
    if modality == AUDIO and keys["tiling"]:
        raise UserError("tiling= is of images")
    if keys["tower"] and keys["tower"].startswith("random:"):
        described = described_sense(keys)
        if described.modality != modality:
            raise UserError(f"tower={keys['tower']} is of {described.modality}")


def _of_glyphs(given: dict[str, Any]) -> bool:
    """Whether a run is of the built-in pictures, with a model and a tower that are not the user's own."""
    glyphs = {"data": ("glyphs",), "tower": (GLYPHS["tower"],), "model": ()}
    return all(given.get(key) is None or str(given[key]).startswith(values) for key, values in glyphs.items())


def _rates_of_glyphs(keys: dict[str, Any]) -> dict[str, float]:
    if keys["train_language"] == freezing.FROZEN:
        return {"lr": GLYPHS_LR}
    learnt = ("projector_lr",) if keys["train_tower"] == freezing.FROZEN else ("projector_lr", "tower_lr")
    return dict.fromkeys(learnt, GLYPHS_LR)


def adapter(method: Method, keys: dict[str, Any]) -> str | None:
    """The kind of adapter of the language model that a recipe trains."""
    return "lora" if method.modality and keys["train_language"] == freezing.LORA else method.adapter


def saves_part(method: Method, keys: dict[str, Any]) -> bool:
    """Whether a recipe's checkpoints hold what it trains alone, so that the model it began with is read at every start."""
    return bool(method.adapter) or (method.modality is not None and trained_parts(keys).adapter)


def trained_parts(keys: dict[str, Any]) -> freezing.Trained:
    """How a recipe with a sense trains the parts of its model. Raises UserError."""
    return freezing.Trained(keys["train_language"], keys["train_tower"])


def _default_senses(modality: str, keys: dict[str, Any]) -> list[dict[str, Any]]:
    """What `load` shows where it is not told of a tower: a published shape, its inputs as its publisher makes them."""
    if keys["tower"] is None or not keys["tower"].startswith("random:"):
        keys = {**keys, "tower": f"random:{towers.DEFAULT[modality]}"}
    return [{"sense": described_sense(keys).to_dict(), "settings": None}]


def described_sense(keys: dict[str, Any], config: dict[str, Any] | None = None) -> Sense:
    """The sense that a recipe's keys describe, of an encoder of this configuration, or of the published shape that `tower` names.

    Raises UserError where they do not fit.
    """
    config = config or towers.shape(keys["tower"].removeprefix("random:"))
    names = ("feature_layer", "class_token", "projector", "downsample")
    return towers.sense(config, **{name: keys[name] for name in names})


def _experts(name: str, keys: dict[str, Any]) -> None:
    if keys["top_k"] > keys["experts"]:
        raise UserError(f"top_k={keys['top_k']} is more than experts={keys['experts']}")
    if keys["export"]:
        raise UserError(f"export={keys['export']}: neither PEFT nor transformers has the routers of {name}: leave it out")


def _values(keys: dict[str, Any]) -> None:
    for name, field in fields().items():
        check_value(name, keys[name], field)


__all__ = ["METHODS", "TrainKeys", "architecture", "bind", "check_layout", "finish", "load", "names", "resolve", "split"]
