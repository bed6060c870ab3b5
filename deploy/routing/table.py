"""The routing table: which versions there are, and in which order they are asked for a request. Pure data."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploy.limits import read_keys
from nemo_ext.command_line import NO_DEFAULT, fill, key
from nemo_ext.errors import UserError

PREFIX = "versions."
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass
class VersionKeys:
    """What the table says of a version."""

    url: Any = key(NO_DEFAULT, "where its servers are, without /v1: one, several with commas between, or a list")
    weight: float | None = key(None, "its share of the requests; 0: only where no other can answer", auto="1; shadow: none")
    shadow: float | None = key(None, "share of the requests that it gets a copy of; the answers are discarded", auto="none")
    model: str | None = key(None, "what its servers call the model", auto="name=")
    ready: str = key("/ready", "the path that says whether a server takes requests; vLLM and trtllm-serve have /health")
    api_key: str | None = key(None, "a file whose first key its servers are sent", auto="the client's own is passed on")


@dataclass(frozen=True)
class Version:
    """A checked row of the table."""

    name: str
    urls: tuple[str, ...]
    weight: float
    shadow: float
    model: str
    ready: str = "/ready"
    api_key: str | None = None


def split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings that are not of versions, and those of each version. Raises UserError for a version that is no mapping."""
    rest: dict[str, Any] = {}
    versions: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        if path == PREFIX.rstrip("."):
            raise UserError(f"versions={value} holds no versions: versions.NAME.url=http://…")
        if not path.startswith(PREFIX):
            rest[path] = value
            continue
        name, separator, field = path.removeprefix(PREFIX).rpartition(".")
        if not separator or not NAME.match(name):
            raise UserError(f"{path} is not versions.NAME.KEY; a NAME is letters, digits, '.', '_' and '-'")
        versions.setdefault(name, {})[field] = value
    return rest, versions


def read_versions(given: dict[str, dict[str, Any]], model: str) -> tuple[Version, ...]:
    """The rows, checked. `model`: what clients call the model. Raises UserError."""
    versions = tuple(_version(name, keys, model) for name, keys in given.items())
    if not versions:
        raise UserError("there are no versions: versions.NAME.url=http://…; --help shows the keys")
    if not any(version.weight for version in versions):
        raise UserError("no version has a weight above 0: nobody would answer")
    if model in given:
        raise UserError(f"versions.{model} has the name that stands for all versions, name={model}")
    return versions


def share(key: str, version: str) -> float:
    """A number in (0, 1) that `key` and `version` decide, everywhere and always."""
    digest = hashlib.sha256(f"{key}\0{version}".encode("utf-8", "surrogatepass")).digest()
    return ((int.from_bytes(digest[:8], "big") >> 11) + 0.5) / 2**53


def order(versions: Iterable[Version], key: str) -> list[Version]:
    """The versions in the order in which they are asked for a request of `key`; shadows are not among them.

    Weighted rendezvous hashing (Thaler and Ravishankar 1998; weights by exponential variables): the first one is each version
    with a chance proportional to its weight, and so is the second among those left. A changed weight moves only as many keys as
    it must. Versions of weight 0 come last.
    """
    live = [version for version in versions if not version.shadow]
    drawn = {version.name: -math.log(share(key, version.name)) / version.weight for version in live if version.weight}
    return sorted(live, key=lambda version: drawn.get(version.name, math.inf))


def _version(name: str, given: dict[str, Any], model: str) -> Version:
    where = f"{PREFIX}{name}."
    keys = fill(VersionKeys, given, where)
    if keys.shadow is not None:
        if not 0 < keys.shadow <= 1:
            raise UserError(f"{where}shadow={keys.shadow:g} must be above 0 and at most 1")
        if keys.weight is not None:
            raise UserError(f"{where}weight= and shadow= exclude each other: a shadow answers nobody")
    weight = 0.0 if keys.shadow else 1.0 if keys.weight is None else keys.weight
    if not 0 <= weight < math.inf:
        raise UserError(f"{where}weight={weight} must be 0 or more")
    if not keys.ready.startswith("/"):
        raise UserError(f"{where}ready={keys.ready} must begin with /")
    secret = read_keys(Path(keys.api_key))[0] if keys.api_key else None
    return Version(name, _urls(where, keys.url), weight, keys.shadow or 0.0, keys.model or model, keys.ready, secret)


def _urls(where: str, given: Any) -> tuple[str, ...]:
    parts: Sequence = given if isinstance(given, list) else str(given).split(",")
    urls = tuple(str(part).strip().rstrip("/") for part in parts)
    for url in urls:
        try:
            pieces = urlsplit(url)
            bad = pieces.scheme not in ("http", "https") or not pieces.hostname or pieces.query or pieces.fragment
            bad = bad or pieces.port == 0 or any(character.isspace() for character in url)
        except ValueError:
            bad = True
        if bad:
            raise UserError(f"{where}url={url} is no address: http://HOST:PORT")
        if "@" in pieces.netloc:
            raise UserError(f"{where}url= holds a password, which would be shown: a key goes into {where}api_key=FILE")
        if pieces.path.endswith("/v1"):
            raise UserError(f"{where}url={url} ends in /v1: leave that away")
    if not urls or len(set(urls)) < len(urls):
        raise UserError(f"{where}url= names {'a server twice' if urls else 'no server'}")
    return urls
