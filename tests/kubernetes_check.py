"""Objects for Kubernetes against the types of their fields, as launchers/k8s/derive_kubernetes_types.py derives them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TYPES = json.loads((Path(__file__).parent / "launchers/k8s/kubernetes_types.json").read_text())["types"]
SCALARS = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "datetime": str}


def wrong(value: Any, kind: str, where: str = "") -> list[str]:
    """What of `value` is not as the type says."""
    kind = kind.rstrip("!")
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [text for i, each in enumerate(value) for text in wrong(each, match[1], f"{where}[{i}]")]
    if match := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            return [f"{where}: {value!r} is no mapping of texts"]
        return [text for name, each in value.items() for text in wrong(each, match[1], f"{where}.{name}")]
    if kind in TYPES:
        fields = TYPES[kind]
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no {kind}"]
        found = [f"{where}: {kind} has no {name}" for name in value if name not in fields]
        found += [f"{where}: {kind} needs {name}" for name, each in fields.items() if each.endswith("!") and name not in value]
        return found + [text for name in value if name in fields for text in wrong(value[name], fields[name], f"{where}.{name}")]
    fits = isinstance(value, SCALARS[kind]) and (kind == "bool" or not isinstance(value, bool) or kind == "object")
    return [] if fits else [f"{where}: {value!r} is no {kind}"]
