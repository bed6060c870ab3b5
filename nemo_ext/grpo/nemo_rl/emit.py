"""A complete NeMo-RL configuration from the keys of a GRPO recipe.

Every value that a key of ours decides is set here; the rest are the values of NeMo-RL's own Megatron example of that version, so
that nothing is left to what the code falls back to. The result is checked against the version's tree before it is returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.grpo.embedded import REWARD_SETTINGS
from nemo_ext.grpo.nemo_rl import limits, tree

FILE = "nemo_rl.yaml"  # the configuration in a run's folder
ENVIRONMENT = "rewards"  # the name of our environment in `env`, and of the task that data has
ENVIRONMENT_CLASS = "nemo_ext.rewards.nemo_rl_environment.RewardEnvironment"
PROCESSOR = "chat_prompt"  # the name of our data processor, see problems.process
OBSERVATION = 16  # tokens left for what the environment says after an answer: NeMo-RL appends it, and where it does not fit takes
# the answer for one that was cut off
LENGTH_MULTIPLE = 128  # of the longest sequence: any usual tp, and 2 x cp, divide it
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp8": "bfloat16"}
SHARED_MEMORY = 0.6  # share of a GPU's memory that vLLM takes where it takes turns with the policy, as in NeMo-RL's examples
OWN_MEMORY = 0.9  # and where it has the GPU to itself
FP8_RECIPE = "blockwise"  # scaling of precision=fp8, as in NeMo-RL's examples
# Parts of the example for what is not used here: other backends, other loggers, other ways of training.
UNUSED = ("data", "env", "reward_penalties", "logger.swanlab", "logger.mlflow", "policy.generation.mcore_generation_config",
          "policy.generation.refit_cfg", "policy.megatron_cfg.converter_type")  # fmt: skip


@dataclass(frozen=True)
class Paths:
    """Where a run's things are, as the container sees them: absolute paths."""

    model: str  # a Hugging Face folder with weights and tokenizer
    train: str  # JSON lines: each a data record with `prompt`, the chat messages that the template gets
    validation: str | None  # the held-out ones, None for no evaluation
    run: str  # the run's folder
    template: str | None = None  # a Jinja file, where the tokenizer's own is not used


def emit(keys: Mapping[str, Any], architecture: Architecture, paths: Paths, version: str) -> dict[str, Any]:
    """The configuration as a nested dictionary of plain values, ready for YAML.

    `keys` are those of `recipes.grpo.GrpoKeys` by name, with a layout (`tp pp cp ep micro_batch recompute`), `steps`,
    `every` and `val_every` chosen. Raises UserError where the version lacks what a key asks for (see `limits`), or prompts and
    answers are longer than the model's positions.
    """
    limits.refuse(keys, architecture, version)
    known = tree.load(version)
    config = known.defaults()
    for path in UNUSED:
        section, _, name = path.rpartition(".")
        tree.get(config, section).pop(name, None)
    length = sequence_length(keys, architecture)
    values = {
        **_grpo(keys, paths),
        **_loss(keys),
        **_policy(keys, architecture, paths, length),
        **_optimizer(keys),
        **_generation(keys, architecture, length),
        **_data(keys, paths, version),
        **_run(keys, paths),
        "env": {ENVIRONMENT: environment(keys, paths)},
    }
    values |= {path: value for path, value in _since_v080(keys, paths).items() if path in known.keys}
    for path, value in values.items():
        tree.put(config, path, value)
    tree.check(config, version)
    return config


def sequence_length(keys: Mapping[str, Any], architecture: Architecture) -> int:
    """Tokens of the longest sequence: the longest prompt, the longest answer, and what the environment says.

    Rounded up so that tp and 2 x cp divide it. Raises UserError where the model has fewer positions.
    """
    multiple = divisor(keys)
    needed = keys["max_prompt"] + keys["max_answer"] + OBSERVATION
    most = architecture.max_position_embeddings
    unit = math.lcm(LENGTH_MULTIPLE, multiple)
    length = min(-(-needed // unit) * unit, most // multiple * multiple)
    if length < needed:
        asked = f"max_prompt={keys['max_prompt']} and max_answer={keys['max_answer']}"
        raise UserError(f"{asked} are longer together than {most - OBSERVATION}, what the model's {most} positions allow")
    return length


def divisor(keys: Mapping[str, Any]) -> int:
    """What the length of a sequence in training must be a multiple of: sequence parallelism cuts it in tp, context
    parallelism in 2 cp parts."""
    tp, cp = keys["tp"] or 1, keys["cp"] or 1
    return tp * (2 * cp if cp > 1 else 1)


def generation_nodes(keys: Mapping[str, Any]) -> int | None:
    """Machines that only generate, where there are several machines: NeMo-RL divides them by whole machines."""
    if not keys["generation_gpus"] or keys["nodes"] == 1:
        return None
    return keys["generation_gpus"] * keys["nodes"] // keys["gpus"]


def policy_machine(keys: Mapping[str, Any]) -> tuple[int, int]:
    """Machines and GPUs a machine that the policy trains on."""
    if not keys["generation_gpus"]:
        return keys["nodes"], keys["gpus"]
    if (apart := generation_nodes(keys)) is not None:
        return keys["nodes"] - apart, keys["gpus"]
    return 1, keys["gpus"] - keys["generation_gpus"]


def generation_tp(keys: Mapping[str, Any], architecture: Architecture) -> int:
    """vLLM's tensor parallel size: the one asked for, else the policy's as far as one machine's generating GPUs allow it.

    Raises UserError where it does not divide the heads or those GPUs.
    """
    gpus = keys["generation_gpus"] if keys["generation_gpus"] and keys["nodes"] == 1 else keys["gpus"]
    asked = keys["generation_tp"]
    if asked is None:
        return max(n for n in range(1, (keys["tp"] or 1) + 1) if (keys["tp"] or 1) % n == 0 and gpus % n == 0)
    if architecture.num_attention_heads % asked:
        raise UserError(f"generation_tp={asked} does not divide num_attention_heads={architecture.num_attention_heads}")
    if gpus % asked:
        raise UserError(f"generation_tp={asked} does not divide the {gpus} GPUs of a machine that generate")
    return asked


def environment(keys: Mapping[str, Any], paths: Paths) -> dict[str, Any]:
    """What our environment (`nemo_ext.rewards.nemo_rl_environment`) is told: the reward and its settings, and the tools."""
    settings = {name: keys[name] for name in REWARD_SETTINGS if keys[name] is not None}
    told = {"reward": keys["reward"], "timeout": keys["reward_timeout"], "settings": settings}
    if keys["tools"]:
        told |= {"tools": keys["tools"], "turns": keys["turns"], "tool_timeout": keys["tool_timeout"],
                 "memory": keys["sandbox_memory"], "tokenizer": paths.model, "template": paths.template}  # fmt: skip
    return told


def _grpo(keys: Mapping[str, Any], paths: Paths) -> dict[str, Any]:
    evaluates = _evaluates(keys, paths)
    # An epoch makes one step at least (or, sampling again, one of its `dynamic_limit` batches): so many epochs never end a run.
    epochs = keys["steps"] * (keys["dynamic_limit"] if keys["dynamic_sampling"] else 1)
    return {
        "grpo.num_prompts_per_step": keys["prompts"],
        "grpo.num_generations_per_prompt": keys["group"],
        "grpo.max_num_epochs": epochs,
        "grpo.max_num_steps": keys["steps"],
        "grpo.max_rollout_turns": keys["turns"],
        "grpo.normalize_rewards": keys["normalize"],
        "grpo.use_leave_one_out_baseline": keys["leave_one_out"],
        "grpo.val_period": keys["val_every"] if evaluates else 0,
        "grpo.val_at_start": evaluates,
        "grpo.val_batch_size": max(1, keys["val_samples"]),
        "grpo.max_val_samples": max(1, keys["val_samples"]),
        "grpo.seed": keys["seed"],
        "grpo.overlong_filtering": keys["overlong_filter"],
        "grpo.use_dynamic_sampling": keys["dynamic_sampling"],
        "grpo.dynamic_sampling_max_gen_batches": max(1, keys["dynamic_limit"] - 1),  # after which it samples one more
        "grpo.batch_multiplier": 1.0,
        "grpo.reward_shaping.enabled": False,
        "grpo.reward_shaping.max_response_length": keys["max_answer"],
        "grpo.reward_scaling.enabled": False,
        "grpo.async_grpo.enabled": False,
    }


def _evaluates(keys: Mapping[str, Any], paths: Paths) -> bool:
    return paths.validation is not None and keys["val_samples"] > 0


def _loss(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "loss_fn.reference_policy_kl_penalty": keys["kl"],
        "loss_fn.reference_policy_kl_type": "k3",
        "loss_fn.kl_input_clamp_value": None,  # the plain estimate, as the embedded engine's
        "loss_fn.kl_output_clamp_value": None,
        "loss_fn.ratio_clip_min": keys["clip_low"],
        "loss_fn.ratio_clip_max": keys["clip_high"],
        "loss_fn.ratio_clip_c": None,
        "loss_fn.token_level_loss": keys["loss"] == "token",
        "loss_fn.use_on_policy_kl_approximation": False,
        # NeMo-RL insists on it where vLLM computes in FP8, whose probabilities are not the policy's
        "loss_fn.use_importance_sampling_correction": keys["precision"] == "fp8",
        "loss_fn.truncated_importance_sampling_ratio": None,
        "loss_fn.sequence_level_importance_ratios": False,
        "loss_fn.force_on_policy_ratio": False,
    }


def _policy(keys: Mapping[str, Any], architecture: Architecture, paths: Paths, length: int) -> dict[str, Any]:
    packs = architecture.attn_logit_softcapping is None  # Transformer Engine caps no packed rows
    tokens = length * keys["micro_batch"]
    batches = {"train_mb_tokens": tokens, "logprob_mb_tokens": tokens, "sequence_length_round": 64}
    fp8 = keys["precision"] == "fp8"
    values = {
        "policy.model_name": paths.model,
        "policy.tokenizer.name": paths.model,
        "policy.tokenizer.chat_template_kwargs": None,
        "policy.hf_config_overrides": {},
        "policy.train_global_batch_size": keys["prompts"] * keys["group"],  # one optimizer step a rollout
        "policy.train_micro_batch_size": keys["micro_batch"],
        "policy.logprob_batch_size": keys["micro_batch"],
        "policy.generation_batch_size": keys["prompts"] * keys["group"],
        "policy.max_total_sequence_length": length,
        "policy.make_sequence_length_divisible_by": divisor(keys),
        "policy.precision": DTYPES[keys["precision"]],
        "policy.max_grad_norm": keys["clip"],
        "policy.optimizer": None,
        "policy.scheduler": None,
        "policy.dtensor_cfg": {"enabled": False},
        "policy.sequence_packing.enabled": packs,
        "policy.dynamic_batching.enabled": not packs and keys["pp"] == 1,
        "policy.megatron_cfg.enabled": True,
        "policy.megatron_cfg.tensor_model_parallel_size": keys["tp"],
        "policy.megatron_cfg.pipeline_model_parallel_size": keys["pp"],
        "policy.megatron_cfg.context_parallel_size": keys["cp"],
        "policy.megatron_cfg.expert_model_parallel_size": keys["ep"],
        "policy.megatron_cfg.expert_tensor_parallel_size": 1,
        "policy.megatron_cfg.sequence_parallel": keys["tp"] > 1,
        "policy.megatron_cfg.pipeline_dtype": DTYPES[keys["precision"]],
        "policy.megatron_cfg.activation_checkpointing": keys["recompute"],
        "policy.megatron_cfg.fp8_cfg": {"enabled": fp8, "fp8": "e4m3", "fp8_recipe": FP8_RECIPE, "fp8_param": False},
        "policy.megatron_cfg.env_vars": {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"} if fp8 else None,
    }
    for name in ("sequence_packing", "dynamic_batching"):
        values |= {f"policy.{name}.{key}": value for key, value in batches.items()}
    return values | ({"policy.tokenizer.chat_template": paths.template} if paths.template else {})


def _optimizer(keys: Mapping[str, Any]) -> dict[str, Any]:
    lowest = keys["lr"] if keys["min_lr"] is None or keys["schedule"] == "constant" else keys["min_lr"]
    optimizer = {
        "optimizer": "adam",
        "lr": keys["lr"],
        "min_lr": lowest,
        "weight_decay": keys["weight_decay"],
        "adam_beta1": keys["beta1"],
        "adam_beta2": keys["beta2"],
        "adam_eps": keys["eps"],
        "clip_grad": keys["clip"],
        "bf16": keys["precision"] != "fp32",
        "fp16": False,
        "use_distributed_optimizer": True,
        "use_precision_aware_optimizer": keys["precision"] == "bf16",
    }
    scheduler = {
        "lr_decay_style": keys["schedule"],
        "lr_decay_iters": keys["steps"],
        "lr_warmup_iters": keys["warmup"],
        "lr_warmup_init": 0.0,
        "start_weight_decay": keys["weight_decay"],
        "end_weight_decay": keys["weight_decay"],
        "weight_decay_incr_style": "constant",
    }
    values = {f"policy.megatron_cfg.optimizer.{name}": value for name, value in optimizer.items()}
    return values | {f"policy.megatron_cfg.scheduler.{name}": value for name, value in scheduler.items()}


def _generation(keys: Mapping[str, Any], architecture: Architecture, length: int) -> dict[str, Any]:
    apart = generation_nodes(keys)
    own = bool(keys["generation_gpus"])
    gpus = None if not own else keys["gpus"] if apart else keys["generation_gpus"]
    fp8 = keys["precision"] == "fp8"
    vllm = {
        "async_engine": False,
        "precision": "fp8" if fp8 else DTYPES[keys["precision"]],
        "use_deep_gemm": fp8,
        "kv_cache_dtype": "auto",
        "tensor_parallel_size": generation_tp(keys, architecture),
        "pipeline_parallel_size": 1,
        "expert_parallel_size": 1,
        "gpu_memory_utilization": OWN_MEMORY if own else SHARED_MEMORY,
        "max_model_len": length,
        "skip_tokenizer_init": True,  # without stop strings vLLM need not read text
        "enable_vllm_metrics_logger": False,
    }
    return {
        "policy.generation.backend": "vllm",
        "policy.generation.max_new_tokens": keys["max_answer"],
        "policy.generation.temperature": keys["temperature"],
        "policy.generation.top_p": keys["top_p"],
        "policy.generation.top_k": None,
        "policy.generation.stop_token_ids": None,
        "policy.generation.stop_strings": None,
        "policy.generation.colocated.enabled": not own,
        "policy.generation.colocated.resources.gpus_per_node": gpus,
        "policy.generation.colocated.resources.num_nodes": apart,
        **{f"policy.generation.vllm_cfg.{name}": value for name, value in vllm.items()},
    }


def _data(keys: Mapping[str, Any], paths: Paths, version: str) -> dict[str, Any]:
    """The data section. `train` reads the files itself and keeps every field of a record, for the rewards; the names are those
    under which NeMo-RL's own dataset of question and answer would find them too."""
    common = {"max_input_seq_length": keys["max_prompt"], "shuffle": True, "num_workers": 1}
    columns = {"dataset_name": "ResponseDataset", "input_key": "question", "output_key": "answer"}
    task = {"prompt_file": None, "system_prompt_file": None, "processor": PROCESSOR, "env_name": ENVIRONMENT}
    if version == "v0.5.0":
        data = {**common, **columns, **task, "train_data_path": paths.train}
        return {"data": data | ({"val_data_path": paths.validation} if paths.validation else {})}
    validation = {**columns, "data_path": paths.validation} if paths.validation else None
    train = {**columns, "data_path": paths.train, "split_validation_size": 0.0}
    return {"data": {**common, "use_multiple_dataloader": False, "train": train, "validation": validation, "default": task}}


def _run(keys: Mapping[str, Any], paths: Paths) -> dict[str, Any]:
    name = paths.run.rstrip("/").rpartition("/")[2]
    return {
        "logger.log_dir": f"{paths.run}/logs/nemo_rl",  # event files go into its folder tensorboard
        "logger.tensorboard_enabled": keys["tensorboard"],
        "logger.tensorboard": {},
        "logger.wandb_enabled": keys["wandb"] is not None,
        "logger.wandb.project": keys["wandb"] or name,
        "logger.wandb.name": name,
        "logger.swanlab_enabled": False,
        "logger.mlflow_enabled": False,
        "logger.monitor_gpus": keys["tensorboard"] or keys["wandb"] is not None,
        "logger.num_val_samples_to_print": 0,
        "cluster.gpus_per_node": keys["gpus"],
        "cluster.num_nodes": keys["nodes"],
        "checkpointing.enabled": keys["keep"] > 0,
        "checkpointing.checkpoint_dir": f"{paths.run}/checkpoints",
        "checkpointing.metric_name": None,  # the newest are kept, not the best
        "checkpointing.higher_is_better": True,
        "checkpointing.keep_top_k": max(1, keys["keep"]),
        "checkpointing.save_period": keys["every"],
        "checkpointing.checkpoint_must_save_by": None,
    }


def _since_v080(keys: Mapping[str, Any], paths: Paths) -> dict[str, Any]:
    """What v0.5.0 has no key for."""
    return {
        "grpo.val_at_end": _evaluates(keys, paths),
        "grpo.skip_reference_policy_logprobs_calculation": keys["kl"] == 0,
        "grpo.adv_estimator.name": "grpo",
        "grpo.adv_estimator.normalize_rewards": keys["normalize"],
        "grpo.adv_estimator.use_leave_one_out_baseline": keys["leave_one_out"],
        "loss_fn.truncated_importance_sampling_type": None,
        "loss_fn.use_kl_in_reward": False,
        "policy.generation.val_temperature": keys["temperature"],
        "policy.generation.val_top_p": keys["top_p"],
        "policy.generation.val_top_k": None,
        "policy.generation.refit_transport": None,
        "policy.draft": {"enabled": False},
        "data_plane": None,
        "on_policy_distillation": None,
    }
