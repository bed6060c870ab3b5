"""Writes the Kubernetes objects that serve a model: Deployment, Service, PodDisruptionBudget and HorizontalPodAutoscaler.

python deploy/manifests.py model=hf:/models/llama volumes=[models:/models] image=REGISTRY/llm-builder:1 name=llama out=llama.yaml
kubectl apply --filename llama.yaml

The pods run deploy/serve.py. Paths are the pods', in the claims that volumes= mounts (read-only); nothing is looked up here.
Exit codes: 0 written, 2 bad input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from deploy import serve
from deploy.metrics import PREFIX
from nemo_ext import kubernetes
from nemo_ext.command_line import NO_DEFAULT, key, keys_of, main, texts
from nemo_ext.disk import write_atomic
from nemo_ext.errors import UserError

PORT = 8000
API_KEYS = "/etc/llm-builder/api-keys"  # where the secret is mounted; its entry is a file there
PROJECT = "/opt/llm-builder"
LEAVING = 10  # seconds between a pod's removal from the Service's endpoints, which begins first, and SIGTERM
ENDING = 20  # seconds that the process may take to end after its requests have
PROBE = {"periodSeconds": 10, "timeoutSeconds": 5}
BUSY = 0.75  # share of the rows that run, above which the autoscaler adds pods
EMBEDDED_ROWS = 16


@dataclass(frozen=True)
class Watched:
    """What a backend's server shows of itself: `ready` is a path, the others are metrics by the adapter's names."""

    ready: str
    queue: str
    running: str
    rows: int | None  # sequences that run together where rows= does not say so


# vLLM's names have a colon before the adapter's rule (docs/serving.md): vllm:num_requests_waiting. It answers /health when it is
# ready, and has no /ready. trtllm-serve's /metrics is not Prometheus's format.
BACKENDS = {
    "embedded": Watched("/ready", f"{PREFIX}_queue", f"{PREFIX}_batch", EMBEDDED_ROWS),
    "vllm": Watched("/health", "vllm_num_requests_waiting", "vllm_num_requests_running", None),
}
SERVER = ("adapters", "dtype", "context", "rows", "prefill_tokens", "tp", "pp", "gpu_memory",
          "queue", "max_tokens", "max_body", "body_timeout", "timeout", "drain", "connections")  # fmt: skip


@dataclass
class Own:
    """The command's own keys."""

    model: str = key(NO_DEFAULT, "hf:FOLDER, or a run's folder with its export hf/, as the pods see it")
    image: str = key(NO_DEFAULT, "container image with this project (Dockerfile)")
    name: str = key(NO_DEFAULT, "name of the objects")
    volumes: Any = key(
        None, "persistent volume claims and where they are mounted: [CLAIM:/models]; model= lies in one", auto="none"
    )
    out: str | None = key(None, "file to write", auto="printed")
    namespace: str | None = key(None, "namespace", auto="kubectl's own")
    served: str | None = key(None, "what clients call the model", auto="name=")
    backend: str = key("embedded", "who answers; it must be in the image", choices=tuple(BACKENDS))
    api_keys: str | None = key(None, "a secret, SECRET or SECRET/ENTRY, whose entry has a key a line; the entry's name is keys "
                                     "unless given", auto="everybody is let in")  # fmt: skip
    gpus: int | None = key(None, "GPUs of a pod; 0 is a CPU", auto="tp times pp", group="pods")
    cpus: str | None = key(None, "cores asked for, a pod", auto="none")
    memory: str | None = key(None, "memory asked for, a pod, such as 64Gi; also its limit", auto="none")
    shm: str = key("2Gi", "most that /dev/shm holds; it counts as the pod's memory")
    startup: int = key(1800, "for a pod to load the model", unit="s")
    user: int = key(1000, "user id of the processes; not root")
    group: int = key(1000, "group id of the processes and of what they mount")
    python: str = key("python", "Python in the image")
    project: str = key(PROJECT, "this project's folder in the image, or in a volume")
    node_selector: Any = key(None, "labels that the machines need: [KEY=VALUE]", auto="none")
    tolerations: Any = key(None, "taints to put up with: [KEY:NoSchedule]", auto="nvidia.com/gpu with GPUs")
    priority: str | None = key(None, "priority class", auto="the cluster's default")
    pull_secrets: Any = key(None, "secrets that pull the image: [ngc]", auto="none")
    replicas: int = key(2, "pods, and the fewest that the autoscaler leaves", group="scaling")
    max_replicas: int = key(8, "most pods; replicas= for no autoscaler")
    queue_target: int = key(4, "waiting requests a pod, above which pods are added")
    surge: int = key(1, "pods beyond the wanted ones while a new version rolls out; 0 where no machine is free for one")


def _passed() -> Iterator[tuple[str, Any, Any]]:
    """deploy/serve.py's keys that are this command's too."""
    for name, each in keys_of(serve.Options).items():
        if name in SERVER:
            group = "the server's (python deploy/serve.py --help)" if name == SERVER[0] else ""
            yield name, each.type, field(default=each.default, metadata={**each.metadata, "group": group})


Options = make_dataclass("Options", list(_passed()), bases=(Own,), namespace={"__doc__": "The command's keys."})


def command(options: Own) -> None:
    """Write or print the objects."""
    check(options)
    written = kubernetes.text(objects(options))
    if options.out is None:
        print(written, end="")
        return
    write_atomic(options.out, written)
    print(f"{options.out}: kubectl apply --filename {options.out}")


def objects(options: Own) -> list[dict[str, Any]]:
    """What serves the model, for `kubectl apply`."""
    found = [_deployment(options), _service(options), _budget(options)]
    return found if options.max_replicas == options.replicas else [*found, _autoscaler(options)]


def check(options: Own) -> None:
    """Raises UserError for what no cluster or server takes."""
    for name in keys_of(type(options)):
        value = getattr(options, name)
        if isinstance(value, str) and (not value.isprintable() or not value.strip() or value != value.strip()):
            raise UserError(f"{name}={value!r} must be one line of text")
    kubernetes.check_image(options.image)
    kubernetes.check_name("name", options.name)
    if options.namespace is not None:
        kubernetes.check_name("namespace", options.namespace)
    kubernetes.check_object("priority", options.priority)
    for each in texts("pull_secrets", options.pull_secrets):
        kubernetes.check_object("pull_secrets", each)
    kubernetes.check_quantities(options, ("cpus", "memory", "shm"))
    for name, least in (("startup", 1), ("user", 1), ("group", 0), ("replicas", 1), ("queue_target", 1), ("surge", 0)):
        if getattr(options, name) < least:
            raise UserError(f"{name}={getattr(options, name)} must be {least} or more")
    if options.max_replicas < options.replicas:
        raise UserError(f"max_replicas={options.max_replicas} is below replicas={options.replicas}")
    if not options.project.startswith("/"):
        raise UserError(f"project={options.project} must be an absolute path in the container")
    kubernetes.pairs("node_selector", options.node_selector)
    kubernetes.tolerations(options.tolerations, 0)
    if options.api_keys is not None:
        _secret(options.api_keys)
    _check_server(options)
    _check_paths(options)


def _check_server(options: Own) -> None:
    """Raises UserError for what deploy/serve.py would refuse in the pod."""
    given = {name: getattr(options, name) for name in SERVER}
    serve.check(serve.Options(model=options.model, **given))
    wanted = options.tp * options.pp
    if options.backend == "embedded":
        for name in ("tp", "pp", "gpu_memory"):
            if given[name] != getattr(serve.Options, name):
                raise UserError(f"{name}= is for backend=vllm; the embedded backend runs on one device")
        if _gpus(options) not in (0, 1):
            raise UserError(f"gpus={options.gpus}: the embedded backend runs on one device")
        return
    if _gpus(options) != wanted:
        raise UserError(f"gpus={options.gpus}, but tp={options.tp} times pp={options.pp} is {wanted}")
    own = [name for name in SERVER[SERVER.index("queue") :] if name != "drain" and given[name] != getattr(serve.Options, name)]
    if own:
        raise UserError(f"{own[0]}= is the embedded backend's: vLLM has no such limit")


def _check_paths(options: Own) -> None:
    """Raises UserError for a path that no volume holds."""
    mounts = kubernetes.mounts(options.volumes)
    paths = {"model": [options.model.removeprefix("hf:")], "adapters": []}
    for part in options.adapters.split(",") if options.adapters else ():
        name, separator, folder = part.partition("=")
        if not separator or not name or not folder:
            raise UserError(f"adapters={options.adapters}: {part!r} is not NAME=FOLDER")
        paths["adapters"].append(folder)
    taken = [API_KEYS, "/tmp", "/dev/shm"]
    if inside := next((mount.path for mount in mounts for path in taken if mount.holds(path) or mount.path == path), None):
        raise UserError(f"volumes: {inside} is where the pods have something else")
    for name, each in ((name, path) for name, found in paths.items() for path in found):
        if not each.startswith("/"):
            raise UserError(f"{name}={each} must be an absolute path, as the pods see it: hf:/models/llama")
        if ".." in Path(each).parts or not any(mount.holds(each) for mount in mounts):
            place = each if Path(each).parent == Path("/") else Path(each).parent
            raise UserError(f"{name}={each} lies in none of volumes=: give volumes=[CLAIM:{place}]")


def labels(name: str) -> dict[str, str]:
    """What the pods of a served model are found by. The component tells them from a run's of the same name."""
    return {"app.kubernetes.io/name": "llm-builder", "app.kubernetes.io/instance": name, "app.kubernetes.io/component": "server"}


def _metadata(options: Own) -> dict[str, Any]:
    namespace = {"namespace": options.namespace} if options.namespace else {}
    return {"name": options.name, **namespace, "labels": {**labels(options.name), "app.kubernetes.io/managed-by": "llm-builder"}}


def _deployment(options: Own) -> dict[str, Any]:
    """The pods. With an autoscaler it has no `replicas`, so that applying it again leaves their number alone."""
    fixed = {"replicas": options.replicas} if options.max_replicas == options.replicas else {}
    rolling = {"maxSurge": options.surge, "maxUnavailable": 0 if options.surge else 1}
    spec = {
        **fixed,
        "selector": {"matchLabels": labels(options.name)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": rolling},
        "progressDeadlineSeconds": options.startup + 600,
        "revisionHistoryLimit": 3,
        "template": {"metadata": _pod_metadata(options), "spec": _pod(options)},
    }
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": _metadata(options), "spec": spec}


def _service(options: Own) -> dict[str, Any]:
    ports = [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}]
    spec = {"type": "ClusterIP", "selector": labels(options.name), "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(options), "spec": spec}


def _budget(options: Own) -> dict[str, Any]:
    """One pod at a time is evicted; one that is not ready may always be."""
    spec = {
        "maxUnavailable": 1,
        "selector": {"matchLabels": labels(options.name)},
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": _metadata(options), "spec": spec}


def _autoscaler(options: Own) -> dict[str, Any]:
    """Adds pods while requests wait. How many rows run keeps the pods that work needs once nothing waits any more."""
    watched = BACKENDS[options.backend]
    wanted = [(watched.queue, options.queue_target)]
    if rows := options.rows or watched.rows:
        wanted.append((watched.running, max(1, math.floor(BUSY * rows))))
    metrics = [
        {"type": "Pods", "pods": {"metric": {"name": name}, "target": {"type": "AverageValue", "averageValue": str(target)}}}
        for name, target in wanted
    ]
    behavior = {
        "scaleUp": {"stabilizationWindowSeconds": 30, "policies": [{"type": "Percent", "value": 100, "periodSeconds": 60}]},
        "scaleDown": {"stabilizationWindowSeconds": 600, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 120}]},
    }
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": options.name},
        "minReplicas": options.replicas,
        "maxReplicas": options.max_replicas,
        "metrics": metrics,
        "behavior": behavior,
    }
    return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": _metadata(options), "spec": spec}


def _pod_metadata(options: Own) -> dict[str, Any]:
    """Labels, and the annotations by which common configurations of Prometheus find what to read."""
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORT), "prometheus.io/path": "/metrics"}
    return {"labels": labels(options.name), "annotations": annotations}


def _pod(options: Own) -> dict[str, Any]:
    volumes, mounts = _volumes(options)
    environment = {"PYTHONUNBUFFERED": "1", "HOME": "/tmp", "HF_HUB_OFFLINE": "1"}
    healthy = {"path": "/health", "port": "http"}
    container = {
        "name": "server",
        "image": options.image,
        "command": _command(options),
        "workingDir": options.project,
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": _resources(options),
        "startupProbe": {"httpGet": healthy, **PROBE, "failureThreshold": math.ceil(options.startup / PROBE["periodSeconds"])},
        "livenessProbe": {"httpGet": healthy, **PROBE, "failureThreshold": 12},
        "readinessProbe": {"httpGet": {**healthy, "path": BACKENDS[options.backend].ready}, **PROBE, "periodSeconds": 5,
                           "failureThreshold": 2},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVING)]}}},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels(options.name)},
    }
    optional = {
        "priorityClassName": options.priority,
        "nodeSelector": kubernetes.pairs("node_selector", options.node_selector) or None,
        "tolerations": kubernetes.tolerations(options.tolerations, _gpus(options)) or None,
        "imagePullSecrets": [{"name": name} for name in texts("pull_secrets", options.pull_secrets)] or None,
    }
    security = {
        "runAsNonRoot": True,
        "runAsUser": options.user,
        "runAsGroup": options.group,
        "fsGroup": options.group,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    return {
        **{name: value for name, value in optional.items() if value is not None},
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": LEAVING + math.ceil(options.drain) + ENDING,
        "securityContext": security,
        "topologySpreadConstraints": [spread],
        "containers": [container],
        "volumes": volumes,
    }


def _command(options: Own) -> list[str]:
    """deploy/serve.py, with what was given here."""
    arguments = {"model": options.model, "host": "0.0.0.0", "port": PORT, "backend": options.backend,
                 "name": options.served or options.name}  # fmt: skip
    if options.api_keys is not None:
        arguments["api_keys"] = f"{API_KEYS}/{_secret(options.api_keys)[1]}"
    for name in SERVER:
        value, default = getattr(options, name), getattr(serve.Options, name)
        if value != default and not (name == "drain" and options.backend != "embedded"):
            arguments[name] = value
    return [options.python, "deploy/serve.py", *(f"{name}={value}" for name, value in arguments.items())]


def _resources(options: Own) -> dict[str, Any]:
    gpus = _gpus(options)
    limits = {**({kubernetes.GPU: str(gpus)} if gpus else {}), **({"memory": options.memory} if options.memory else {})}
    requests = {name: value for name, value in (("cpu", options.cpus), ("memory", options.memory)) if value}
    return {**({"requests": requests} if requests else {}), **({"limits": limits} if limits else {})}


def _volumes(options: Own) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes of a pod, mounts of its container). The claims are mounted read-only: a server writes nothing into them."""
    wanted = kubernetes.mounts(options.volumes)
    claims = list(dict.fromkeys(mount.claim for mount in wanted))
    volumes = [
        {"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}} for i, claim in enumerate(claims)
    ]
    mounts = [{"name": f"volume-{claims.index(mount.claim)}", "mountPath": mount.path, "readOnly": True} for mount in wanted]
    if options.api_keys is not None:
        name, entry = _secret(options.api_keys)
        items = [{"key": entry, "path": entry}]
        volumes.append({"name": "api-keys", "secret": {"secretName": name, "items": items, "defaultMode": 0o440}})
        mounts.append({"name": "api-keys", "mountPath": API_KEYS, "readOnly": True})
    volumes += [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}}]
    mounts += [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]
    return volumes, mounts


def _gpus(options: Own) -> int:
    return options.tp * options.pp if options.gpus is None else options.gpus


def _secret(text: str) -> tuple[str, str]:
    """(secret, entry) that `api_keys=` names. Raises UserError."""
    name, separator, entry = text.partition("/")
    kubernetes.check_object("api_keys", name)
    if separator and not kubernetes.ENTRY.fullmatch(entry):
        raise UserError(f"api_keys={text}: an entry has letters, digits, dots, hyphens and underscores: SECRET/ENTRY")
    return name, entry or "keys"


if __name__ == "__main__":
    example = "python deploy/manifests.py model=hf:/models/llama volumes=[models:/models] image=IMAGE name=llama"
    sys.exit(main(Options, command, sys.argv[1:], about=__doc__, example=example))
