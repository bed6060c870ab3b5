"""Training all weights of a model, or an adapter, on documents or conversations: one recipe, with or without a checkpoint.

Importing this module imports NeMo; `recipes.load` does so after `nemo_ext.platform.activate()`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import nemo_run as run
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

from nemo_ext import adapters
from nemo_ext.adapters.moe_dora import Balance
from nemo_ext.adapters.strategy import AdapterStrategy
from nemo_ext.architecture import Architecture
from nemo_ext.callbacks.checkpoint import AtomicCheckpoint
from nemo_ext.callbacks.evaluation import Evaluation
from nemo_ext.callbacks.graphs import StepGraph
from nemo_ext.callbacks.guard import LossGuard
from nemo_ext.callbacks.kernels import UseKernels
from nemo_ext.callbacks.loss import LossWithoutWaiting
from nemo_ext.callbacks.metrics import MetricsCallback
from nemo_ext.callbacks.profile import Profile
from nemo_ext.callbacks.random_state import SeedEachStep
from nemo_ext.callbacks.rank_allocation import RankAllocation
from nemo_ext.callbacks.stop import StopOnSignal
from nemo_ext.callbacks.stragglers import Stragglers
from nemo_ext.callbacks.watchdog import Watchdog
from nemo_ext.data.chat.module import ChatDataModule
from nemo_ext.data.module import CorpusDataModule
from nemo_ext.data.multimodal import inputs
from nemo_ext.data.multimodal.module import MultimodalDataModule
from nemo_ext.errors import UserError
from nemo_ext.modeling import model_config
from nemo_ext.multimodal.description import Sense
from nemo_ext.multimodal.flops import trained_flops
from nemo_ext.multimodal.freezing import FULL, LORA, Trained, num_trained
from nemo_ext.multimodal.training import with_senses
from nemo_ext.optim import MegatronAdam, WarmupSchedule
from nemo_ext.pipeline import chunk_layers, megatron_layout
from nemo_ext.run_folder import CHECKPOINTS
from recipes.keys import bytes_per_parameter

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = {"bf16": "bf16-mixed", "fp8": "bf16-mixed", "fp16": "16-mixed", "fp32": "32"}


def build(
    keys: dict[str, Any],
    architecture: Architecture,
    conversations: bool = False,
    adapter: str | None = None,
    nf4: bool = False,
    senses: list[dict[str, Any]] | None = None,
) -> run.Partial:
    """`run.Partial(llm.pretrain, ...)` from resolved keys. Paths of this machine are bound later (`recipes.bind`).

    `adapter` is the kind that is trained rather than all weights; `nf4` keeps the frozen linears in 4 bits; `senses`, as
    `recipes.load` takes them, are those of a model that learns from images or sounds.
    """
    model = dict(**_recompute(keys, architecture), **_pipeline(keys), cross_entropy_fusion_impl="te")
    if conversations:
        model["calculate_per_token_loss"] = True  # the mean over a global batch's learnt tokens, however rows are filled
        if architecture.num_moe_experts is not None:
            model["moe_aux_loss_coeff"] = 0.0  # Megatron weighs it by all tokens then, not by the learnt ones
    described = [Sense.from_dict(each["sense"]) for each in senses or ()]
    config = model_config(architecture, keys["seq"], **model)
    if described:
        config = with_senses(config, described, _parts(keys), recompute=keys["recompute"] == "full")
    return run.Partial(
        llm.pretrain,
        model=config,
        data=_data(keys, conversations, senses),
        trainer=_trainer(keys, architecture, adapter, nf4, described),
        log=run.Config(nl.NeMoLogger, use_datetime_version=False, ckpt=None, tensorboard=None, wandb=None),
        optim=_optimizer(keys),
        resume=run.Config(nl.AutoResume),
    )


def _parts(keys: dict[str, Any]) -> Trained:
    return Trained(keys["train_language"], keys["train_tower"])


def _data(keys: dict[str, Any], conversations: bool, senses: list[dict[str, Any]] | None) -> run.Config:
    module = ChatDataModule if conversations else CorpusDataModule
    more = dict(pack=keys["pack"]) if conversations else {}
    if senses:
        module = MultimodalDataModule
        more |= dict(senses=[run.Config(inputs.from_dict, each) for each in senses], skip_bad=keys["skip_bad"])
    return run.Config(
        module,
        blend=[],
        seq_length=keys["seq"],
        micro_batch_size=keys["micro_batch"],
        global_batch_size=keys["global_batch"],
        seed=keys["seed"],
        num_workers=2 if keys["device"] == "gpu" else 0,
        val_batches=keys["val_batches"],
        **more,
    )


def _trainer(keys: dict[str, Any], architecture: Architecture, adapter: str | None, nf4: bool, senses: list[Sense]) -> run.Config:
    distributed = keys["distributed_optimizer"]
    ddp = run.Config(
        DistributedDataParallelConfig,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=keys["overlap"],
        overlap_param_gather=keys["overlap"] and distributed,
        grad_reduce_in_fp32=True,
        # MetricsCallback looks at the norm that clipping needs; this looks at every bucket, and a GPU is waited for each time
        check_for_nan_in_grad=keys["on_nan"] == "stop" and keys["precision"] != "fp16" and not keys["clip"],
    )
    trained, what, inputs = None, {}, None
    saved, frozen = architecture.num_parameters(), 0
    if adapter:
        saved = trained = adapters.trained(architecture, adapter, keys)
        what = dict(adapter=adapters.transform_settings(architecture, keys, adapter), seed=keys["seed"])
    if nf4:
        what["nf4"] = _nf4(keys, architecture)
    if senses:
        parts = _parts(keys)
        counts = num_trained(parts, architecture, senses, keys)
        trained = None if parts.language == FULL else counts["language"]
        saved = sum(counts.values())
        inputs = {each.modality: trained_flops(each, architecture.hidden_size, parts, keys["rank"]) for each in senses}
        if parts.adapter:
            what = {"adapter": None, "seed": keys["seed"], **what, "tower": _tower_adapter(keys, parts)}
        else:  # checkpoints hold all weights, trained or not
            frozen = (
                architecture.num_parameters() + sum(sense.num_parameters(architecture.hidden_size) for sense in senses) - saved
            )
    strategy = run.Config(
        AdapterStrategy if what else nl.MegatronStrategy,
        tensor_model_parallel_size=keys["tp"],
        pipeline_model_parallel_size=keys["pp"],
        virtual_pipeline_model_parallel_size=keys["vp"] if keys["vp"] and keys["vp"] > 1 else None,
        pipeline_model_parallel_layout=None if senses else _stages(keys, architecture),
        context_parallel_size=keys["cp"],
        expert_model_parallel_size=keys["ep"],
        sequence_parallel=keys["sp"],
        pipeline_dtype=DTYPES[keys["precision"]],
        ddp=ddp,
        gradient_as_bucket_view=True,
        ckpt_async_save=keys["async_save"],
        ckpt_assume_constant_structure=True,  # planned once, not at every save
        ckpt_optim_fully_reshardable=True,  # loads at any other TP, PP and DP; see nemo_ext/platform/optimizer_shards.py
        replace_progress_bar=False,
        use_te_rng_tracker=bool(keys["cuda_graphs"]),  # the other's numbers would be the same in every replay
        **what,
    )
    callbacks = [
        *_balance(keys, architecture, adapter),
        run.Config(Watchdog, run_dir="", timeout=keys["hang_timeout"]),
        *([run.Config(Profile, run_dir="", step=keys["profile"])] if keys["profile"] else []),
        run.Config(
            MetricsCallback,
            run_dir="",
            tokens_per_step=keys["global_batch"] * keys["seq"],
            flops_per_token=architecture.flops_per_token(keys["seq"], trained),
            flops_per_input=inputs,
            num_devices=keys["nodes"] * keys["gpus"],
            max_steps=keys["steps"],
            tensorboard=keys["tensorboard"],
            wandb=keys["wandb"],
            stop_on_nan=keys["on_nan"] == "stop",
        ),
        run.Config(LossWithoutWaiting),
        run.Config(UseKernels, attention=keys["attention"], output_layer=keys["output_layer"]),
        *([run.Config(StepGraph)] if keys["cuda_graphs"] else []),
        *_guards(keys),
        *_rank_allocation(keys, architecture, adapter),
        run.Config(SeedEachStep, seed=keys["seed"], adapter_dropout=keys["dropout"] if adapter else 0.0),
        run.Config(StopOnSignal),
        run.Config(Evaluation, every=keys["val_every"]),
        run.Config(
            AtomicCheckpoint,
            folder=CHECKPOINTS,
            every=keys["every"],
            keep=keys["keep"],
            async_save=keys["async_save"],
            size=saved * bytes_per_parameter(keys) + frozen * DTYPES[keys["precision"]].itemsize,
        ),
    ]
    return run.Config(
        nl.Trainer,
        accelerator=keys["device"],
        devices=keys["gpus"],
        num_nodes=keys["nodes"],
        max_steps=keys["steps"],
        strategy=strategy,
        plugins=_precision(keys),
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1_000_000_000,  # the Evaluation callback decides
        use_distributed_sampler=False,
    )


def _tower_adapter(keys: dict[str, Any], parts: Trained) -> dict[str, Any] | None:
    """The arguments of `nemo_ext.multimodal.adapter.put`."""
    if parts.tower != LORA:
        return None
    return dict(rank=keys["rank"], scale=keys["alpha"] / keys["rank"], dropout=keys["dropout"])


def _stages(keys: dict[str, Any], architecture: Architecture) -> str | None:
    """Megatron's layout of pipeline stages that are not equal; None where all are."""
    layers = chunk_layers(architecture, keys["pp"], keys["vp"]) if keys["balance_stages"] else []
    return megatron_layout(layers) if len(set(layers)) > 1 else None


def _guards(keys: dict[str, Any]) -> list[run.Config]:
    """What looks at a step's loss before it is applied, and at the ranks' times."""
    found = []
    if keys["on_nan"] != "stop" or keys["on_spike"] != "none":
        spikes = dict(on_spike=keys["on_spike"], spike_factor=keys["spike_factor"], spike_window=keys["spike_window"])
        found.append(run.Config(LossGuard, run_dir="", on_nan=keys["on_nan"], **spikes))
    if keys["straggler_factor"] and keys["nodes"] * keys["gpus"] > 1 and not keys["cuda_graphs"]:  # which is one span to the host
        found.append(run.Config(Stragglers, run_dir="", factor=keys["straggler_factor"]))
    return found


def _rank_allocation(keys: dict[str, Any], architecture: Architecture, adapter: str | None) -> list[run.Config]:
    """What AdaLoRA does around an optimizer step."""
    if adapter != "adalora":
        return []
    known = adapters.linears(architecture.family)
    names = adapters.targets(architecture.family, keys["targets"])
    model = dict(linears={known[name]: name for name in names}, num_layers=architecture.num_layers)
    return [run.Config(RankAllocation, **model, **adapters.allocation(keys))]


def _balance(keys: dict[str, Any], architecture: Architecture, adapter: str | None) -> list[run.Config]:
    """What gives the routers of adapters their balancing loss."""
    if adapter != "moe_dora":
        return []
    routers = adapters.top_layers(architecture, keys) * len(adapters.targets(architecture.family, keys["targets"]))
    return [run.Config(Balance, balance=keys["balance"], routers=routers, rows=keys["global_batch"])]


def _nf4(keys: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The arguments of `nemo_ext.adapters.nf4.quantizing`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("the weights of qlora are in 4 bits by bitsandbytes, which is not installed: pip install bitsandbytes")
    fused = {"linear_qkv", "linear_fc1"} & set(adapters.linears(architecture.family).values())
    return dict(double_quant=keys["double_quant"], whole=sorted(fused))


def _precision(keys: dict[str, Any]) -> run.Config:
    dtype = DTYPES[keys["precision"]]
    fp8 = dict(fp8="hybrid", fp8_recipe=keys["fp8_recipe"], **_fp8_history(keys)) if keys["precision"] == "fp8" else {}
    return run.Config(
        MegatronMixedPrecision,
        precision=PRECISIONS[keys["precision"]],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
        **fp8,
    )


def _fp8_history(keys: dict[str, Any]) -> dict[str, Any]:
    """Delayed scaling takes the largest magnitude of the last 1024 steps (Micikevicius et al. 2022, arXiv:2209.05433)."""
    return dict(fp8_amax_history_len=1024, fp8_amax_compute_algo="max") if keys["fp8_recipe"] == "delayed" else {}


def _optimizer(keys: dict[str, Any]) -> run.Config:
    config = run.Config(
        OptimizerConfig,
        optimizer="adam",
        lr=keys["lr"],
        weight_decay=keys["weight_decay"],
        adam_beta1=keys["beta1"],
        adam_beta2=keys["beta2"],
        adam_eps=keys["eps"],
        clip_grad=keys["clip"],
        bf16=keys["precision"] in ("bf16", "fp8"),
        fp16=keys["precision"] == "fp16",
        params_dtype=DTYPES[keys["precision"]],
        use_distributed_optimizer=keys["distributed_optimizer"],
    )
    scheduler = run.Config(
        WarmupSchedule,
        max_steps=keys["steps"],
        lr=keys["lr"],
        min_lr=keys["min_lr"],
        warmup_steps=keys["warmup"],
        schedule=keys["schedule"],
        decay_fraction=keys["decay"],
    )
    ratios = {name: keys[name] for name in ("layer_decay", "lora_plus", "tower_lr", "projector_lr")}
    return run.Config(MegatronAdam, config=config, lr_scheduler=scheduler, **ratios)


def _recompute(keys: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    if keys["recompute"] == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if keys["recompute"] == "selective":
        # fused attention keeps no scores to recompute; unfused attention on a CPU does
        mlp = "mlp" if architecture.num_moe_experts is None else "moe"
        return dict(recompute_granularity="selective", recompute_modules=["core_attn" if keys["device"] == "cpu" else mlp])
    return {}


def _pipeline(keys: dict[str, Any]) -> dict[str, Any]:
    """Interleaved stages exchange tensors while they compute, with single messages: batched ones pair up wrongly on gloo."""
    return dict(overlap_p2p_comm=True, batch_p2p_comm=False) if keys["vp"] and keys["vp"] > 1 else {}
