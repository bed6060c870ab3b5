"""Writes kubernetes_types.json: which fields Kubernetes' objects have, of which types, and which must be there.

    pip install --no-deps --target DIR kubernetes kubeflow-training
    python tests/launchers/k8s/derive_kubernetes_types.py DIR

Read from the models of those two packages (Apache-2.0), which OpenAPI Generator writes from the API's own description. Types that
the roots do not reach, and what only the cluster writes (status), are left out.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path

ROOTS = ("V1Job", "V1ConfigMap", "V1PodTemplateSpec", "KubeflowOrgV1PyTorchJob",
         "V1Deployment", "V1Service", "V1PodDisruptionBudget", "V2HorizontalPodAutoscaler")  # fmt: skip
PACKAGES = {"kubernetes": "kubernetes/client/models", "kubeflow-training": "kubeflow/training/models"}


def main(folder: Path) -> None:
    """Read the models below `folder` and write the file beside this one."""
    texts = {}
    for models in PACKAGES.values():
        for file in (folder / models).glob("*.py"):
            if match := re.search(r"^class (\w+)\(object\)", text := file.read_text(), re.M):
                texts[match[1]] = text
    types, waiting = {}, list(ROOTS)
    while waiting:
        if (name := waiting.pop()) in types or name not in texts:
            continue
        types[name] = fields(texts[name])
        waiting += [word for kind in types[name].values() for word in re.findall(r"\w+", kind)]
    versions = {each.metadata["Name"]: each.version for each in metadata.distributions(path=[str(folder)])}
    content = {"from": {name: versions[name] for name in PACKAGES}, "types": dict(sorted(types.items()))}
    Path(__file__).with_name("kubernetes_types.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


def fields(text: str) -> dict[str, str]:
    """A model's fields by their name in JSON: the type, with "!" behind it where the field must be there."""
    found = {}
    for block in ("openapi_types", "attribute_map"):
        body = re.search(rf"{block} = \{{(.*?)\n    \}}", text, re.S)[1]
        found[block] = dict(re.findall(r"'(\w+)': '([^']+)'", body))
    needed = set(re.findall(r"Invalid value for `(\w+)`, must not be `None`", text))
    return {
        found["attribute_map"][name]: kind + ("!" if name in needed else "")
        for name, kind in found["openapi_types"].items()
        if not (name == "status" and "kind" in found["attribute_map"])
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
