"""What every command that writes Kubernetes objects shares: its names and quantities, volumes, tolerations, and YAML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from nemo_ext.command_line import texts
from nemo_ext.errors import UserError

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # RFC 1123
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
QUALIFIED = re.compile(rf"({SUBDOMAIN.pattern}/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")  # keys of labels, resources, taints
VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
ENTRY = re.compile(r"(?!\.\.)[-A-Za-z0-9_.]*[-A-Za-z0-9_][-A-Za-z0-9_.]*")  # of a secret or a ConfigMap
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
# A suffix tells an object's pods apart ("-worker-99", or a random one); a pod's host name has 63 characters at most.
LONGEST_NAME = 40
GPU = "nvidia.com/gpu"


class _Dumper(yaml.SafeDumper):
    """YAML for people: lines of a text as lines, and what stands twice written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


@dataclass(frozen=True)
class Mount:
    """A persistent volume claim and where the pods see it."""

    claim: str
    path: str
    read_only: bool = False

    def holds(self, path: str) -> bool:
        """Whether a path lies in it."""
        return PurePosixPath(path).is_relative_to(self.path)


def text(documents: list[dict[str, Any]]) -> str:
    """Objects as YAML."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def mounts(value: Any) -> list[Mount]:
    """The volumes that `volumes=` names, as they are mounted. Raises UserError."""
    found = [_mount(each) for each in texts("volumes", value)]
    paths = [mount.path for mount in found]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"volumes: {twice} is given twice")
    if "/" in paths:
        raise UserError("volumes: / is the image's own")
    return found


def pairs(name: str, value: Any) -> dict[str, str]:
    """What a key holds that is KEY=VALUE texts. Raises UserError."""
    found = {}
    for each in texts(name, value):
        left, separator, right = each.partition("=")
        if not separator or not QUALIFIED.fullmatch(left) or not VALUE.fullmatch(right):
            raise UserError(f"{name}={each}: give KEY=VALUE, such as {'rdma/ib=8' if name == 'resources' else 'zone=a'}")
        found[left] = right
    return found


def tolerations(value: Any, gpus: int) -> list[dict[str, str]]:
    """The tolerations that `tolerations=` names; without it, that of machines with GPUs for a pod with any. Raises UserError."""
    if value is None and gpus:
        return [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    return [_toleration(each) for each in texts("tolerations", value)]


def check_name(key_name: str, name: str) -> None:
    """Refuse a name that Kubernetes does not take for what has pods, or for a namespace. Raises UserError."""
    longest = LONGEST_NAME if key_name == "name" else 63
    if not LABEL.fullmatch(name) or len(name) > longest or (key_name == "name" and name[0].isdigit()):
        raise UserError(
            f"{key_name}={name}: Kubernetes takes up to {longest} lower-case letters, digits and hyphens, a letter first and no "
            "hyphen last"
        )


def check_object(key_name: str, name: str | None) -> None:
    """Refuse a name that Kubernetes does not take for an object without pods. Raises UserError."""
    if name is not None and (not SUBDOMAIN.fullmatch(name) or len(name) > 253):
        raise UserError(f"{key_name}={name}: Kubernetes takes lower-case letters, digits, dots and hyphens")


def check_image(image: str) -> None:
    """Refuse what is no image's name. Raises UserError."""
    if re.search(r"\s", image):
        raise UserError(f"image={image} is no image's name")


def check_quantities(keys: Any, names: Sequence[str]) -> None:
    """Refuse fields of `keys` that are no quantities. Raises UserError."""
    for name in names:
        if (value := getattr(keys, name)) is not None and not QUANTITY.fullmatch(value):
            raise UserError(f"{name}={value} is no quantity: 16, 500m, 500Gi")


def _mount(text: str) -> Mount:
    claim, _, rest = text.partition(":")
    path, _, mode = rest.partition(":")
    if not SUBDOMAIN.fullmatch(claim) or not path.startswith("/") or ":" in path or mode not in ("", "ro"):
        raise UserError(f"volumes={text}: give CLAIM:/path, or CLAIM:/path:ro")
    return Mount(claim, str(PurePosixPath(path)), mode == "ro")


def _toleration(text: str) -> dict[str, str]:
    taint, _, effect = text.partition(":")
    name, equals, value = taint.partition("=")
    if not QUALIFIED.fullmatch(name) or not VALUE.fullmatch(value) or effect not in ("", *EFFECTS):
        raise UserError(f"tolerations={text}: give KEY, KEY:EFFECT or KEY=VALUE:EFFECT; effects are {', '.join(EFFECTS)}")
    found = {"key": name, **({"operator": "Equal", "value": value} if equals else {"operator": "Exists"})}
    return {**found, "effect": effect} if effect else found
