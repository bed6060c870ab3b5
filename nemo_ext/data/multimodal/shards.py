"""Shards: tar files in which neighbours with one name before the first dot are a sample (WebDataset, and Megatron-Energon's).

What a sample is, by its members: `json` with a conversation in any of the formats, or with a caption, or a question and answer;
or `txt`, the caption. Images and sounds are the members that are left. A folder made by `energon prepare` says in
.nv-meta/dataset.yaml which member is what (`field_map`), and in .nv-meta/split.yaml which shards are for training: only these
are read.
"""

from __future__ import annotations

import functools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ext.data.multimodal.formats import FIELDS, Found
from nemo_ext.data.multimodal.media import Location
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import AUDIO, VISION

SUFFIXES = {
    VISION: ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif"),
    AUDIO: ("wav", "flac", "mp3", "ogg", "opus"),
}
TEXTS = ("json", "txt")
LARGEST_MEMBER = 1 << 28
META = ".nv-meta"

_ACCESS = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
# Energon's names of a sample's fields, and ours
_FIELDS = {
    "image": "images", "images": "images", "audio": "audios", "audios": "audios", "caption": "caption", "context": "question",
    "answers": "answer",
}  # fmt: skip


def samples(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the record of each sample of a shard; its media are `Found`. Raises UserError for a broken file."""
    root = _root(path)
    fields = _fields(root) if root else {}
    excluded = _excluded(root) if root else frozenset()
    for name, members in _groups(path):
        if root is None or f"{_name(path, root)}/{name}" not in excluded:
            yield name, _mapped(members, fields, f"{path}, {name}") if fields else _record(members, f"{path}, {name}")


def is_training(path: Path) -> bool:
    """False for a shard that Energon's split keeps for another purpose."""
    root = _root(path)
    split = _yaml(root / META / "split.yaml").get("split_parts") if root else None
    if root is None or not isinstance(split, Mapping):
        return True
    return _name(path, root) in _expanded(split.get("train")) - _excluded(root)


def description(path: Path) -> list[str]:
    """What Energon's files say of a shard's data set, as text."""
    root = _root(path)
    files = [root / META / name for name in ("dataset.yaml", "split.yaml")] if root else []
    return [file.read_text(encoding="utf-8") for file in files if file.is_file()]


def _root(path: Path) -> Path | None:
    """The folder of a data set that Energon prepared and that a shard is in."""
    return next((folder for folder in path.absolute().parents if (folder / META).is_dir()), None)


def _name(path: Path, root: Path) -> str:
    return path.absolute().relative_to(root).as_posix()


@functools.lru_cache(maxsize=16)
def _excluded(root: Path) -> frozenset[str]:
    """Shards, and samples as shard/name."""
    return frozenset(_expanded(_yaml(root / META / "split.yaml").get("exclude")))


def _expanded(patterns: list[str] | None) -> set[str]:
    from braceexpand import braceexpand

    return {name for pattern in patterns or () for name in braceexpand(pattern)}


def _groups(path: Path) -> Iterator[tuple[str, dict[str, Found]]]:
    """Neighbouring members of one name: {suffix: bytes and where they are}."""
    current, members = "", {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if not member.isfile() or not stem or not suffix:
                    continue
                name = f"{folder}/{stem}" if folder else stem
                if name != current and members:
                    yield current, members
                    members = {}
                current = name
                if member.size > LARGEST_MEMBER:
                    raise UserError(f"{path}, {member.name}: {member.size:,} bytes: at most {LARGEST_MEMBER:,} are read")
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                members[suffix.lower()] = Found(data, Location(str(path), member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a whole tar file: {error}") from None
    if members:
        yield current, members


def _record(members: dict[str, Found], place: str) -> dict[str, Any]:
    """A sample without a description: its text by the names of the members, and all its media in their order."""
    record: dict[str, Any] = {}
    if "json" in members:
        content = _json(members["json"], place)
        record = content if isinstance(content, dict) else {"conversations": content}
    elif "txt" in members:
        record = {"caption": _text(members["txt"], place).strip()}
    if "answers" in record and "answer" not in record:
        record["answer"] = _first(record.pop("answers"))
    for modality, suffixes in SUFFIXES.items():
        found = [data for suffix, data in members.items() if suffix.rpartition(".")[2] in suffixes]
        if found:
            for name in FIELDS[modality]:
                record.pop(name, None)  # the names of the members
            record[FIELDS[modality][0]] = found
    return record


def _mapped(members: dict[str, Found], fields: dict[str, str], place: str) -> dict[str, Any]:
    """A sample whose fields are members, or values in members of JSON: "jpg", "json[conversations]"."""
    record: dict[str, Any] = {}
    for field, expression in fields.items():
        values = [_access(members, option.strip(), place) for option in expression.split(",")]
        value = next((each for each in values if each is not None), None)
        if value is None:
            raise UserError(f"{place}: no {expression}, which field_map names as {field}: there are {', '.join(members)}")
        ours = _FIELDS.get(field, field)
        if isinstance(value, Found) and ours not in ("images", "audios"):
            value = _text(value, place).strip()
        record[ours] = _first(value) if ours == "answer" else value
    return record


def _access(members: dict[str, Found], expression: str, place: str) -> Any:
    match = _ACCESS.fullmatch(expression)
    if match is None or match[1] not in members:
        return None
    if not match[2]:
        return members[match[1]]
    value = _json(members[match[1]], place)
    for name in re.findall(r"\[([^\[\]]+)\]", match[2]):
        try:
            value = value[int(name)] if isinstance(value, list) else value[name]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return value


@functools.lru_cache(maxsize=16)
def _fields(root: Path) -> dict[str, str]:
    """`field_map` of an Energon data set; empty without one."""
    found = _yaml(root / META / "dataset.yaml").get("field_map")
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, Mapping) else {}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    return values if isinstance(values, dict) else {}


def _json(found: Found, place: str) -> Any:
    try:
        return json.loads(found.data)
    except ValueError as error:
        raise UserError(f"{place}.json: not JSON: {error}") from None


def _text(found: Found, place: str) -> str:
    try:
        return found.data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{place}: its text is not UTF-8") from None


def _first(value: Any) -> Any:
    """Of several answers to a question the first."""
    return value[0] if isinstance(value, list) and value else value
