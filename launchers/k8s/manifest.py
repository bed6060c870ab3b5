"""The objects of a run, as dictionaries: a pure function of what is asked for.

A run is one Job (batch/v1, indexed where there are several pods), PyTorchJob (kubeflow.org/v1) or RayJob (ray.io/v1), and the
ConfigMap of its settings, which goes with it. Pods find each other through the run's folder in a shared volume
(`launchers/k8s/meeting.py`), so that a Job needs no Service.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from launchers.k8s.keys import JOB, PYTORCHJOB, RAYJOB, K8sKeys, limit
from nemo_ext.command_line import texts
from nemo_ext.kubernetes import GPU

SETTINGS = "/etc/llm-builder"
SETTINGS_FILE = "settings.yaml"
MANAGER = "llm-builder"
CONTAINER = {JOB: "train", PYTORCHJOB: "pytorch", RAYJOB: "ray"}  # the operator looks for "pytorch"
# What a pod's process ends with (launchers/k8s/pod.py), beside 0: complete.
FAILED, REFUSED, AGAIN, STOPPED = 1, 2, 138, 143  # the PyTorchJob operator starts a pod again from 128 on
RAY_KEEPS = 60  # seconds that a finished RayJob keeps its cluster, and so its GPUs


@dataclass(frozen=True)
class Run:
    """What is rendered. `gpus`: of a pod, 0 on CPUs; `processes`: workers of a pod; `attempt`: tells submissions apart."""

    keys: K8sKeys
    kind: str
    name: str
    nodes: int
    gpus: int
    processes: int
    folder: str
    settings: dict[str, Any]
    attempt: str
    nemo_rl_home: str | None = None  # of a RayJob: the folder of NeMo-RL's project in its image


def objects(run: Run) -> list[dict[str, Any]]:
    """The job, then what goes with it."""
    render = {JOB: _job, PYTORCHJOB: _pytorchjob, RAYJOB: _rayjob}[run.kind]
    return [render(run), _config_map(run)]


def labels(name: str) -> dict[str, str]:
    """What all objects of a run, and its pods, are found by."""
    return {"app.kubernetes.io/name": "llm-builder", "app.kubernetes.io/instance": name,
            "app.kubernetes.io/managed-by": MANAGER}  # fmt: skip


def _metadata(run: Run) -> dict[str, Any]:
    own = {"name": run.name, "labels": labels(run.name), "annotations": {"llm-builder/run": run.folder}}
    return {**own, **({"namespace": run.keys.namespace} if run.keys.namespace else {})}


def _config_map(run: Run) -> dict[str, Any]:
    content = yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True, width=1000)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(run), "data": {SETTINGS_FILE: content}}


def _job(run: Run) -> dict[str, Any]:
    """One pod a machine. One that a drained machine or a signal stopped is replaced and not counted; one whose input is refused,
    or that has tried often enough, ends the job."""
    for_good = [REFUSED] if run.nodes == 1 else [FAILED, REFUSED]
    policy = {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": {"containerName": CONTAINER[JOB], "operator": "In", "values": [AGAIN, STOPPED]}},
            {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER[JOB], "operator": "In", "values": for_good}},
        ]
    }
    spec = {
        "completions": run.nodes,
        "parallelism": run.nodes,
        "completionMode": "Indexed",
        "backoffLimit": run.keys.retries * run.nodes,
        "podFailurePolicy": policy,
        "ttlSecondsAfterFinished": run.keys.keep_for,
        **_deadline(run),
        "template": _template(run, "Never", _command(run)),
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _queued(run), "spec": spec}


def _pytorchjob(run: Run) -> dict[str, Any]:
    """A master and workers; the operator numbers the pods, the rest is as in a Job."""
    template = _template(run, None, _command(run))

    def replicas(count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": "ExitCode", "template": template}

    policy = {
        "cleanPodPolicy": "Running", "backoffLimit": run.keys.retries * run.nodes,
        "ttlSecondsAfterFinished": run.keys.keep_for, **_deadline(run),
    }  # fmt: skip
    roles = {"Master": replicas(1), **({"Worker": replicas(run.nodes - 1)} if run.nodes > 1 else {})}
    spec = {"runPolicy": policy, "pytorchReplicaSpecs": roles}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": _queued(run), "spec": spec}


def _rayjob(run: Run) -> dict[str, Any]:
    """A Ray cluster for NeMo-RL, a pod a machine, and the driver on its head."""
    driver = ["uv", "run", "--directory", run.nemo_rl_home, "python", "-m", "launchers.k8s.driver",
              f"run={run.folder}", f"settings={SETTINGS}/{SETTINGS_FILE}"]  # fmt: skip
    template = _template(run, None, None)
    cluster = {"headGroupSpec": {"rayStartParams": {"dashboard-host": "0.0.0.0"}, "template": template}}
    if others := run.nodes - 1:
        cluster["workerGroupSpecs"] = [
            {"groupName": "machines", "replicas": others, "minReplicas": others, "maxReplicas": others, "rayStartParams": {},
             "template": template}
        ]  # fmt: skip
    spec = {
        "entrypoint": shlex.join(driver),
        "backoffLimit": run.keys.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": min(RAY_KEEPS, run.keys.keep_for),
        **_deadline(run),
        "rayClusterSpec": cluster,
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _queued(run), "spec": spec}


def _queued(run: Run) -> dict[str, Any]:
    """A job's metadata, with Kueue's label where it queues."""
    metadata = _metadata(run)
    if run.keys.queue:
        metadata["labels"] = {**metadata["labels"], "kueue.x-k8s.io/queue-name": run.keys.queue}
    return metadata


def _deadline(run: Run) -> dict[str, int]:
    seconds = limit(run.keys)
    return {"activeDeadlineSeconds": seconds} if seconds else {}


def _command(run: Run) -> list[str]:
    """What a pod runs. One pod alone runs the plain command, with executor=local."""
    settings = f"{SETTINGS}/{SETTINGS_FILE}"
    if run.nodes == 1:
        return [run.keys.python, "launchers/run.py", f"config={settings}"]
    return [run.keys.python, "-m", "launchers.k8s.pod", f"run={run.folder}", f"settings={settings}", f"attempt={run.attempt}",
            f"nodes={run.nodes}", f"processes={run.processes}", f"retries={run.keys.retries}"]  # fmt: skip


def _template(run: Run, restart: str | None, command: list[str] | None) -> dict[str, Any]:
    keys = run.keys
    volumes, mounts = _volumes(run)
    container = {
        "name": CONTAINER[run.kind],
        "image": keys.image,
        **({"command": command, "workingDir": keys.project} if command else {}),
        "env": _environment(run),
        **({"envFrom": [{"secretRef": {"name": name}} for name in names]} if (names := texts("secrets", keys.secrets)) else {}),
        "resources": _resources(run),
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    if any(name.startswith("rdma/") for name in keys.pairs("resources")):
        container["securityContext"]["capabilities"] = {"add": ["IPC_LOCK"]}  # memory that the network card reads
    context = {"fsGroup": keys.group, "fsGroupChangePolicy": "OnRootMismatch"}
    optional = {
        "restartPolicy": restart,
        "serviceAccountName": keys.service_account,
        "automountServiceAccountToken": None if keys.service_account else False,
        "priorityClassName": keys.priority,
        "nodeSelector": keys.pairs("node_selector") or None,
        "tolerations": keys.taints(run.gpus) or None,
        "imagePullSecrets": [{"name": name} for name in texts("pull_secrets", keys.pull_secrets)] or None,
        "hostNetwork": True if keys.host_network else None,
        "dnsPolicy": "ClusterFirstWithHostNet" if keys.host_network else None,
    }
    spec = {
        **{name: value for name, value in optional.items() if value is not None},
        "terminationGracePeriodSeconds": keys.grace,
        "enableServiceLinks": False,
        "securityContext": {**({"runAsUser": keys.user} if keys.user is not None else {}), **context},
        "containers": [container],
        "volumes": volumes,
    }
    return {"metadata": {"labels": labels(run.name)}, "spec": spec}


def _resources(run: Run) -> dict[str, Any]:
    keys = run.keys
    limits = {**({GPU: str(run.gpus)} if run.gpus else {}), **keys.pairs("resources")}
    if keys.memory:
        limits["memory"] = keys.memory
    requests = {name: value for name, value in (("cpu", keys.cpus), ("memory", keys.memory)) if value}
    return {**({"requests": requests} if requests else {}), **({"limits": limits} if limits else {})}


def _environment(run: Run) -> list[dict[str, Any]]:
    keys = run.keys
    cache = keys.cache or str(PurePosixPath(run.folder).parent / "llm-builder-cache")
    values = {"PYTHONUNBUFFERED": "1", "LLM_BUILDER_CACHE": cache}
    if run.kind == RAYJOB:
        values["PYTHONPATH"] = keys.project
    if keys.interface:
        values |= {"NCCL_SOCKET_IFNAME": keys.interface, "GLOO_SOCKET_IFNAME": keys.interface}
    own_address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    return [own_address, *({"name": name, "value": value} for name, value in {**values, **keys.env}.items())]


def _volumes(run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes of a pod, mounts of its container). A claim that is mounted twice is one volume."""
    keys = run.keys
    claims = list(dict.fromkeys(mount.claim for mount in keys.mounts()))
    volumes = [{"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": claim}} for i, claim in enumerate(claims)]
    mounts = [
        {
            "name": f"volume-{claims.index(mount.claim)}",
            "mountPath": mount.path,
            **({"readOnly": True} if mount.read_only else {}),
        }
        for mount in keys.mounts()
    ]
    volumes += [{"name": "settings", "configMap": {"name": run.name}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": keys.shm}}]  # fmt: skip
    mounts += [{"name": "settings", "mountPath": SETTINGS, "readOnly": True}, {"name": "shm", "mountPath": "/dev/shm"}]
    return volumes, mounts
