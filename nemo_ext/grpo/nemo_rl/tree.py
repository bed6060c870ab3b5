"""Which keys a NeMo-RL version has, of which types, and the check of a configuration against them.

NeMo-RL takes unknown keys without a word (its classes allow extra ones, or are TypedDicts that nobody checks), so a typo trains
something else. The trees in `versions/` say what there is; each names the commit and the files it was read from.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.errors import UserError

FOLDER = Path(__file__).parent / "versions"
PREFIX = "nemo_rl."  # what a recipe's command line puts before a path
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list",
         "dict": "a mapping", "section": "a section", "null": "null"}  # fmt: skip


@dataclass(frozen=True)
class Tree:
    """A version's keys by path: {"type": [...], "required", "choices", "closable", "default", "from"}, see `reader.read`."""

    version: str
    commit: str
    note: str
    files: tuple[str, ...]
    families: tuple[str, ...]  # `Architecture.family` names with a Megatron bridge
    megatron_bridge: str
    keys: dict[str, dict[str, Any]]

    def defaults(self) -> dict:
        """The values of NeMo-RL's own Megatron example, as a nested dictionary."""
        content: dict = {}
        for path, entry in self.keys.items():
            if "default" in entry:
                put(content, path, deepcopy(entry["default"]))
        return content


def versions() -> list[str]:
    """The known versions, oldest first."""
    return sorted((path.stem for path in FOLDER.glob("v*.json")), key=_numbers)


def newest() -> str:
    """The newest known version."""
    return versions()[-1]


@functools.cache
def load(version: str) -> Tree:
    """The tree of a version. Raises UserError that lists the known ones."""
    path = FOLDER / f"{version}.json"
    if version not in versions():
        raise UserError(f"nemo_rl_version={version} is not known here: {', '.join(versions())}")
    content = json.loads(path.read_text())
    return Tree(
        version, content["commit"], content["note"], tuple(content["files"]), tuple(content["families"]),
        content["megatron_bridge"], content["keys"],
    )  # fmt: skip


def installed() -> str | None:
    """The version of the NeMo-RL that Python finds ("v0.5.0"), or None without one. Imports nothing of it.

    A file named nemo_rl.py is none: NeMo-RL is a package, and says its version in package_info.py.
    """
    spec = importlib.util.find_spec("nemo_rl")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        info = Path(folder) / "package_info.py"
        if info.is_file():
            numbers = [re.search(rf"^{name} = (\d+)", info.read_text(), re.M) for name in ("MAJOR", "MINOR", "PATCH")]
            if all(numbers):
                return "v" + ".".join(number[1] for number in numbers)
    return None


def choose(asked: str | None, found: str | None) -> str:
    """The version to write for: the one asked for, else the installed one, else the newest.

    Raises UserError for one that is not known here, and where another one is installed than asked for.
    """
    if asked is not None:
        load(asked)
        if found in versions() and found != asked:
            raise UserError(f"nemo_rl_version={asked}, but NeMo-RL {found} is installed: leave nemo_rl_version= out")
        return asked
    if found is not None and found not in versions():
        known = ", ".join(versions())
        raise UserError(f"NeMo-RL {found} is installed, whose keys are not known here: nemo_rl_version= takes one of {known}")
    return found or newest()


def check(config: dict, version: str) -> None:
    """Raises UserError, in one line, for the first unknown key (naming the nearest), wrong type or missing key."""
    tree = load(version)
    for path, value in _walk(config, tree):
        _check_value(path, value, tree)
    for path, entry in tree.keys.items():
        section, _, name = path.rpartition(".")
        if entry.get("required") and _open(config, section, tree) and name not in get(config, section):
            raise UserError(f"{PREFIX}{path} is missing, which NeMo-RL {version} needs")


def set_paths(config: dict, paths: dict[str, Any], version: str) -> dict:
    """A copy of `config` with values set by path (`{"grpo.val_period": 5}`), each checked. Raises UserError."""
    tree, changed = load(version), deepcopy(config)
    for path, value in paths.items():
        _check_key(path, tree)
        for inner, each in _walk(value, tree, path) if isinstance(value, dict) else [(path, value)]:
            _check_value(inner, each, tree)
        put(changed, path, value)
    check(changed, version)
    return changed


def get(config: dict, path: str) -> Any:
    """The value at a path; the whole configuration at ""."""
    for name in path.split(".") if path else []:
        config = config[name]
    return config


def put(config: dict, path: str, value: Any) -> None:
    """Set a value by path; sections on the way that are missing or null are made."""
    *sections, name = path.split(".")
    for section in sections:
        if not isinstance(config.get(section), dict):
            config[section] = {}
        config = config[section]
    config[name] = value


def leaves(config: dict, version: str) -> Iterator[tuple[str, Any]]:
    """Every value of a configuration with its path; what lies below a free mapping is one value."""
    tree = load(version)
    return ((path, value) for path, value in _walk(config, tree) if not (isinstance(value, dict) and _is_section(path, tree)))


def _walk(content: dict, tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys with their values, sections before what is in them. Raises UserError at an unknown key."""
    for name, value in content.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        _check_key(path, tree)
        yield path, value
        if isinstance(value, dict) and _is_section(path, tree):
            yield from _walk(value, tree, path)


def _is_section(path: str, tree: Tree) -> bool:
    return path in tree.keys and "section" in tree.keys[path]["type"]


def _free(path: str, tree: Tree) -> bool:
    """Whether the key lies below a mapping of which NeMo-RL says nothing more."""
    parts = path.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any({"dict", "any"} & set(tree.keys.get(each, {"type": []})["type"]) for each in above)


def _check_key(path: str, tree: Tree) -> None:
    if path in tree.keys or _free(path, tree):
        return
    section, _, name = path.rpartition(".")
    beside = [key for key in tree.keys if key.rpartition(".")[0] == section]
    # a typo in the name among its neighbours; the right name in a wrong section; else whatever looks most alike
    near = difflib.get_close_matches(path, beside, n=1, cutoff=0.7)
    near = near or [key for key in tree.keys if key.rpartition(".")[2] == name][:1]
    near = near or difflib.get_close_matches(path, tree.keys, n=1, cutoff=0.0)
    raise UserError(f"{PREFIX}{path} is no key of NeMo-RL {tree.version}, the nearest is {PREFIX}{near[0]}")


def _check_value(path: str, value: Any, tree: Tree) -> None:
    if path not in tree.keys:
        return
    entry = tree.keys[path]
    if not any(_is(value, kind) for kind in entry["type"]):
        wanted = " or ".join(WORDS[kind] for kind in sorted(entry["type"], key=list(WORDS).index))
        raise UserError(f"{PREFIX}{path}={_short(value)} must be {wanted} (NeMo-RL {tree.version})")
    if entry.get("choices") and isinstance(value, str) and value not in entry["choices"]:
        raise UserError(f"{PREFIX}{path}={value} is none of {', '.join(map(str, entry['choices']))} (NeMo-RL {tree.version})")


def _is(value: Any, kind: str) -> bool:
    """Whether YAML's `value` is of a type; a whole number is a number too, true and false are not."""
    if kind == "any":
        return True
    if kind == "null":
        return value is None
    if isinstance(value, bool):
        return kind == "bool"
    python = {"int": int, "float": (int, float), "str": str, "list": list, "dict": dict, "section": dict}
    return kind in python and isinstance(value, python[kind])


def _open(config: dict, section: str, tree: Tree) -> bool:
    """Whether a section is there and in use: one that `enabled: false` closes needs nothing more."""
    try:
        content = get(config, section)
    except (KeyError, TypeError):
        return False
    if not isinstance(content, dict):
        return False
    return not (section and tree.keys[section].get("closable") and content.get("enabled") is False)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}..."


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
