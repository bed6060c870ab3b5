"""What `data=` means: files, folders and globs of them, Hugging Face data sets, and the built-in `python-docs`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nemo_ext.errors import UserError

SUFFIXES = {
    "text": (".txt", ".text", ".md", ".markdown", ".rst"),
    "lines": (".jsonl", ".ndjson"),
    "array": (".json",),
    "table": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "shard": (".tar",),
}
COMPRESSIONS = (".gz", ".zst")
DOCUMENTS = ("text", "lines", "parquet")  # kinds of files that hold texts
RECORDS = ("lines", "array", "table", "parquet")  # kinds of files that hold records of several fields
MEDIA = (*RECORDS, "shard")  # and files that hold media beside records
PROBLEMS = (*RECORDS, "reasoning-gym")  # records, or generated problems
KNOWN = {
    DOCUMENTS: "text (.txt .md .rst), .jsonl (these also .gz or .zst) or .parquet",
    RECORDS: ".jsonl, .json, .csv or .tsv (these also .gz or .zst) or .parquet",
    MEDIA: ".jsonl, .json, .csv or .tsv (these also .gz or .zst), .parquet or .tar",
    PROBLEMS: ".jsonl, .json, .csv or .tsv (these also .gz or .zst) or .parquet",
}

_GLYPHS = re.compile(r"glyphs(:\d+)?")  # with a number of classes
_WEIGHTED = re.compile(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class Source:
    """One element of `data=`.

    `name` is what the person wrote, without the weight. `files` are the files of kind "files", in reading order, and all
    files of a data set folder of kind "dataset". `chosen` is True where one file was named itself: then it may not be empty.
    """

    name: str
    kind: Literal["files", "dataset", "hub", "python-docs", "reasoning-gym", "glyphs"]
    weight: float | None = None
    files: tuple[Path, ...] = field(default=(), repr=False)
    chosen: bool = False


def parse(data: str | Mapping | Iterable, kinds: tuple[str, ...] = DOCUMENTS) -> list[Source]:
    """Read `data=`: one source, or a list of them, each optionally with a weight as in "wiki/:0.7".

    Without weights, sources are blended in proportion to their tokens. With weights, all must carry one; they are relative and
    need not add up to one. A name ending in ":number" that exists on disk as written is a name, not a weight.
    `kinds` are what to read: DOCUMENTS, RECORDS, MEDIA, among which glyphs and glyphs:CLASSES are, or PROBLEMS, among which
    reasoning-gym:TASK:setting=value is one.
    Raises UserError where a source does not exist, matches nothing, or is of an unknown type, and for weights that are not
    positive or not on all sources.
    """
    sources = [_resolve(name, weight, kinds) for name, weight in _items(data)]
    if not sources:
        raise UserError("data= is empty: name a file, a folder, a data set, or python-docs")
    weighted = [s for s in sources if s.weight is not None]
    if weighted and len(weighted) < len(sources):
        bare = next(s for s in sources if s.weight is None)
        raise UserError(f"data=: {bare.name} has no weight but {weighted[0].name} has one: give all sources a weight, or none")
    return sources


def file_kind(path: Path, kinds: tuple[str, ...] = DOCUMENTS) -> str | None:
    """Which of `kinds` a file is by its name, None where it is none of them."""
    suffixes = [s.lower() for s in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    kind = next((kind for kind in kinds if suffixes and suffixes[-1] in SUFFIXES.get(kind, ())), None)
    return None if compressed and kind in ("parquet", "shard") else kind


def _items(data: str | Mapping | Iterable) -> list[tuple[str, float | None]]:
    """Names and weights, from "[a:0.7,b:0.3]", from lists of such strings, and from mappings {name: weight}."""
    if isinstance(data, str):
        text = data.strip()
        parts = text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else [text]
        return [_split_weight(part.strip()) for part in parts if part.strip()]
    if isinstance(data, Mapping):
        return [(str(name), _weight(str(name), weight)) for name, weight in data.items()]
    if isinstance(data, os.PathLike):
        return [(os.fspath(data), None)]
    if not isinstance(data, Iterable):
        raise UserError(f"data={data!r}: give a name or a list of names")
    return [item for element in data for item in _items(element)]


def _split_weight(text: str) -> tuple[str, float | None]:
    match = _WEIGHTED.fullmatch(text)
    if match is None or os.path.exists(text) or _GLYPHS.fullmatch(text):
        return text, None
    return match[1], _weight(match[1], match[2])


def _weight(name: str, value: object) -> float:
    try:
        weight = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"data=: the weight of {name} is {value!r}, not a number") from None
    if not 0 < weight < float("inf"):
        raise UserError(f"data=: the weight of {name} is {value}: it must be positive")
    return weight


def _resolve(name: str, weight: float | None, kinds: tuple[str, ...]) -> Source:
    if name == "python-docs":
        return Source(name, "python-docs", weight)
    if _GLYPHS.fullmatch(name) and "shard" in kinds:
        return Source(name, "glyphs", weight)
    if name.startswith("hf:"):
        if not name[3:].strip(":"):
            raise UserError("data=hf: needs a name, as in hf:wikitext:wikitext-2-raw-v1")
        return Source(name, "hub", weight)
    if name.startswith("reasoning-gym:") and "reasoning-gym" in kinds:
        return Source(name, "reasoning-gym", weight)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return Source(name, "dataset", weight, _sorted(p for p in path.rglob("*") if p.is_file()))
        return Source(name, "files", weight, _folder(path, name, kinds))
    if path.is_file():
        if file_kind(path, kinds) is None:
            raise UserError(f"data={name}: unknown type of file: {KNOWN[kinds]} are read")
        return Source(name, "files", weight, (path,), chosen=True)
    if glob.has_magic(name):
        return Source(name, "files", weight, _glob(path, name, kinds))
    raise UserError(f"data={name}: no such file or folder (a data set of the Hugging Face hub is named hf:{name})")


def _folder(folder: Path, name: str, kinds: tuple[str, ...]) -> tuple[Path, ...]:
    files = _sorted(p for p in folder.rglob("*") if _readable(p, folder, kinds))
    if not files:
        raise UserError(f"data={name}: the folder has no file of a known type: {KNOWN[kinds]}")
    return files


def _glob(pattern: Path, name: str, kinds: tuple[str, ...]) -> tuple[Path, ...]:
    matches = [Path(p) for p in glob.glob(str(pattern), recursive=True)]
    if not matches:
        raise UserError(f"data={name}: nothing matches")
    files = {p for p in matches if p.is_file() and file_kind(p, kinds)}
    files.update(p for folder in matches if folder.is_dir() for p in folder.rglob("*") if _readable(p, folder, kinds))
    if not files:
        raise UserError(f"data={name}: no match is of a known type: {KNOWN[kinds]}")
    return _sorted(files)


def _readable(path: Path, root: Path, kinds: tuple[str, ...]) -> bool:
    """A file of a known type, neither hidden nor in a hidden folder below `root`."""
    known = file_kind(path, kinds) is not None and path.is_file()
    return known and not any(part.startswith(".") for part in path.relative_to(root).parts)


def _sorted(paths: Iterable[Path]) -> tuple[Path, ...]:
    """By path components as bytes, so that the order depends neither on the locale nor on the file system."""
    return tuple(sorted(paths, key=lambda p: [os.fsencode(part) for part in p.parts]))
