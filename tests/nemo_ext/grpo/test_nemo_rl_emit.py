"""What a GRPO recipe's keys become in a NeMo-RL configuration, compared key by key with the versions' trees."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from nemo_ext.errors import UserError
from nemo_ext.grpo.nemo_rl import emit, limits, tree
from recipes.grpo import GrpoKeys
from recipes.models import FAMILIES

VERSIONS = ["v0.5.0", "v0.8.0"]
LLAMA = FAMILIES["llama3"].sizes["8b"].architecture
PATHS = emit.Paths("/models/llama", "/runs/a/train.jsonl", "/runs/a/heldout.jsonl", "/runs/a")
PLANNED = {"gpus": 8, "tp": 2, "pp": 1, "cp": 1, "ep": 1, "micro_batch": 4, "steps": 200, "every": 20, "val_every": 50,
           "precision": "bf16", "device": "gpu", "recompute": False}  # fmt: skip
# Keys that change what is emitted, each in a run of its own.
VARIANTS = {
    "default": {},
    "algorithm": {"loss": "sequence", "normalize": False, "leave_one_out": True, "kl": 0.04, "clip_low": 0.2, "clip_high": 0.28},
    "dapo": {"dynamic_sampling": True, "dynamic_limit": 3, "clip_high": 0.28},
    "fp8": {"precision": "fp8", "tp": 1},
    "fp32": {"precision": "fp32", "schedule": "cosine", "warmup": 10, "min_lr": 1e-8, "clip": 0.0},
    "long": {"max_prompt": 1024, "max_answer": 7000, "tp": 4, "pp": 2, "cp": 2, "nodes": 4},
    "apart": {"generation_gpus": 4, "generation_tp": 4},
    "nodes apart": {"nodes": 4, "generation_gpus": 4},
    "logging": {"wandb": "reasoning", "tensorboard": False, "keep": 0},
}
PYTHON = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "dict": dict, "section": dict}


def keys(**changes):
    return {**dataclasses.asdict(GrpoKeys()), **PLANNED, **changes}


def emitted(version, paths=PATHS, architecture=LLAMA, **changes):
    """What a run would write and NeMo-RL would read: through YAML and back."""
    return yaml.safe_load(yaml.safe_dump(emit.emit(keys(**changes), architecture, paths, version)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_key_is_the_versions_and_of_its_type(version, variant):
    """Against the file itself, not through `tree.check`: keys, types, listed values, and that what is needed is there."""
    known = json.loads((Path(tree.__file__).parent / "versions" / f"{version}.json").read_text())["keys"]
    config = emitted(version, **VARIANTS[variant])
    compared, present = 0, set()

    def compare(content, prefix):
        nonlocal compared
        for name, value in content.items():
            path = f"{prefix}{name}"
            assert path in known, f"{path} is no key of {version}"
            present.add(path)
            compared += 1
            types = known[path]["type"]
            if value is None:
                assert "null" in types or "any" in types, path
                continue
            fitting = [
                t for t in types if t in PYTHON and isinstance(value, PYTHON[t]) and (t == "bool") == (type(value) is bool)
            ]
            assert fitting or "any" in types, f"{path}={value!r} is none of {types}"
            if isinstance(value, str) and "choices" in known[path]:
                assert value in known[path]["choices"], path
            if "section" in fitting and "dict" not in types:
                compare(value, f"{path}.")

    compare(config, "")
    assert compared > 200 and {path for path in present if "." not in path} >= set(
        "grpo loss_fn policy data env logger cluster checkpointing".split()
    )

    def closed(section):
        return known[section].get("closable") and tree.get(config, section).get("enabled") is False

    needed = {path for path, entry in known.items() if entry.get("required")}
    sections = {path for path in present if "section" in known[path]["type"] and isinstance(tree.get(config, path), dict)} | {""}
    missing = {p for p in needed - present if (section := p.rpartition(".")[0]) in sections and not (section and closed(section))}
    assert not missing


@pytest.mark.parametrize("version", VERSIONS)
def test_tools_reach_the_environment(version):
    config = emitted(version, tools="python", turns=3, tool_timeout=2.0, sandbox_memory=64, judge_key_env="A_JUDGES_KEY")
    assert config["grpo"]["max_rollout_turns"] == 3
    told = config["env"]["rewards"]
    assert (told["tools"], told["turns"], told["tool_timeout"], told["memory"]) == ("python", 3, 2.0, 64)
    assert told["tokenizer"] == config["policy"]["model_name"]
    assert told["settings"] == {"judge_key_env": "A_JUDGES_KEY", "sandbox_memory": 64}  # the variable's name, not its value
    assert "tools" not in emitted(version)["env"]["rewards"]


@pytest.mark.parametrize("version", VERSIONS)
def test_values_follow_the_keys(version):
    config = emitted(
        version, prompts=16, group=4, max_answer=300, max_prompt=200, temperature=0.8, seed=7, lr=2e-6, min_lr=1e-7,
        schedule="linear", warmup=5, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-7, clip=0.5, kl=0.01, clip_high=0.28,
        reward="math:1.0,format:0.2", reward_timeout=3.0, judge_url="http://x/v1", keep=3, val_samples=32, wandb="w",
    )  # fmt: skip
    policy, megatron, generation = config["policy"], config["policy"]["megatron_cfg"], config["policy"]["generation"]
    expected = {
        "num_prompts_per_step": 16, "num_generations_per_prompt": 4, "max_num_steps": 200, "max_rollout_turns": 1,
        "normalize_rewards": True, "use_leave_one_out_baseline": False, "val_period": 50, "val_at_start": True,
        "val_batch_size": 32, "max_val_samples": 32, "seed": 7, "overlong_filtering": False, "use_dynamic_sampling": False,
        "batch_multiplier": 1.0,
    }  # fmt: skip
    assert expected.items() <= config["grpo"].items()
    assert config["grpo"]["max_num_epochs"] >= 200  # the steps end a run, not the epochs
    assert config["loss_fn"]["reference_policy_kl_penalty"] == 0.01 and config["loss_fn"]["reference_policy_kl_type"] == "k3"
    assert config["loss_fn"]["kl_input_clamp_value"] is None and config["loss_fn"]["kl_output_clamp_value"] is None
    assert (config["loss_fn"]["ratio_clip_min"], config["loss_fn"]["ratio_clip_max"]) == (0.2, 0.28)
    assert config["loss_fn"]["token_level_loss"] is True
    assert policy["train_global_batch_size"] == 64 and policy["train_micro_batch_size"] == 4
    assert policy["model_name"] == policy["tokenizer"]["name"] == "/models/llama"
    assert policy["max_total_sequence_length"] == 640 == generation["vllm_cfg"]["max_model_len"]  # 516 rounded up to 128s
    assert policy["sequence_packing"]["enabled"] and policy["sequence_packing"]["train_mb_tokens"] == 4 * 640
    assert not policy["dynamic_batching"]["enabled"] and policy["dtensor_cfg"] == {"enabled": False}
    assert policy["optimizer"] is None and policy["scheduler"] is None  # those of the other backend
    sizes = [megatron[f"{kind}_parallel_size"] for kind in ("tensor_model", "pipeline_model", "context", "expert_model")]
    assert sizes == [2, 1, 1, 1] and megatron["sequence_parallel"] and policy["make_sequence_length_divisible_by"] == 2
    optimizer = {"lr": 2e-6, "min_lr": 1e-7, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-7,
                 "clip_grad": 0.5, "bf16": True}  # fmt: skip
    assert optimizer.items() <= megatron["optimizer"].items()
    scheduler = {"lr_decay_style": "linear", "lr_decay_iters": 200, "lr_warmup_iters": 5, "start_weight_decay": 0.1,
                 "end_weight_decay": 0.1}  # fmt: skip
    assert scheduler.items() <= megatron["scheduler"].items()
    assert (generation["backend"], generation["temperature"], generation["max_new_tokens"]) == ("vllm", 0.8, 300)
    assert generation["colocated"] == {"enabled": True, "resources": {"gpus_per_node": None, "num_nodes": None}}
    assert generation["vllm_cfg"]["tensor_parallel_size"] == 2
    assert config["cluster"]["gpus_per_node"] == 8 and config["cluster"]["num_nodes"] == 1
    checkpointing = config["checkpointing"]
    assert (checkpointing["checkpoint_dir"], checkpointing["save_period"], checkpointing["keep_top_k"]) == (
        "/runs/a/checkpoints", 20, 3,
    )  # fmt: skip
    assert checkpointing["metric_name"] is None  # newest, not best
    assert config["logger"]["wandb"]["project"] == "w" and config["logger"]["wandb_enabled"]
    assert list(config["env"]) == ["rewards"]
    environment = config["env"]["rewards"]
    assert (environment["reward"], environment["timeout"]) == ("math:1.0,format:0.2", 3.0)
    assert environment["settings"] == {"judge_url": "http://x/v1", "sandbox_memory": 512}


def test_data_of_either_version():
    old, new = (emitted(version)["data"] for version in VERSIONS)
    assert old["train_data_path"] == new["train"]["data_path"] == "/runs/a/train.jsonl"
    assert old["val_data_path"] == new["validation"]["data_path"] == "/runs/a/heldout.jsonl"
    for task in (old, new["default"]):
        assert (task["processor"], task["env_name"], task["prompt_file"]) == ("chat_prompt", "rewards", None)
    assert old["max_input_seq_length"] == new["max_input_seq_length"] == 256
    without = dataclasses.replace(PATHS, validation=None)
    old, new = (emitted(version, without) for version in VERSIONS)
    assert "val_data_path" not in old["data"] and new["data"]["validation"] is None
    assert old["grpo"]["val_period"] == new["grpo"]["val_period"] == 0 and not new["grpo"]["val_at_end"]
    template = emitted("v0.5.0", dataclasses.replace(PATHS, template="/t.jinja"))["policy"]["tokenizer"]
    assert template["chat_template"] == "/t.jinja" and "chat_template" not in emitted("v0.5.0")["policy"]["tokenizer"]


@pytest.mark.parametrize("version", VERSIONS)
def test_algorithm_options(version):
    config = emitted(version, **VARIANTS["algorithm"])
    assert config["loss_fn"]["token_level_loss"] is False
    assert config["grpo"]["use_leave_one_out_baseline"] is True and config["grpo"]["normalize_rewards"] is False
    if version == "v0.8.0":  # computed by an estimator that has options of its own
        estimator = config["grpo"]["adv_estimator"]
        assert estimator["name"] == "grpo"
        assert estimator["use_leave_one_out_baseline"] is True and estimator["normalize_rewards"] is False
        assert config["grpo"]["skip_reference_policy_logprobs_calculation"] is False
        assert emitted(version)["grpo"]["skip_reference_policy_logprobs_calculation"] is True  # kl=0
    config = emitted(version, **VARIANTS["dapo"])["grpo"]
    assert config["use_dynamic_sampling"] and config["dynamic_sampling_max_gen_batches"] == 2  # it fails at one more than that


def test_overlong_filter_is_v080s():
    assert emitted("v0.8.0", overlong_filter=True)["grpo"]["overlong_filtering"] is True


@pytest.mark.parametrize("version", VERSIONS)
def test_precision_and_length(version):
    fp8 = emitted(version, **VARIANTS["fp8"])
    assert fp8["policy"]["megatron_cfg"]["fp8_cfg"] == {
        "enabled": True,
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param": False,
    }
    assert fp8["policy"]["generation"]["vllm_cfg"]["precision"] == "fp8" and fp8["policy"]["precision"] == "bfloat16"
    assert fp8["loss_fn"]["use_importance_sampling_correction"] is True  # NeMo-RL asserts it
    assert fp8["policy"]["megatron_cfg"]["optimizer"]["use_precision_aware_optimizer"] is False
    fp32 = emitted(version, **VARIANTS["fp32"])["policy"]
    assert fp32["precision"] == fp32["megatron_cfg"]["pipeline_dtype"] == "float32"
    assert fp32["megatron_cfg"]["optimizer"]["bf16"] is False and fp32["max_grad_norm"] == 0.0
    assert fp32["megatron_cfg"]["optimizer"]["min_lr"] == 1e-8
    constant = emitted(version, min_lr=1e-9)["policy"]["megatron_cfg"]["optimizer"]  # of a constant schedule
    assert constant["min_lr"] == constant["lr"]
    long = emitted(version, recompute=True, **VARIANTS["long"])["policy"]
    assert long["max_total_sequence_length"] == 8064 and long["make_sequence_length_divisible_by"] == 16
    assert long["megatron_cfg"]["activation_checkpointing"] is True
    window = dataclasses.replace(LLAMA, max_position_embeddings=530)
    assert emitted(version, architecture=window)["policy"]["max_total_sequence_length"] == 530  # not the 640 of whole 128s
    window = dataclasses.replace(LLAMA, max_position_embeddings=512)
    with pytest.raises(UserError, match="max_prompt=256 and max_answer=256 are longer together than 496, what the model's 512"):
        emitted(version, architecture=window)


@pytest.mark.parametrize("version", VERSIONS)
def test_generation_on_gpus_of_its_own(version):
    one = emitted(version, **VARIANTS["apart"])["policy"]["generation"]
    assert one["colocated"] == {"enabled": False, "resources": {"gpus_per_node": 4, "num_nodes": None}}
    assert one["vllm_cfg"]["tensor_parallel_size"] == 4 and one["vllm_cfg"]["gpu_memory_utilization"] == 0.9
    assert emit.policy_machine(keys(**VARIANTS["apart"])) == (1, 4)
    many = emitted(version, **VARIANTS["nodes apart"])["policy"]["generation"]["colocated"]
    assert many == {"enabled": False, "resources": {"gpus_per_node": 8, "num_nodes": 2}}  # half of the machines, whole
    assert emit.policy_machine(keys(**VARIANTS["nodes apart"])) == (2, 8)
    with pytest.raises(UserError, match="generation_tp=3 does not divide num_attention_heads=32"):
        emitted(version, generation_tp=3)
    with pytest.raises(UserError, match="generation_tp=4 does not divide the 2 GPUs of a machine that generate"):
        emitted(version, generation_tp=4, generation_gpus=2)


@pytest.mark.parametrize("version", VERSIONS)
def test_capped_attention_is_not_packed(version):
    gemma = FAMILIES["gemma2"].sizes["2b"].architecture
    policy = emitted(version, architecture=gemma)["policy"]
    assert not policy["sequence_packing"]["enabled"] and policy["dynamic_batching"]["enabled"]
    policy = emitted(version, architecture=gemma, pp=2)["policy"]  # NeMo-RL asserts one stage for dynamic batches
    assert not policy["sequence_packing"]["enabled"] and not policy["dynamic_batching"]["enabled"]


REFUSED = [
    ({"loss": "dr_grpo"}, VERSIONS, "loss=dr_grpo: NeMo-RL VERSION divides by a step's tokens .* loss=token"),
    ({"leave_one_out": True}, VERSIONS, "leave_one_out=true: .* not of the group: normalize=false"),
    (
        {"leave_one_out": True, "normalize": False, "dynamic_sampling": True}, VERSIONS,
        "dynamic_sampling=true with leave_one_out=true: .* drops each answer whose others are equal",
    ),
    ({"overlong_filter": True}, ["v0.5.0"], "overlong_filter=true: .* nemo_rl_version=v0.8.0"),
    ({"top_p": 0.9}, ["v0.5.0"], "top_p=0.9: NeMo-RL v0.5.0 takes 0.99 or more"),
    ({"device": "cpu"}, VERSIONS, "NeMo-RL needs GPUs: engine=embedded"),
    ({"backend": "transformers"}, VERSIONS, "backend=transformers is for engine=embedded"),
    ({"updates": 2}, VERSIONS, "updates=2: NeMo-RL VERSION goes over the answers of a rollout once"),
    ({"temperature": 0.0}, VERSIONS, "temperature=0.0 must be above 0"),
    ({"dynamic_sampling": True, "dynamic_limit": 1}, VERSIONS, "dynamic_limit=1: .* samples two batches or more"),
    ({"generation_gpus": 8}, VERSIONS, "generation_gpus=8 must leave GPUs of gpus=8 to the policy"),
    ({"nodes": 2, "generation_gpus": 3}, VERSIONS, "6 GPUs are no number of machines of 8"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "versions", "says"), REFUSED)
def test_what_a_version_lacks_is_refused_with_the_reason(changes, versions, says):
    for version in VERSIONS:
        reasons = list(limits.reasons(keys(**changes), LLAMA, version))
        if version not in versions:
            assert not reasons
            continue
        with pytest.raises(UserError, match=says.replace("VERSION", version)) as error:
            emit.emit(keys(**changes), LLAMA, PATHS, version)
        assert len(reasons) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("version", VERSIONS)
def test_families(version):
    """Those that the version's Megatron-Bridge registers, among ours."""
    taken = set()
    for name, family in FAMILIES.items():
        architecture = family.sizes[family.default_size].architecture
        if not list(limits.reasons(keys(), architecture, version)):
            taken.add(name)
    assert taken == {"llama3", "mistral", "qwen2.5", "qwen3", "gemma2", "gemma3", "custom"}
    with pytest.raises(UserError, match="no Megatron bridge for mixtral models, only for llama, mistral"):
        emit.emit(keys(), FAMILIES["mixtral"].sizes["8x7b"].architecture, PATHS, version)
    with pytest.raises(UserError, match="cp=2: .* capped attention"):
        emit.emit(keys(cp=2), FAMILIES["gemma2"].sizes["2b"].architecture, PATHS, version)
