"""The keys of GRPO: learning to reason from rewards of sampled answers.

Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) samples `group` answers to each of `prompts` problems,
scores them, and raises the likelihood of an answer by how much better it is than its group. One schema serves both engines;
docs/grpo.md says what each key becomes in either.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from nemo_ext.command_line import check_value, key, keys_of
from nemo_ext.errors import UserError
from nemo_ext.gpus import KINDS
from recipes import device, models

ENGINES = ("embedded", "nemo_rl")
# Keys of other recipes that make no sense here, and why.
_LEVEL = "the loss of a policy is about zero at every step: there is no level that it could jump above"
REFUSED = {
    "on_spike": _LEVEL, "spike_factor": _LEVEL, "spike_window": _LEVEL,
    "straggler_factor": "the embedded engine is one process, and NeMo-RL times its workers itself",
}  # fmt: skip
FAULTS = {"restarts": 0, "hang_timeout": 480.0, "on_nan": "stop"}  # of the embedded engine, with what they are if not given
TURNS = 4  # with tools
# Where no data is given: a task whose answers are short.
TASK = {
    "data": "reasoning-gym:chain_sum:min_terms=2:max_terms=2:min_digits=1:max_digits=1:size=1000",
    "system": "Answer with the number only.",
    "reward": "numeric",
    "heldout": 0.25,
    "max_prompt": 64,
    "max_answer": 12,
}
# And how a model of 135 million parameters improves on it within minutes on a CPU.
SMOKE = {"kl": 0.01, "lr": 2e-5, "min_lr": 2e-6, "schedule": "cosine", "warmup": 3, "steps": 40}


@dataclass
class GrpoKeys:
    """Every key of a GRPO recipe, in the order `--help` shows them."""

    size: str | None = key(None, "size of the model family", auto="the family's default; smoke without CUDA", group="model")
    model: str | None = key(
        None, "checkpoint to start from: hf:FOLDER, hf:NAME in the local cache, nemo:FOLDER, gguf:FILE", auto="the size's own"
    )

    data: Any = key(
        None, "problems: JSONL, JSON, CSV, Parquet, a folder or glob of them, a Hugging Face dataset, [a:0.7,b:0.3], or "
        "reasoning-gym:TASK", auto="an easy reasoning-gym task", group="data",
    )  # fmt: skip
    question_key: str = key("question", "column that holds the problem, as text or as chat messages")
    answer_key: str = key("answer", "column that holds the reference answer")
    system: str | None = key(None, "system prompt: text, or a file", auto="none")
    prompt: str | None = key(None, "file that wraps the problem, with {question} in it", auto="the problem alone")
    template: str | None = key(
        None, "chat template: a name or a Jinja file", auto="the tokenizer's own; chatml where it has none"
    )
    heldout: float = key(0.1, "share of the problems kept out of training for evaluation", least=0, below=1)
    max_prompt: int = key(256, "longest prompt; longer ones are left out and counted", unit="tokens", above=0)
    filter: bool = key(False, "sample the model first and drop problems that it always or never solves")
    filter_samples: int = key(8, "answers sampled per problem by filter=true", above=0)

    reward: str = key("math", "what an answer is worth: math, format, ... or a weighted sum such as math:1.0,format:0.2",
                      group="reward")  # fmt: skip
    reward_timeout: float = key(10.0, "longest time for the reward of one answer", unit="s", above=0)
    judge_url: str | None = key(None, "OpenAI-compatible endpoint of reward=judge", auto="none")
    judge_model: str | None = key(None, "model that reward=judge asks for", auto="none")
    judge_key_env: str | None = key(None, "environment variable with the key of reward=judge", auto="OPENAI_API_KEY, without a "
                                    "key if unset")  # fmt: skip
    reward_model: str | None = key(None, "hf:FOLDER of a sequence classifier for reward=model", auto="none")
    sandbox_memory: int = key(512, "memory of a program that an answer writes, above an idle interpreter", unit="MiB", above=0)

    prompts: int = key(8, "problems a rollout", group="rollout", above=0)
    group: int = key(8, "answers sampled for each problem")
    max_answer: int = key(256, "longest answer", unit="tokens", above=0)
    temperature: float = key(1.0, "temperature of sampling", above=0)
    top_p: float = key(1.0, "share of the probability that sampling draws from", above=0, most=1)
    tools: str | None = key(None, "tools that an answer may call: python, calculator, FILE.py, FILE.py:FUNCTION, with commas",
                            auto="none")  # fmt: skip
    turns: int = key(1, "turns of the model, between which its calls of tools are answered; with tools 4 if not given", above=0)
    tool_timeout: float = key(10.0, "longest time for the calls of one turn", unit="s", above=0)

    loss: str = key(
        "token", "average of the policy loss: over a step's tokens (token), over each answer's and then answers (sequence), or "
        "over a constant length (dr_grpo)", choices=("token", "sequence", "dr_grpo"), group="algorithm",
    )  # fmt: skip
    normalize: bool = key(True, "divide advantages by the standard deviation of their group")
    leave_one_out: bool = key(False, "compare each answer to the mean of the others of its group")
    kl: float = key(0.0, "weight of the KL divergence to the first policy (k3 estimate)", least=0)
    updates: int = key(1, "steps that learn from the answers of one rollout, all of them each", above=0)
    clip_low: float = key(0.2, "how far below 1 the probability ratio counts", least=0)
    clip_high: float = key(0.2, "how far above 1 the probability ratio counts (clip-higher: 0.28)", least=0)
    overlong_filter: bool = key(False, "learn nothing from answers that were cut off at max_answer")
    dynamic_sampling: bool = key(False, "sample again until no group of a step has equal rewards")
    dynamic_limit: int = key(4, "batches that dynamic_sampling may sample for a step", above=0)

    steps: int | None = key(None, "optimizer steps", auto="epochs over the problems; 40 for size=smoke without data",
                            group="training", above=0)  # fmt: skip
    epochs: float = key(1.0, "passes over the problems, where steps is not given", above=0)
    micro_batch: int | None = key(None, "answers a device processes at once", auto="planned", above=0)
    seed: int = key(1234, "seed of the data order and of sampling", above=0)
    precision: str | None = key(None, "arithmetic", choices=("bf16", "fp32", "fp8"), auto="bf16 on a GPU, fp32 on a CPU")
    lr: float = key(1e-6, "peak learning rate", above=0)
    min_lr: float | None = key(None, "learning rate at the end", auto="lr", least=0)
    schedule: str = key("constant", "learning rate after warm-up", choices=("cosine", "linear", "constant"))
    warmup: int = key(0, "warm-up", unit="steps", least=0)
    weight_decay: float = key(0.01, "decoupled weight decay; norms and biases have none", least=0)
    beta1: float = key(0.9, "Adam's first-moment decay", least=0, below=1)
    beta2: float = key(0.999, "Adam's second-moment decay", least=0, below=1)
    eps: float = key(1e-8, "Adam's epsilon", above=0)
    clip: float = key(1.0, "largest global norm of the gradient, 0 for no limit", least=0)
    recompute: bool | None = key(None, "compute activations again in the backward pass", auto="where memory asks for it")

    engine: str | None = key(None, "what trains", choices=ENGINES, auto="nemo_rl where it is installed, else embedded",
                             group="engine")  # fmt: skip
    nemo_rl_version: str | None = key(None, "NeMo-RL whose configuration is written", auto="the installed one, else the newest")
    backend: str | None = key(None, "what samples in the embedded engine", choices=("transformers", "vllm"),
                              auto="vllm where it is installed with CUDA, else transformers")  # fmt: skip
    nodes: int = key(1, "machines", group="parallelism", above=0)
    gpus: int | None = key(None, "GPUs a machine", auto="all; the CPU without CUDA", above=0)
    tp: int | None = key(None, "tensor parallel size of the policy", auto="planned", above=0)
    pp: int | None = key(None, "pipeline parallel size of the policy", auto="planned", above=0)
    cp: int | None = key(None, "context parallel size of the policy", auto="planned", above=0)
    ep: int | None = key(None, "expert parallel size of the policy", auto="planned; 1 for other models", above=0)
    generation_tp: int | None = key(None, "tensor parallel size of vLLM", auto="the policy's, within one machine", above=0)
    generation_gpus: int | None = key(
        None, "GPUs a machine that only generate", auto="none: generation shares the policy's GPUs", above=0
    )
    device: str | None = key(None, "what to train or plan for", choices=("gpu", "cpu"), auto="gpu with CUDA, else cpu")
    gpu: str | None = key(
        None, "kind of GPU to plan for, with its memory and links; implies device=gpu", choices=tuple(KINDS), auto="the machine's"
    )
    gpu_memory: float | None = key(
        None, "memory of a device to plan for", unit="GiB", auto="what the machine or gpu= has", above=0
    )

    out: str | None = key(None, "the run's folder; the same command continues it", auto="runs/RECIPE-SIZE", group="run")
    every: int | None = key(None, "steps between checkpoints", unit="steps", auto="a tenth of the run, at most 50", above=0)
    keep: int = key(2, "checkpoints kept, newest first", above=0)
    val_every: int | None = key(
        None, "steps between evaluations on held-out problems", unit="steps", auto="a quarter of the run", above=0
    )
    val_samples: int = key(64, "held-out problems an evaluation answers", above=0)
    answers: int = key(3, "held-out problems whose answers before and after go to summary.md", least=0)
    export: str = key("hf", "write the trained model into the run's folder: hf, a Hugging Face folder", choices=("hf", "none"))
    tensorboard: bool = key(True, "write TensorBoard event files")
    wandb: str | None = key(None, "Weights & Biases project to log to", auto="none")

    restarts: int = key(FAULTS["restarts"], "times that the process starts again from the newest checkpoint when it dies or "
                        "hangs", group="faults", least=0)  # fmt: skip
    hang_timeout: float = key(FAULTS["hang_timeout"], "end a run that comes no further for four times as long, with its stacks; "
                              "0 never", unit="s", least=0)  # fmt: skip
    on_nan: str = key(FAULTS["on_nan"], "a step whose loss or gradient is no number: stop, leave it out, or also go back to "
                      "the newest checkpoint", choices=("stop", "skip", "rollback"))  # fmt: skip


def resolve(name: str, family: str, given: dict[str, Any], *, cuda: bool) -> dict[str, Any]:
    """All keys of a GRPO recipe: the given ones over the defaults. What only data or plan can tell stays None.

    Raises UserError.
    """
    schema = keys_of(GrpoKeys)
    if (unknown := set(given) - set(schema)) != set():
        raise UserError(f"{name} has no key {', '.join(sorted(unknown))}")
    given = {k: v for k, v in given.items() if v is not None}
    keys = {**{n: f.default for n, f in schema.items()}, **given}
    device.settle(keys, schema, cuda)
    on_cpu = keys["device"] == "cpu"
    keys["size"] = keys["size"] or ("smoke" if on_cpu and not keys["model"] else models.FAMILIES[family].default_size)
    models.size(family, keys["size"])
    if "data" not in given:
        task = {**TASK, **(SMOKE if keys["size"] == "smoke" else {})}
        keys |= {k: v for k, v in task.items() if k not in given}
        if "warmup" not in given:
            keys["warmup"] = min(keys["warmup"], (keys["steps"] or keys["warmup"] * 4) // 4)  # of a shorter run
    installed = importlib.util.find_spec("nemo_rl") is not None
    keys["engine"] = keys["engine"] or ("nemo_rl" if installed and not on_cpu else "embedded")
    embedded = keys["engine"] == "embedded"
    defaults = {
        "precision": "fp32" if on_cpu else "bf16",
        "min_lr": keys["lr"],
        "gpus": 1 if embedded else None,
    }
    keys |= {k: v for k, v in defaults.items() if keys[k] is None}
    keys["out"] = keys["out"] or f"runs/{name}-{keys['size']}"
    if keys["tools"] and "turns" not in given:
        keys["turns"] = TURNS
    for check in (_values, _numbers):
        check(keys)
    if (keys["turns"] > 1) != bool(keys["tools"]):
        raise UserError(
            f"turns={keys['turns']} " + ("leaves no turn after a call of tools=" if keys["tools"] else "needs tools=")
        )
    if embedded:
        from nemo_ext.grpo import settings

        settings.check(keys)
        keys["backend"] = keys["backend"] or ("vllm" if not on_cpu and importlib.util.find_spec("vllm") else "transformers")
    elif name := next((name for name, default in FAULTS.items() if keys[name] != default), None):
        raise UserError(f"{name}={keys[name]}: NeMo-RL decides itself what follows a fault; it is for engine=embedded")
    elif on_cpu:
        raise UserError("engine=nemo_rl: it needs GPUs; gpu=h100 plan=true plans for them, engine=embedded trains here")
    return keys


def finish(keys: dict[str, Any]) -> dict[str, Any]:
    """Fill what follows from the number of steps, and refuse what it does not allow. `keys["steps"]` must be known."""
    steps = keys["steps"]
    if keys["warmup"] >= steps:
        raise UserError(f"warmup={keys['warmup']} leaves no step of steps={steps}")
    defaults = {"every": min(50, max(1, steps // 10)), "val_every": max(1, steps // 4)}
    return {**keys, **{k: v for k, v in defaults.items() if keys[k] is None}}


def load(keys: dict[str, Any], overrides: dict[str, Any]):
    """The recipe as a NeMo-Run object: `run.Partial` of the embedded engine's `train`, or the `run.Script` that starts NeMo-RL.

    Raises UserError for overrides of the embedded engine, which has no fields beside its keys.
    """
    import nemo_run as run

    if keys["engine"] == "nemo_rl":
        from nemo_ext.grpo.nemo_rl import tree

        version = tree.choose(keys["nemo_rl_version"], tree.installed())
        arguments = [f"run={keys['out']}", f"version={version}"]
        return run.Script(path="nemo_ext.grpo.nemo_rl.train", entrypoint="python", m=True, args=arguments)
    if overrides:
        raise UserError(f"{next(iter(overrides))}=: the embedded engine has no fields beside its keys; --help shows them")
    from nemo_ext.grpo import embedded

    return run.Partial(embedded.train, keys=keys, run_dir=keys["out"], model=keys["model"] or "")


def is_embedded(recipe) -> bool:
    """Whether a NeMo-Run object is the embedded engine's."""
    return getattr(getattr(recipe, "__fn_or_cls__", None), "__module__", "") == "nemo_ext.grpo.embedded"


def bind(recipe, *, run_dir: str, weights: str, checkpoint: str | None):
    """Put this machine's paths into a recipe of the embedded engine; `checkpoint` is one of the run, to go on from."""
    recipe.run_dir, recipe.model, recipe.checkpoint = run_dir, weights, checkpoint
    return recipe


def _numbers(keys: dict[str, Any]) -> None:
    if keys["clip_low"] >= 1:
        raise UserError(f"clip_low={keys['clip_low']} must be below 1: the ratio of probabilities is never negative")
    if keys["group"] < 2:
        raise UserError(f"group={keys['group']}: an answer is compared to the others of its group, which needs 2 or more")
    if keys["min_lr"] > keys["lr"]:
        raise UserError(f"min_lr={keys['min_lr']} is above lr={keys['lr']}")


def _values(keys: dict[str, Any]) -> None:
    for name, field in keys_of(GrpoKeys).items():
        check_value(name, keys[name], field)
