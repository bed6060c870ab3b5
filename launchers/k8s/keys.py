"""The keys of executor=k8s. They say where and how a run is started, never what is learnt, and stay out of its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launchers.slurm.keys import VARIABLE, seconds
from nemo_ext.command_line import check_choice, key, keys_of, texts
from nemo_ext.errors import UserError
from nemo_ext.kubernetes import (
    QUANTITY,
    Mount,
    check_image,
    check_name,
    check_object,
    check_quantities,
    mounts,
    pairs,
    tolerations,
)

JOB, PYTORCHJOB, RAYJOB = KINDS = ("job", "pytorchjob", "rayjob")


@dataclass
class K8sKeys:
    """Every key of executor=k8s, in the order `--help` shows them."""

    image: str | None = key(None, "container image with this project (Dockerfile)", auto="must be given")
    volumes: Any = key(
        None, "persistent volume claims and where they are mounted: [CLAIM:/data,CLAIM:/models:ro]; out= lies in one", auto="none"
    )
    kind: str | None = key(
        None, "what to submit: batch/v1 Job, kubeflow.org/v1 PyTorchJob, ray.io/v1 RayJob", choices=KINDS,
        auto="rayjob for engine=nemo_rl, else job",
    )  # fmt: skip
    name: str | None = key(None, "the job's name, by which launchers/jobs.py finds it", auto="that of the folder out=")
    namespace: str | None = key(None, "namespace", auto="kubectl's own")
    context: str | None = key(None, "context of kubectl's configuration", auto="its current one")

    cpus: str | None = key(None, "cores asked for, a pod", auto="none")
    memory: str | None = key(None, "memory asked for, a pod, such as 500Gi; also its limit", auto="none")
    shm: str = key("16Gi", "most that /dev/shm holds; it counts as the pod's memory")
    resources: Any = key(None, "further resources of a pod: [rdma/ib=8]", auto="none")
    node_selector: Any = key(None, "labels that the machines need: [KEY=VALUE]", auto="none")
    tolerations: Any = key(None, "taints to put up with: [KEY:NoSchedule,KEY=VALUE:NoExecute]", auto="nvidia.com/gpu with GPUs")
    priority: str | None = key(None, "priority class", auto="the cluster's default")
    queue: str | None = key(None, "Kueue's queue", auto="none")
    host_network: bool = key(False, "use the machine's network, which some fabrics need")
    interface: str | None = key(None, "network interface of NCCL's and gloo's sockets", auto="what they find")

    secrets: Any = key(None, "secrets whose entries become environment variables: [wandb]", auto="none")
    pull_secrets: Any = key(None, "secrets that pull the image: [ngc]", auto="none")
    service_account: str | None = key(None, "service account", auto="the default one, without its token")
    user: int | None = key(None, "user id of the processes", auto="the image's")
    group: int = key(1000, "group id that may write to the volumes")
    env: Any = key(None, "environment of all processes, a variable a key: env.NCCL_IB_HCA=mlx5", auto="none")
    python: str = key("python", "Python in the image")
    project: str = key("/opt/llm-builder", "this project's folder in the image, or in a volume")
    cache: str | None = key(None, "folder of converted weights and tokenised text, in a volume", auto="beside the folder out=")

    time: str | None = key(None, "how long the job may take in all: minutes, HH:MM:SS or D-HH:MM:SS", auto="no limit")
    retries: int = key(3, "how often the job starts again after failures without a new checkpoint between them")
    grace: int = key(600, "how long a pod that is told to end may take to save", unit="seconds")
    keep_for: int = key(604800, "how long the finished job and its logs are kept", unit="seconds")

    def mounts(self) -> list[Mount]:
        """The volumes, as they are mounted. Raises UserError."""
        return mounts(self.volumes)

    def pairs(self, name: str) -> dict[str, str]:
        """A key that holds KEY=VALUE texts. Raises UserError."""
        return pairs(name, getattr(self, name))

    def taints(self, gpus: int) -> list[dict[str, str]]:
        """The tolerations. Raises UserError."""
        return tolerations(self.tolerations, gpus)


def build(given: dict[str, Any]) -> K8sKeys:
    """The given keys over the defaults. Raises UserError for what no cluster takes."""
    keys = K8sKeys(**{name: value for name, value in given.items() if value is not None})
    keys.env = keys.env or {}
    for name, field in keys_of(K8sKeys).items():
        value = getattr(keys, name)
        check_choice(name, value, field)
        if isinstance(value, str) and (not value.isprintable() or not value.strip() or value != value.strip()):
            raise UserError(f"{name}={value!r} must be one line of text")
    if keys.image is None:
        raise UserError("image= is missing: a container image with this project, such as one that Dockerfile builds")
    check_image(keys.image)
    for name in ("name", "namespace"):
        if (value := getattr(keys, name)) is not None:
            check_name(name, value)
    for name in ("priority", "service_account", "queue"):
        check_object(name, getattr(keys, name))
    for name in ("secrets", "pull_secrets"):
        for text in texts(name, getattr(keys, name)):
            check_object(name, text)
    check_quantities(keys, ("cpus", "memory", "shm"))
    for name, least in (("retries", 0), ("grace", 1), ("keep_for", 0), ("group", 0), ("user", 0)):
        if (value := getattr(keys, name)) is not None and value < least:
            raise UserError(f"{name}={value} must be {least} or above")
    for name in ("project", "cache"):
        if (value := getattr(keys, name)) is not None and not value.startswith("/"):
            raise UserError(f"{name}={value} must be an absolute path in the container")
    for variable in keys.env:
        if not VARIABLE.fullmatch(variable):
            raise UserError(f"env.{variable}= is no name of an environment variable")
    limit(keys)
    keys.mounts()
    keys.taints(0)
    for name, amount in keys.pairs("resources").items():
        if not QUANTITY.fullmatch(amount):
            raise UserError(f"resources={name}={amount} is no quantity: rdma/ib=8")
    keys.pairs("node_selector")
    return keys


def limit(keys: K8sKeys) -> int | None:
    """`time=` in seconds, or None where there is no limit. Raises UserError."""
    found = seconds("time", keys.time) if keys.time is not None else None
    if found == 0:
        raise UserError(f"time={keys.time} is no time at all")
    return found
