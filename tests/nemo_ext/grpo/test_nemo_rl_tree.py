"""The key trees of NeMo-RL: how they are read, and what a check against them refuses."""

import json
import textwrap
from pathlib import Path

import pytest

from nemo_ext.errors import UserError
from nemo_ext.grpo.nemo_rl import reader, tree

VERSIONS = ["v0.5.0", "v0.8.0"]


def test_both_versions_say_where_they_were_read():
    assert tree.versions() == VERSIONS and tree.newest() == "v0.8.0"
    old, new = map(tree.load, VERSIONS)
    assert old.commit == "6c7089300fded94abfa49bb9cbf9eb357d862461" and old.note == "the tag v0.5.0"
    assert new.commit == "7ea279abfbeb698b092856d0dab61e7cf39bc909" and new.note.startswith("not the tag")
    for each in (old, new):
        assert "nemo_rl/algorithms/grpo.py" in each.files and "examples/configs/grpo_math_1B_megatron.yaml" in each.files


def test_keys_as_a_person_reads_them_in_the_source():
    """A few of every kind, copied by hand from the sources of both versions."""
    old, new = (tree.load(version).keys for version in VERSIONS)
    assert old["grpo.num_prompts_per_step"] == {"type": ["int"], "from": "class", "required": True, "default": 32}
    assert "required" not in new["grpo.num_prompts_per_step"]  # pydantic, with a default
    assert old["grpo.batch_multiplier"]["type"] == ["float"]
    assert new["grpo.val_batch_size"]["type"] == ["int", "null"] and old["grpo.val_batch_size"]["type"] == ["int"]
    assert "grpo.val_at_end" in new and "grpo.val_at_end" not in old
    assert old["loss_fn.kl_input_clamp_value"]["type"] == ["float", "null"]
    assert new["policy.generation.val_temperature"]["required"]
    assert old["policy.generation.vllm_cfg.kv_cache_dtype"]["choices"] == ["auto", "fp8", "fp8_e4m3"]
    assert old["policy.megatron_cfg"] == {"type": ["section"], "from": "class", "closable": True}
    assert old["policy.megatron_cfg.moe_router_dtype"]["from"] == "yaml"  # no class declares it
    assert old["data.val_data_path"]["from"] == "code"
    assert old["data.dataset_name"]["required"] and "data.dataset_name" not in new
    assert set(new["data.train"]["type"]) == {"section", "list"}
    assert old["env"]["type"] == ["dict"]
    assert "choices" not in new["policy.generation.refit_transport"]  # any text beside the listed ones


@pytest.mark.parametrize("version", VERSIONS)
def test_nemo_rls_own_example_passes(version):
    """The values of NeMo-RL's example, with what the code fills in, are a configuration of the version."""
    config = tree.load(version).defaults()
    config["policy"]["generation"]["vllm_cfg"]["skip_tokenizer_init"] = True
    tree.check(config, version)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("grpo.val_perod", 5, "nemo_rl.grpo.val_perod is no key of NeMo-RL v0.5.0, the nearest is nemo_rl.grpo.val_period"),
        ("policy.num_prompts_per_step", 5, "the nearest is nemo_rl.grpo.num_prompts_per_step"),
        ("grop.seed", 5, "is no key of NeMo-RL v0.5.0"),
        ("grpo.val_period", "5", "nemo_rl.grpo.val_period=5 must be a whole number"),
        ("grpo.val_period", 5.0, "must be a whole number"),
        ("grpo.seed", True, "must be a whole number"),
        ("grpo.normalize_rewards", 1, "must be true or false"),
        ("loss_fn.ratio_clip_c", "none", "must be a number or null"),
        ("policy.optimizer", 3, "must be a section or null"),
        ("grpo.reward_shaping", None, "must be a section"),
        ("policy.generation.vllm_cfg.kv_cache_dtype", "fp4", "is none of auto, fp8, fp8_e4m3"),
        ("policy.generation.stop_strings", "end", "must be a list or null"),
        ("policy.megatron_cfg.optimizer", {"lr": 1.0, "momentum": 1}, "nemo_rl.policy.megatron_cfg.optimizer.momentum is no key"),
    ],
)
def test_refusals_in_one_line(path, value, says):
    config = tree.load("v0.5.0").defaults()
    config["policy"]["generation"]["vllm_cfg"]["skip_tokenizer_init"] = True
    with pytest.raises(UserError) as error:
        tree.set_paths(config, {path: value}, "v0.5.0")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_values_by_path():
    config = tree.load("v0.8.0").defaults()
    config["policy"]["generation"]["vllm_cfg"]["skip_tokenizer_init"] = True
    paths = {
        "grpo.val_period": 5,
        "policy.megatron_cfg.optimizer.lr": 1,  # a whole number is a number
        "policy.generation.vllm_kwargs.max_num_seqs": 64,  # below a mapping of which NeMo-RL says nothing more
        "env.rewards.anything": [1],
        "policy.megatron_cfg.env_vars.NCCL_DEBUG": "INFO",  # null before
    }
    changed = tree.set_paths(config, paths, "v0.8.0")
    for path, value in paths.items():
        assert tree.get(changed, path) == value
    assert config["grpo"]["val_period"] == 10  # the given one is left alone


def test_a_missing_key_and_a_closed_section():
    config = tree.load("v0.5.0").defaults()
    with pytest.raises(UserError, match="vllm_cfg.skip_tokenizer_init is missing, which NeMo-RL v0.5.0 needs"):
        tree.check(config, "v0.5.0")
    config["policy"]["generation"]["vllm_cfg"]["skip_tokenizer_init"] = True
    config["policy"]["dtensor_cfg"] = {"enabled": False}
    tree.check(config, "v0.5.0")
    config["policy"]["dtensor_cfg"] = {"enabled": True}
    with pytest.raises(UserError, match="policy.dtensor_cfg.cpu_offload is missing"):
        tree.check(config, "v0.5.0")


def test_which_version(tmp_path, monkeypatch):
    assert tree.choose(None, None) == "v0.8.0" and tree.choose("v0.5.0", None) == "v0.5.0"
    assert tree.choose(None, "v0.5.0") == "v0.5.0" and tree.choose("v0.8.0", "v0.7.0") == "v0.8.0"
    with pytest.raises(UserError, match=r"nemo_rl_version=v0.4.0 is not known here: v0.5.0, v0.8.0"):
        tree.choose("v0.4.0", None)
    with pytest.raises(UserError, match="NeMo-RL v0.7.0 is installed, whose keys are not known here"):
        tree.choose(None, "v0.7.0")
    with pytest.raises(UserError, match="but NeMo-RL v0.5.0 is installed"):
        tree.choose("v0.8.0", "v0.5.0")
    assert tree.installed() is None
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nemo_rl.py").write_text("")  # a file of that name is not NeMo-RL
    assert tree.installed() is None
    (tmp_path / "nemo_rl.py").unlink()
    (tmp_path / "nemo_rl").mkdir()
    (tmp_path / "nemo_rl" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "nemo_rl" / "package_info.py").write_text("MAJOR = 0\nMINOR = 5\nPATCH = 0\n")
    assert tree.installed() == "v0.5.0"


CLASSES = {
    "nemo_rl/algorithms/grpo.py": """
        from typing import Any, Literal, NotRequired, Optional, TypedDict, Union
        from pydantic import BaseModel, Field
        from nemo_rl.parts import Base, Part, Closed, Mode
        from nemo_rl.models.policy import PolicyConfig

        class Own(Base):
            mode: Mode
            both: Union[int, str, None]
            more: Literal["a"] | str

        class Loose(BaseModel, extra="allow"):
            given: float = 0.5
            needed: "int"
            maybe: Optional[list[int]] = Field(default=None)

        class MasterConfig(TypedDict):
            own: Own
            part: NotRequired[Part | Closed]
            loose: Loose
            policy: PolicyConfig
            free: dict[str, Any]
        """,
    "nemo_rl/parts/__init__.py": "from nemo_rl.parts.inner import Base, Part, Closed, Mode",
    "nemo_rl/parts/inner.py": """
        Mode = Literal["x", "y"]

        class Base(TypedDict):
            inherited: bool
            hidden: NotRequired[int]
            _filled: int

        class Part(TypedDict):
            enabled: Literal[True]
            size: int

        class Closed(TypedDict):
            enabled: Literal[False]
        """,
    "nemo_rl/models/policy/__init__.py": """
        class GenerationConfig(TypedDict):
            backend: str

        class PolicyConfig(TypedDict):
            generation: GenerationConfig
        """,
    "nemo_rl/models/generation/vllm/config.py": """
        from nemo_rl.models.policy import GenerationConfig

        class VllmConfig(GenerationConfig):
            vllm: int
        """,
    reader.EXEMPLAR: """
        defaults: base.yaml
        own: {both: null, mode: y}
        loose: {extra: 3}
        policy: {generation: {vllm: "${mul:${own.count},2}"}}
        """,
    "examples/configs/base.yaml": """
        own: {inherited: true, both: 1, count: 4}
        part: {enabled: false}
        """,
}


def test_reading_a_source_tree(tmp_path):
    for name, content in CLASSES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    for name in reader.FURTHER:
        (tmp_path / name).write_text("own: {late: 1.5}\n")
    out = tmp_path / "out.json"
    reader.write(reader.Options(str(tmp_path), "v9.9.9", commit="c0ffee", families="llama,qwen2", out=str(out)))
    content = json.loads(out.read_text())
    assert content["commit"] == "c0ffee" and content["families"] == ["llama", "qwen2"]
    assert content["files"][0] == "nemo_rl/algorithms/grpo.py" and "nemo_rl/parts/inner.py" in content["files"]
    yaml, declared = {"from": "yaml"}, {"from": "class"}
    assert content["keys"] == {
        "own": {"type": ["section"], **declared, "required": True},
        "own.inherited": {"type": ["bool"], **declared, "required": True, "default": True},
        "own.hidden": {"type": ["int"], **declared},
        "own.mode": {"type": ["str"], **declared, "required": True, "choices": ["x", "y"], "default": "y"},
        "own.both": {"type": ["int", "null", "str"], **declared, "required": True, "default": None},
        "own.more": {"type": ["str"], **declared, "required": True},
        "own.count": {"type": ["int"], **yaml, "default": 4},
        "own.late": {"type": ["float"], **yaml},
        "part": {"type": ["section"], **declared, "closable": True},
        "part.enabled": {"type": ["bool"], **declared, "required": True, "default": False},
        "part.size": {"type": ["int"], **declared, "required": True},
        "loose": {"type": ["section"], **declared, "required": True},
        "loose.given": {"type": ["float"], **declared},
        "loose.needed": {"type": ["int"], **declared, "required": True},
        "loose.maybe": {"type": ["list", "null"], **declared},
        "loose.extra": {"type": ["int"], **yaml, "default": 3},
        "policy": {"type": ["section"], **declared, "required": True},
        "policy.generation": {"type": ["section"], **declared, "required": True},
        "policy.generation.backend": {"type": ["str"], **declared, "required": True},
        "policy.generation.vllm": {"type": ["int"], **declared, "required": True, "default": 8},
        "free": {"type": ["dict"], **declared, "required": True},
    }


def test_a_folder_that_is_not_nemo_rl(tmp_path):
    with pytest.raises(UserError, match="is this a NeMo-RL source tree"):
        reader.read(Path(tmp_path), "v0.8.0")
