"""What NeMo-RL cannot do as the keys of a GRPO recipe mean it, with the reason. Nothing is bent silently.

The reasons were read in the source of the versions in `versions/`: the loss in `algorithms/loss_functions.py` (later
`algorithms/loss/`), advantages and dynamic sampling in `algorithms/grpo.py` and `algorithms/utils.py`, truncation in
`experience/rollouts.py`, families in the Megatron-Bridge that the version pins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.grpo.nemo_rl import tree

TOP_P_V050 = 0.99  # below it v0.5.0 refuses to start


def refuse(keys: Mapping[str, Any], architecture: Architecture, version: str) -> None:
    """Raises UserError with the reason for the first key that this version cannot follow."""
    for reason in reasons(keys, architecture, version):
        raise UserError(reason)


def reasons(keys: Mapping[str, Any], architecture: Architecture, version: str) -> Iterator[str]:
    """Every reason why this version cannot train as the keys say, as lines for people."""
    name = f"NeMo-RL {version}"
    families = tree.load(version).families
    if architecture.family not in families:
        yield f"engine=nemo_rl: {name} has no Megatron bridge for {architecture.family} models, only for {', '.join(families)}"
    if keys["device"] == "cpu":
        yield "device=cpu: NeMo-RL needs GPUs: engine=embedded"
    if keys["backend"] == "transformers":
        yield "backend=transformers is for engine=embedded: NeMo-RL samples with vLLM"
    if keys["loss"] == "dr_grpo":
        yield f"loss=dr_grpo: {name} divides by a step's tokens or by each answer's, never by a constant length: loss=token"
    if keys["normalize"] and keys["leave_one_out"]:
        yield (
            f"leave_one_out=true: {name} then divides an advantage by the deviation of the other answers, not of the group: "
            "normalize=false"
        )
    if keys["dynamic_sampling"] and keys["leave_one_out"]:
        yield (
            f"dynamic_sampling=true with leave_one_out=true: {name} drops each answer whose others are equal, so the one right "
            "answer of a group: leave_one_out=false"
        )
    if keys["dynamic_sampling"] and keys["dynamic_limit"] < 2:
        yield f"dynamic_limit={keys['dynamic_limit']}: {name} samples two batches or more: dynamic_limit=2"
    if version == "v0.5.0" and keys["overlong_filter"]:
        yield (
            f"overlong_filter=true: {name} does not see that an answer ended at max_answer, only that prompt and answer reached "
            "the longest sequence: nemo_rl_version=v0.8.0"
        )
    if keys["temperature"] <= 0:
        yield f"temperature={keys['temperature']} must be above 0: the answers of a group would all be the same"
    if version == "v0.5.0" and keys["top_p"] < TOP_P_V050:
        yield f"top_p={keys['top_p']}: {name} takes {TOP_P_V050} or more, as its vLLM gives no probabilities after filtering"
    if keys["updates"] > 1:
        yield f"updates={keys['updates']}: {name} goes over the answers of a rollout once"
    capped = architecture.attn_logit_softcapping is not None
    if capped and (keys["cp"] or 1) > 1:
        yield f"cp={keys['cp']}: {name} splits packed sequences only, which capped attention ({architecture.family}) cannot take"
    if keys["generation_gpus"] is not None and not 0 < keys["generation_gpus"] < keys["gpus"]:
        yield f"generation_gpus={keys['generation_gpus']} must leave GPUs of gpus={keys['gpus']} to the policy"
    elif keys["generation_gpus"] and keys["nodes"] > 1 and keys["generation_gpus"] * keys["nodes"] % keys["gpus"]:
        yield (
            f"generation_gpus={keys['generation_gpus']}: with nodes={keys['nodes']} {name} lets whole machines generate, and "
            f"{keys['generation_gpus'] * keys['nodes']} GPUs are no number of machines of {keys['gpus']}"
        )
