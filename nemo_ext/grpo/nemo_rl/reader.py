"""Reads the key tree of a NeMo-RL version from its source, into a file of `versions/`.

    python -m nemo_ext.grpo.nemo_rl.reader source=/opt/nemo-rl version=v0.8.0

NeMo-RL declares its configuration as TypedDicts and pydantic models from `nemo_rl.algorithms.grpo.MasterConfig` down, and sets
defaults in the YAML files of `examples/configs`. Both are read without importing NeMo-RL: the classes from the syntax tree, the
values from `EXEMPLAR` with all that it inherits. Keys that only YAML files have get the type of their value there.
"""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.disk import write_atomic
from nemo_ext.errors import UserError

ROOT = ("nemo_rl.algorithms.grpo", "MasterConfig")
# Where the declared class is not the one that is used: the generation section is declared as what all backends share.
USED = {"policy.generation": ("nemo_rl.models.generation.vllm.config", "VllmConfig")}
EXEMPLAR = "examples/configs/grpo_math_1B_megatron.yaml"
FURTHER = (  # more YAML files, read for keys and types only
    "examples/configs/grpo_math_8B_megatron_fp8.yaml",
    "examples/configs/grpo_math_qwen30ba3b_megatron.yaml",
)
# Keys that the code of a version reads and neither declares nor sets in an example: the dataset loader's
# (nemo_rl/data/datasets/response_datasets/__init__.py) and the Megatron worker's (nemo_rl/models/policy/workers and
# nemo_rl/models/megatron).
UNDECLARED = {
    "v0.5.0": {"data.train_split": "str", "data.val_data_path": "str", "data.val_split": "str",
               "policy.megatron_cfg.layernorm_epsilon": "float", "policy.megatron_cfg.peft": "dict"},
    "v0.8.0": {"policy.megatron_cfg.layernorm_epsilon": "float"},
}  # fmt: skip
NAMES = {
    "int": "int", "float": "float", "bool": "bool", "str": "str", "dict": "dict", "Dict": "dict", "list": "list",
    "List": "list", "tuple": "list", "Any": "any", "PositiveInt": "int", "NonNegativeInt": "int", "PositiveFloat": "float",
    "NonNegativeFloat": "float", "PathLike": "str", "Path": "str",
}  # fmt: skip
WRAPPERS = ("NotRequired", "Required", "Annotated", "Optional")


@dataclass
class Node:
    """What a key may hold: types, listed values, and the keys of a section. `closable`: `enabled: false` leaves it empty."""

    types: set[str] = field(default_factory=set)
    choices: list = field(default_factory=list)
    fields: dict[str, tuple[Node, bool]] = field(default_factory=dict)  # by name: (node, required)
    closable: bool = False
    origin: str = "class"

    def merge(self, other: Node) -> None:
        """Allow what `other` allows too. Of two sections' keys those are required that both require."""
        both = "section" in self.types and "section" in other.types
        for name, (node, required) in other.fields.items():
            if name in self.fields:
                known, needed = self.fields[name]
                known.merge(node)
                self.fields[name] = (known, needed and required)
            else:
                self.fields[name] = (node, required and not both)
        if both:
            self.fields = {name: (node, required and name in other.fields) for name, (node, required) in self.fields.items()}
        free = any("str" in node.types and not node.choices for node in (self, other))  # any text beside the listed ones
        self.choices = [] if free else self.choices + [choice for choice in other.choices if choice not in self.choices]
        self.types |= other.types
        self.closable |= other.closable


class Classes:
    """The configuration classes of a source tree, found by module and name through its imports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}
        self.read: set[str] = set()  # files, below the folder

    def file(self, module: str) -> Path:
        """Where a module is."""
        base = self.folder / module.replace(".", "/")
        return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")

    def names(self, module: str) -> dict[str, Any]:
        """What a module defines: classes and annotations by name, imports as (module, name)."""
        if module not in self.files:
            path, found = self.file(module), {}
            if path.is_file():
                for statement in ast.parse(path.read_text()).body:
                    if isinstance(statement, ast.ClassDef):
                        found[statement.name] = statement
                    elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                        found[statement.targets[0].id] = statement.value
                    elif isinstance(statement, ast.ImportFrom) and statement.module:
                        found.update({a.asname or a.name: (statement.module, a.name) for a in statement.names})
            self.files[module] = found
        return self.files[module]

    def find(self, module: str, name: str) -> tuple[str, Any] | None:
        """The module that defines `name` as `module` sees it, and the definition; None outside NeMo-RL."""
        found = self.names(module).get(name)
        if isinstance(found, tuple):
            return self.find(*found) if found[0].startswith("nemo_rl") else None
        return None if found is None else (module, found)

    def section(self, module: str, name: str) -> Node:
        """A configuration class, with the fields that it inherits."""
        where = self.find(module, name)
        if where is None or not isinstance(where[1], ast.ClassDef):
            raise UserError(f"{self.folder}: {module} has no class {name}; is this a NeMo-RL source tree?")
        module, definition = where
        self.read.add(self.file(module).relative_to(self.folder).as_posix())
        node = Node({"section"})
        optional = any(k.arg == "total" and ast.unparse(k.value) == "False" for k in definition.keywords)
        pydantic = False
        for base in definition.bases:
            if isinstance(base, ast.Name) and base.id not in ("TypedDict", "BaseModel", "Generic"):
                node.fields.update(self.section(module, base.id).fields)
            pydantic |= isinstance(base, ast.Name) and base.id == "BaseModel"
        for statement in definition.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            annotation = ast.unparse(statement.annotation)
            required = not annotation.startswith("NotRequired") and not optional
            required &= not (pydantic and statement.value is not None)
            node.fields[statement.target.id] = (self.node(statement.annotation, module), required)
        return node

    def node(self, annotation: ast.expr, module: str) -> Node:
        """What an annotation allows."""
        if isinstance(annotation, ast.Constant):
            if annotation.value is None:
                return Node({"null"})
            return self.node(ast.parse(annotation.value, mode="eval").body, module)
        if isinstance(annotation, ast.BinOp):
            return self.union([annotation.left, annotation.right], module)
        if isinstance(annotation, ast.Subscript):
            outer = ast.unparse(annotation.value).split(".")[-1]
            inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            if outer == "Literal":
                values = [ast.literal_eval(value) for value in inner]
                return Node({type(value).__name__ for value in values}, values)
            if outer == "Union":
                return self.union(inner, module)
            if outer in WRAPPERS:
                node = self.node(inner[0], module)
                node.types |= {"null"} if outer == "Optional" else set()
                return node
            return Node({NAMES.get(outer, "any")})
        name = ast.unparse(annotation).split(".")[-1]
        where = self.find(module, name)
        if where is None:
            return Node({NAMES.get(name, "any")})
        if isinstance(where[1], ast.ClassDef):
            return self.section(module, name)
        return Node({"str"}) if name == "PathLike" else self.node(where[1], where[0])

    def union(self, annotations: list[ast.expr], module: str) -> Node:
        """Several alternatives as one; of a pair such as MegatronConfig | MegatronConfigDisabled the second only closes."""
        nodes = [self.node(each, module) for each in annotations]
        closed = [node for node in nodes if set(node.fields) == {"enabled"} and node.fields["enabled"][0].choices == [False]]
        rest = [node for node in nodes if node not in closed]
        for node in rest[1:]:
            rest[0].merge(node)
        if closed:
            rest[0].closable = True
            rest[0].fields["enabled"] = (Node({"bool"}), True)
        return rest[0]


def read(folder: Path, version: str) -> dict[str, dict]:
    """Every key of a version by its path: `{"type": [...], "required": true, "choices": [...], "default": ..., "from": ...}`.

    `default` is the exemplar's value. A section's entry has the type "section"; below a key of type "dict" anything goes.
    """
    classes = Classes(folder)
    tree = classes.section(*ROOT)
    for path, where in USED.items():
        _replace(tree, path.split("."), classes.section(*where), required=True)
    for path, kind in UNDECLARED.get(version, {}).items():
        _replace(tree, path.split("."), Node({kind}, origin="code"), required=False)
    OmegaConf.register_new_resolver("mul", lambda a, b: a * b, replace=True)
    defaults = _yaml(folder / EXEMPLAR)
    for content in (defaults, *(_yaml(folder / name) for name in FURTHER)):
        _add(tree, content)
    keys: dict[str, dict] = {}
    _flatten(tree, defaults, "", keys)
    return {"files": [*sorted(classes.read), EXEMPLAR, *FURTHER], "keys": keys}


def _replace(tree: Node, path: list[str], node: Node, required: bool) -> None:
    for name in path[:-1]:
        tree = tree.fields[name][0]
    tree.fields[path[-1]] = (node, required)


def _yaml(path: Path) -> dict:
    """A configuration with what it inherits (`defaults:`), interpolations resolved."""
    return OmegaConf.to_container(_merged(path), resolve=True)


def _merged(path: Path):
    content = OmegaConf.load(path)
    parents = content.pop("defaults", None)
    for parent in [parents] if isinstance(parents, str) else parents or []:
        content = OmegaConf.merge(_merged(path.parent / parent), content)
    return content


def _add(tree: Node, content: dict) -> None:
    """Add the keys that only the YAML has, and the types of values there that the classes do not allow."""
    for name, value in content.items():
        kind = "null" if value is None else "section" if isinstance(value, dict) else type(value).__name__
        if name not in tree.fields:
            tree.fields[name] = (Node({kind}, origin="yaml"), False)
        node, _ = tree.fields[name]
        if node.types & {"any", "dict"}:
            continue
        if not (kind == "int" and "float" in node.types):
            node.types |= {kind}
        if kind == "section":
            _add(node, value)


def _flatten(node: Node, defaults: Any, prefix: str, keys: dict[str, dict]) -> None:
    for name, (child, required) in node.fields.items():
        if name.startswith("_") and name not in ("_v2", "_target_"):  # NeMo-RL's own, filled while it runs
            continue
        path = f"{prefix}{name}"
        types = child.types or {"any"}
        if child.origin == "yaml" and types == {"null"}:
            types = {"any"}
        entry: dict[str, Any] = {"type": sorted(types), "from": child.origin}
        if required:
            entry["required"] = True
        if child.choices and types - {"section"} and len(child.choices) > 1:
            entry["choices"] = child.choices
        if child.closable:
            entry["closable"] = True
        has = isinstance(defaults, dict) and name in defaults
        if has and not ("section" in types and isinstance(defaults[name], dict)):
            entry["default"] = defaults[name]
        keys[path] = entry
        if "section" in types:
            _flatten(child, defaults.get(name) if isinstance(defaults, dict) else None, f"{path}.", keys)


@dataclass
class Options:
    """The command's keys."""

    source: str = key(NO_DEFAULT, "folder of NeMo-RL's source, in its container /opt/nemo-rl")
    version: str = key(NO_DEFAULT, "its version: v0.8.0")
    commit: str = key("", "commit that the source is of")
    note: str = key("", "how near this source is to the version, where it is not the tag")
    bridge: str = key("", "commit of its Megatron-Bridge")
    families: str = key("", "model families with a Megatron bridge, separated by commas")
    out: str | None = key(None, "file to write", auto="versions/VERSION.json beside this module")


def write(options: Options) -> None:
    """Read a source tree and write its file."""
    folder = Path(options.source)
    content = {
        "version": options.version,
        "repository": "https://github.com/NVIDIA-NeMo/RL",
        "commit": options.commit,
        "note": options.note,
        "megatron_bridge": options.bridge,
        "families": [name for name in options.families.split(",") if name],
        **read(folder, options.version),
    }
    lines = [f"    {json.dumps(path)}: {json.dumps(entry)}" for path, entry in content.pop("keys").items()]
    head = json.dumps(content, indent=2).removesuffix("\n}")
    out = Path(options.out or Path(__file__).parent / "versions" / f"{options.version}.json")
    write_atomic(out, head + ',\n  "keys": {\n' + ",\n".join(lines) + "\n  }\n}\n")
    print(f"{len(lines)} keys of NeMo-RL {options.version}: {out}")


if __name__ == "__main__":
    sys.exit(main(Options, write, sys.argv[1:], about="Read the key tree of a NeMo-RL version.",
                  example="python -m nemo_ext.grpo.nemo_rl.reader source=/opt/nemo-rl version=v0.8.0"))  # fmt: skip
