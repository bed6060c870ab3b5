"""What an executor that submits hands to a cluster: a run's keys, its folder, and the settings that the job's steps read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import recipes
from launchers import folder, grammar, inputs
from nemo_ext.errors import UserError
from recipes import device
from recipes.grpo import GrpoKeys

TRAIN, EMBEDDED, NEMO_RL = "train", "embedded", "nemo_rl"


@dataclass(frozen=True)
class Submission:
    """A run to submit. `keys` are resolved and name absolute paths; `settings` are what a step of the job takes as `config=`."""

    command: grammar.Command
    keys: dict[str, Any]
    engine: str  # TRAIN, or GRPO's EMBEDDED or NEMO_RL
    settings: dict[str, Any]
    lines: list[str]  # the plan for people; empty where the memory of a GPU is not known

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.keys["out"])

    @property
    def processes(self) -> int:
        """Processes of a machine that train, each started by the cluster."""
        return 1 if self.engine != TRAIN else self.keys["gpus"]

    def settings_text(self) -> str:
        """The settings as YAML."""
        return OmegaConf.to_yaml(OmegaConf.create({"settings": self.settings}).settings)

    def check_folder(self) -> dict[str, Any] | None:
        """Refuse another run's folder (UserError); the summary of a run that is complete already."""
        folder.check_same_run(self.run_dir, self.command, {k: v for k, v in self.keys.items() if v is not None})
        return folder.complete(self.run_dir)

    def paths(self) -> list[Path]:
        """Existing files and folders that the keys name, which the job must see under the same names."""
        data = self.keys["data"] if isinstance(self.keys["data"], list) else [self.keys["data"]]
        texts = [str(text) for text in (*data, *(self.keys.get(name) for name in _paths(self.engine))) if text]
        found = []
        for text in texts:
            whole = text.partition(":")[2] if text.startswith(("hf:", "gguf:", "nemo:")) else text
            whole = whole if Path(whole).exists() else whole.rpartition(":")[0]  # a.jsonl:0.7
            while any(sign in Path(whole).name for sign in "*?["):  # a glob's folder
                whole = str(Path(whole).parent)
            if whole.startswith("/") and Path(whole).exists():
                found.append(Path(whole))
        return found


def describe(command: grammar.Command, *, shared: bool = False) -> Submission:
    """Resolve a command's keys for the machines of a cluster, and plan its layout where `gpu=` or `gpu_memory=` is known.

    Without device=cpu it is for GPUs, of which `gpus=` says how many a machine has. Where the cluster has `shared` this machine's
    files, model, data and tokenizer must be there. Raises UserError.
    """
    method, family = recipes.split(command.recipe)
    grpo = recipes.schema(command.recipe) is GrpoKeys
    keys = recipes.resolve(command.recipe, command.keys, cuda=True)
    engine = keys["engine"] if grpo else TRAIN
    if keys["gpus"] is None:
        raise UserError("gpus= is missing: how many GPUs a machine of the cluster has; device=cpu trains on its cores")
    keys = inputs.absolute(keys, _paths(engine))
    if engine == NEMO_RL:
        keys["nemo_rl_version"] = _version(keys)
    if shared:
        _check_files(keys, engine, method)
    checkpoint, architecture = inputs.starting_point(command.recipe, method, family, keys, planning=not shared)
    lines = _plan(command, keys, engine, checkpoint, architecture)
    decided = ("nodes", "gpus", "device", "out", *(("engine", "nemo_rl_version") if grpo else ()))
    given = {name: keys[name] for name in (*command.keys, *decided)}
    settings = {"recipe": command.recipe, **given, **command.overrides}
    return Submission(command, keys, engine, settings, lines)


def _paths(engine: str) -> tuple[str, ...]:
    if engine == TRAIN:
        return inputs.PATHS
    from launchers.grpo import PATHS

    return PATHS


def _check_files(keys: dict[str, Any], engine: str, method) -> None:
    """Refuse data and a tokenizer that are not there, before the job has waited for its turn. Raises UserError."""
    from nemo_ext.data import sources

    records = sources.MEDIA if method.modality else sources.RECORDS if method.conversations else sources.DOCUMENTS
    sources.parse(keys["data"], sources.PROBLEMS if engine != TRAIN else records)
    if keys.get("tokenizer") and not Path(keys["tokenizer"]).is_dir():
        raise UserError(f"tokenizer={keys['tokenizer']}: there is no such folder")


def _version(keys: dict[str, Any]) -> str:
    from nemo_ext.grpo.nemo_rl import tree

    return tree.choose(keys["nemo_rl_version"], tree.installed())


def _plan(command: grammar.Command, keys: dict[str, Any], engine: str, checkpoint, architecture) -> list[str]:
    """The plan's lines, or none where the memory of a device is not known. Raises UserError where nothing fits."""
    from launchers import grpo, layout, plan, senses

    if not keys["gpu_memory"]:
        return []
    if engine == NEMO_RL:
        from launchers import nemo_rl_engine

        version, gpu = keys["nemo_rl_version"], layout.device(keys, None)
        return nemo_rl_engine.plan(keys, architecture, layout.device_memory(keys, None), version, gpu).lines()
    if engine == EMBEDDED:
        return grpo.plan(keys, architecture, layout.device_memory(keys, None)).lines()
    method, _ = recipes.split(command.recipe)
    planned = plan.plan(architecture, senses.request(method, keys, None, checkpoint, architecture))
    recipes.check_layout(command.recipe, {**keys, **layout.keys_of(planned)}, architecture)
    return [*planned.lines(), *device.lines(keys, command.keys, planned.request.gpu)]


def with_defaults(command: grammar.Command, defaults: dict[str, Any]) -> grammar.Command:
    """The command with recipe keys that it leaves open set to what a site says of its machines (`gpus`, `gpu`, `gpu_memory`).

    What a site says of its GPUs is nothing to device=cpu, nor the memory of its own to another `gpu=`.
    """
    given = {name: value for name, value in defaults.items() if command.keys.get(name) is None}
    if command.keys.get("device") == "cpu" or command.keys.get("gpu"):
        given = {name: value for name, value in given.items() if name not in ("gpu", "gpu_memory")}
    return dataclasses.replace(command, keys={**given, **command.keys, **given})
