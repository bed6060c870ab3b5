"""The keys of a GRPO recipe as TRL's GRPOConfig, and what the embedded engine refuses."""

from __future__ import annotations

from typing import Any

from nemo_ext.errors import UserError

LOSSES = {"token": "dapo", "sequence": "grpo", "dr_grpo": "dr_grpo"}  # ours: TRL's `loss_type`


def check(keys: dict[str, Any]) -> None:
    """Refuse what the embedded engine lacks, with the reason. Raises UserError."""
    for name in ("tp", "pp", "cp", "ep", "nodes", "gpus", "generation_tp"):
        if (keys[name] or 1) > 1:
            raise UserError(f"{name}={keys[name]}: the embedded engine trains on one device: {name}=1, or engine=nemo_rl")
    if keys["generation_gpus"]:
        raise UserError(f"generation_gpus={keys['generation_gpus']}: the embedded engine samples on the device that trains")
    if keys["precision"] == "fp8":
        raise UserError("precision=fp8: the embedded engine trains in bf16 or fp32: engine=nemo_rl")
    if keys["backend"] == "vllm" and keys["device"] == "cpu":
        raise UserError("backend=vllm: it needs a GPU: backend=transformers")
    answers = keys["prompts"] * keys["group"]
    if keys["micro_batch"] and answers % keys["micro_batch"]:
        raise UserError(
            f"micro_batch={keys['micro_batch']} does not divide the prompts={keys['prompts']} x group={keys['group']} answers of "
            "a step"
        )


def trl_arguments(keys: dict[str, Any], output: str) -> dict[str, Any]:
    """The arguments of trl.GRPOConfig. `keys` has every choice made.

    A step is an update; `updates` of them learn from a rollout. Its answers are split into micro-batches whose gradients add up.
    """
    vllm = keys["backend"] == "vllm"
    passes = keys["prompts"] * keys["group"] // keys["micro_batch"]
    arguments = dict(
        output_dir=output, max_steps=keys["steps"], seed=keys["seed"], per_device_train_batch_size=keys["micro_batch"],
        gradient_accumulation_steps=passes, steps_per_generation=passes, num_iterations=keys["updates"],
        num_generations=keys["group"], max_completion_length=keys["max_answer"], temperature=keys["temperature"],
        top_p=keys["top_p"], top_k=0, repetition_penalty=1.0,
        loss_type=LOSSES[keys["loss"]], scale_rewards="group" if keys["normalize"] else "none", beta=keys["kl"],
        epsilon=keys["clip_low"], epsilon_high=keys["clip_high"], mask_truncated_completions=keys["overlong_filter"],
        importance_sampling_level="token", use_bias_correction_kl=False, disable_dropout=True,
        learning_rate=keys["lr"], weight_decay=keys["weight_decay"], adam_beta1=keys["beta1"], adam_beta2=keys["beta2"],
        adam_epsilon=keys["eps"], max_grad_norm=keys["clip"] or float("inf"),
        bf16=keys["precision"] == "bf16", fp16=False, use_cpu=keys["device"] == "cpu",
        gradient_checkpointing=bool(keys["recompute"]), model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="steps", save_steps=keys["every"],
        report_to=[], disable_tqdm=True, dataloader_num_workers=0, shuffle_dataset=False, log_completions=False,
        use_vllm=vllm,
    )  # fmt: skip
    if vllm:  # the policy's GPU is vLLM's while it samples; its own probabilities correct for what differs from the policy's
        arguments |= dict(vllm_mode="colocate", vllm_max_model_length=keys["max_prompt"] + keys["max_answer"],
                          vllm_enable_sleep_mode=True, vllm_importance_sampling_correction=True)  # fmt: skip
    return arguments
