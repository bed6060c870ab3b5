"""Submitting a run to Kubernetes: its objects, checks against the cluster, and what is written down on this machine.

What the keys name (`model=`, `data=`, `out=`) lies in the cluster's volumes and not here: it is read when the job prepares, and a
job whose input is refused ends at once. Only what this machine can know is checked before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

import recipes
from launchers import registry
from launchers.grammar import Command
from launchers.k8s import keys, manifest
from launchers.k8s.keys import JOB, PYTORCHJOB, RAYJOB, K8sKeys
from launchers.k8s.kubectl import Kubectl
from launchers.k8s.manifest import Run
from nemo_ext import kubernetes, run_folder
from nemo_ext.command_line import texts
from nemo_ext.disk import write_atomic
from nemo_ext.errors import RunError, UserError
from recipes.grpo import GrpoKeys

GROUPS = {
    PYTORCHJOB: ("kubeflow.org", "pytorchjobs.kubeflow.org", "Kubeflow's training operator"),
    RAYJOB: ("ray.io", "rayjobs.ray.io", "KubeRay"),
}
RESOURCES = {JOB: "jobs.batch", PYTORCHJOB: "pytorchjobs.kubeflow.org", RAYJOB: "rayjobs.ray.io"}
RECORD, COMMAND = "submission.json", "command.yaml"  # what was submitted, and the keys that say it again


def submit(command: Command) -> int:
    """Submit the run that a command describes. Returns the exit code."""
    if command.plan:
        raise UserError("plan=true plans here and submits nothing: give it without executor=, with gpu= or gpu_memory=")
    run = describe(command, keys.build(command.executor_keys))
    if command.dryrun:
        print(kubernetes.text(manifest.objects(run)), end="")
        return 0
    send(run)
    return 0


def describe(command: Command, own: K8sKeys) -> Run:
    """What is submitted. Raises UserError."""
    wanted = recipes.resolve(command.recipe, command.keys, cuda=True)
    engine = wanted["engine"] if recipes.schema(command.recipe) is GrpoKeys else None
    if wanted["gpus"] is None:
        raise UserError("gpus= is missing: how many GPUs a pod has, or with device=cpu how many processes")
    kind = _kind(own, engine)
    nodes = wanted["nodes"]
    if nodes > 1 and command.sweep:
        raise UserError(f"nodes={nodes}: with executor=k8s a sweep's points run one after the other in one pod: nodes=1")
    if command.sweep:
        from launchers import sweep

        sweep.expand(command)
    out = _out(command, own)
    if command.keys.get("model") is None and command.keys.get("tokenizer") is None and not command.sweep:
        from launchers import submission

        submission.describe(command)  # nothing in it lies in a volume: what is wrong is seen here
    settings = {
        "recipe": command.recipe,
        **command.keys,
        "nodes": nodes,
        "gpus": wanted["gpus"],
        "device": wanted["device"],
        "out": out,
    }
    home = None
    if kind == RAYJOB:
        from launchers.nemo_rl_engine import HOME as home
        from nemo_ext.grpo.nemo_rl import tree

        settings["nemo_rl_version"] = tree.choose(wanted["nemo_rl_version"], None)
    settings |= command.overrides | {f"sweep.{name}": values for name, values in command.sweep.items()}
    name = own.name or _name(out)
    kubernetes.check_name("name", name)
    gpus = wanted["gpus"] if wanted["device"] == "gpu" else 0
    return Run(
        keys=own, kind=kind, name=name, nodes=nodes, gpus=gpus, processes=wanted["gpus"], folder=out, settings=settings,
        attempt=_attempt(), nemo_rl_home=home,
    )  # fmt: skip


def send(run: Run) -> None:
    """Check a run against the cluster, create its objects, and write down here how to find it. Raises UserError, RunError."""
    kubectl = Kubectl(run.keys.context, run.keys.namespace)
    check(kubectl, run)
    registry.refuse_other(run.name, _folder(run))
    make_room(kubectl, run)
    create(kubectl, manifest.objects(run))
    _write_down(run)
    print(f"submitted {run.kind} {run.name}: python launchers/jobs.py status {run.name}")


def check(kubectl: Kubectl, run: Run) -> None:
    """Refuse what the cluster does not have. Raises UserError; RunError where the cluster does not answer."""
    if run.kind in GROUPS:
        group, resource, operator = GROUPS[run.kind]
        known = kubectl.run("api-resources", f"--api-group={group}", "--output=name").split()
        if resource not in known:
            raise UserError(f"kind={run.kind}: this cluster has no {resource}, which {operator} brings")
    claims = kubectl.items("persistentvolumeclaims")
    modes = {claim["metadata"]["name"]: claim.get("spec", {}).get("accessModes", []) for claim in claims or []}
    for mount in run.keys.mounts():
        if claims is None:
            break
        if mount.claim not in modes:
            there = f"there are {', '.join(sorted(modes))}" if modes else "there are none"
            raise UserError(f"volumes={mount.claim}:{mount.path}: the namespace has no such persistent volume claim; {there}")
        if run.nodes > 1 and mount.holds(run.folder) and "ReadWriteMany" not in modes[mount.claim]:
            raise UserError(f"volumes={mount.claim}:{mount.path}: out= of several pods lies in a claim that is ReadWriteMany")
    secrets = [*texts("secrets", run.keys.secrets), *texts("pull_secrets", run.keys.pull_secrets)]
    if secrets and (found := kubectl.items("secrets")) is not None:
        there = {secret["metadata"]["name"] for secret in found}
        if missing := next((name for name in secrets if name not in there), None):
            raise UserError(f"secret {missing}: the namespace has no such secret")
    if run.gpus and (machines := kubectl.items("nodes")):
        most = max(int(machine.get("status", {}).get("allocatable", {}).get("nvidia.com/gpu", 0)) for machine in machines)
        if most and run.gpus > most:
            raise UserError(f"gpus={run.gpus}: no machine of this cluster has more than {most}")


def make_room(kubectl: Kubectl, run: Run) -> None:
    """Remove the finished job of this run, if there is one. Raises UserError where another has the name, or it still runs."""
    found = kubectl.get(RESOURCES[run.kind], run.name)
    if found is None:
        return
    metadata = found["metadata"]
    place = (metadata.get("annotations") or {}).get("llm-builder/run")
    if place != run.folder:
        raise UserError(f"name={run.name}: the cluster has such a {run.kind}, of {place or 'someone else'}: give another name=")
    if not finished(found):
        raise UserError(
            f"{run.kind} {run.name} is there and has not ended: python launchers/jobs.py status {run.name}, or cancel it"
        )
    kubectl.run("delete", RESOURCES[run.kind], run.name, "--cascade=foreground", "--wait=true", "--timeout=120s")


def finished(found: dict[str, Any]) -> bool:
    """Whether a job has ended, well or not."""
    status = found.get("status") or {}
    ends = ("Complete", "Failed", "Succeeded")
    if any(each.get("type") in ends and each.get("status") == "True" for each in status.get("conditions") or []):
        return True
    return status.get("jobDeploymentStatus") in ("Complete", "Failed")


def create(kubectl: Kubectl, documents: list[dict[str, Any]]) -> None:
    """Create a job and what goes with it, which goes when the job goes. Pods wait until all is there. Raises RunError."""
    main, *others = documents
    made = json.loads(kubectl.run("create", "--filename=-", "--output=json", given=kubernetes.text([main])))
    owner = {"apiVersion": main["apiVersion"], "kind": main["kind"], "name": made["metadata"]["name"],
             "uid": made["metadata"]["uid"], "blockOwnerDeletion": True}  # fmt: skip
    owned = [{**each, "metadata": {**each["metadata"], "ownerReferences": [owner]}} for each in others]
    try:
        kubectl.run("create", "--filename=-", given=kubernetes.text(owned))
    except RunError:
        kubectl.run("delete", RESOURCES[main["kind"].lower()], main["metadata"]["name"], "--wait=false")
        raise


def load(folder: Path) -> Run:
    """The run of a submission's folder on this machine, as a new attempt. Raises RunError."""
    record = run_folder.read_json(folder / RECORD)
    if record is None:
        raise RunError(f"{folder / RECORD} is not there or not readable")
    return Run(**{**record, "keys": K8sKeys(**record["keys"]), "attempt": _attempt()})


def _folder(run: Run) -> Path:
    """Where this machine writes down what it submitted."""
    return registry.folder().parent / "k8s" / run.name


def _write_down(run: Run) -> None:
    folder = _folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    record = dataclasses.asdict(run)
    run_folder.write_json(folder / RECORD, record)
    own = {name: value for name, value in record["keys"].items() if value is not None and value != {}}
    write_atomic(folder / COMMAND, yaml.safe_dump({**run.settings, **own, "name": run.name}, sort_keys=False, allow_unicode=True))
    registry.enter(run.name, "k8s", folder)


def _kind(own: K8sKeys, engine: str | None) -> str:
    kind = own.kind or (RAYJOB if engine == "nemo_rl" else JOB)
    if (kind == RAYJOB) != (engine == "nemo_rl"):
        raise UserError(f"kind={kind}: engine=nemo_rl, and nothing else, runs as a rayjob")
    return kind


def _out(command: Command, own: K8sKeys) -> str:
    """`out=`, which must lie in a volume that the pods may write. Raises UserError."""
    out = command.keys.get("out")
    if out is None or not out.startswith("/"):
        raise UserError(f"out={out or ''}: with executor=k8s give an absolute path in one of volumes=, which outlives the pods")
    out = os.path.normpath(out)
    holding = [mount for mount in own.mounts() if mount.holds(out)]
    if not holding:
        raise UserError(f"out={out} lies in no volume: volumes=[CLAIM:{PurePosixPath(out).parent}]")
    mount = max(holding, key=lambda each: len(each.path))
    if mount.read_only:
        raise UserError(f"out={out}: volumes={mount.claim}:{mount.path}:ro is mounted to be read")
    if out == mount.path:
        raise UserError(f"out={out} is the volume itself: give a folder in it")
    return out


def _name(out: str) -> str:
    """A job's name from the run's folder."""
    text = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(out).name.lower()).strip("-")
    text = text if text[:1].isalpha() else f"run-{text}"
    return text[: kubernetes.LONGEST_NAME].strip("-")


def _attempt() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
