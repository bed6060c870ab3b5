"""The objects that are submitted, against the types of Kubernetes 1.31, Kubeflow's training operator 1.9 and KubeRay 1.4."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from k8s_commands import BARE
from kubernetes_check import TYPES, wrong

from launchers import grammar
from launchers.k8s import keys, manifest, submit
from nemo_ext import kubernetes

# No package of models has KubeRay's. Read from ray-operator/config/crd/bases/ray.io_rayjobs.yaml, version v1; as in the file of
# types, "!" is behind what must be there.
TYPES |= {
    "RayJob": {"apiVersion": "str", "kind": "str", "metadata": "V1ObjectMeta", "spec": "RayJobSpec"},
    "RayJobSpec": {
        "activeDeadlineSeconds": "int", "backoffLimit": "int", "clusterSelector": "dict(str, str)", "deletionStrategy": "object",
        "entrypoint": "str", "entrypointNumCpus": "float", "entrypointNumGpus": "float", "entrypointResources": "str",
        "jobId": "str", "managedBy": "str", "metadata": "dict(str, str)", "rayClusterSpec": "RayClusterSpec",
        "runtimeEnvYAML": "str", "shutdownAfterJobFinishes": "bool", "submissionMode": "str",
        "submitterPodTemplate": "V1PodTemplateSpec", "suspend": "bool", "ttlSecondsAfterFinished": "int",
    },
    "RayClusterSpec": {
        "autoscalerOptions": "object", "enableInTreeAutoscaling": "bool", "headGroupSpec": "RayHeadGroupSpec!",
        "headServiceAnnotations": "dict(str, str)", "rayVersion": "str", "suspend": "bool",
        "workerGroupSpecs": "list[RayWorkerGroupSpec]",
    },
    "RayHeadGroupSpec": {
        "enableIngress": "bool", "rayStartParams": "dict(str, str)!", "serviceType": "str", "template": "V1PodTemplateSpec!",
    },
    "RayWorkerGroupSpec": {
        "groupName": "str!", "maxReplicas": "int!", "minReplicas": "int!", "rayStartParams": "dict(str, str)!", "replicas": "int",
        "template": "V1PodTemplateSpec!",
    },
}  # fmt: skip
ROOTS = {"Job": "V1Job", "ConfigMap": "V1ConfigMap", "PyTorchJob": "KubeflowOrgV1PyTorchJob", "RayJob": "RayJob"}
VERSIONS = {"Job": "batch/v1", "ConfigMap": "v1", "PyTorchJob": "kubeflow.org/v1", "RayJob": "ray.io/v1"}
FULL = [
    "recipe=sft_llama3", "gpus=4", "nodes=3", "model=hf:/models/m", "executor=k8s", "image=r/i:1", "out=/data/runs/My_Run.1",
    "volumes=[c:/data,m:/models:ro,c:/more]", "namespace=team", "context=ctx", "cpus=32", "memory=500Gi", "shm=64Gi",
    "resources=[rdma/ib=4]", "node_selector=[nvidia.com/gpu.product=H100,zone=a]", "tolerations=[gpu=yes:NoSchedule,spot]",
    "priority=high", "queue=team-q", "host_network=true", "interface=bond0", "secrets=[wandb,s3]", "pull_secrets=[ngc]",
    "service_account=trainer", "user=1000", "group=2000", "env.NCCL_DEBUG=INFO", "env.FLAG=true", "python=python3",
    "project=/data/code", "cache=/data/cache", "time=1-02:00:00", "retries=5", "grace=120", "keep_for=60",
    "trainer.strategy.ckpt_parallel_save=false",
]  # fmt: skip
RAY = ["recipe=grpo_llama3", "engine=nemo_rl", "nemo_rl_version=v0.5.0", "nodes=2", *BARE[1:]]


def described(arguments: list[str]) -> manifest.Run:
    command = grammar.parse(arguments)
    return submit.describe(command, keys.build(command.executor_keys))


def objects(arguments: list[str]) -> list[dict[str, Any]]:
    """The objects of a command line, read back from the YAML that is submitted."""
    text = kubernetes.text(manifest.objects(described(arguments)))
    assert "&id" not in text  # everything is written out
    return list(yaml.safe_load_all(text))


VARIANTS = {
    "one pod": BARE,
    "job": [*BARE, "nodes=4"],
    "cpu": ["recipe=cpt_llama3", "gpus=2", "device=cpu", "nodes=2", *BARE[2:]],
    "full job": FULL,
    "pytorchjob": [*BARE, "nodes=4", "kind=pytorchjob"],
    "one-pod pytorchjob": [*BARE, "kind=pytorchjob"],
    "full pytorchjob": [*FULL, "kind=pytorchjob"],
    "rayjob": RAY,
    "full rayjob": [*RAY, *(key for key in FULL if key.split("=")[0] in
                            ("namespace", "cpus", "memory", "resources", "tolerations", "queue", "secrets", "time", "retries"))],
    "embedded GRPO": ["recipe=grpo_llama3", "engine=embedded", "gpus=1", *BARE[2:]],
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_objects_are_what_the_cluster_takes(variant):
    for each in objects(VARIANTS[variant]):
        assert wrong(each, ROOTS[each["kind"]]) == []
        assert each["apiVersion"] == VERSIONS[each["kind"]]


def test_the_check_finds_what_is_wrong():
    job, _ = objects(BARE)
    job["spec"]["template"]["spec"]["containers"][0]["imagePullSecrets"] = []
    job["spec"]["completions"] = "1"
    job["spec"]["parallelism"] = True
    del job["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert [text.split(": ", 1)[1] for text in wrong(job, "V1Job")] == [
        "'1' is no int", "True is no int", "V1Container has no imagePullSecrets",
        "V1PersistentVolumeClaimVolumeSource needs claimName",
    ]  # fmt: skip


def pod_spec(job: dict) -> dict:
    return job["spec"]["template"]["spec"]


def test_a_job_of_several_pods():
    job, config = objects([*BARE, "nodes=4"])
    spec, pod = job["spec"], pod_spec(job)
    (container,) = pod["containers"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"], spec["backoffLimit"]) == (4, 4, "Indexed", 12)
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    codes = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {138: "Ignore", 143: "Ignore", 1: "FailJob", 2: "FailJob"}
    assert container["command"][:3] == ["python", "-m", "launchers.k8s.pod"]
    assert {"run=/data/run", "settings=/etc/llm-builder/settings.yaml", "nodes=4", "processes=8"} <= set(container["command"])
    assert container["workingDir"] == "/opt/llm-builder"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/etc/llm-builder", "/dev/shm"}
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    assert yaml.safe_load(config["data"]["settings.yaml"]) == {
        "recipe": "cpt_llama3", "model": "hf:/data/model", "out": "/data/run", "nodes": 4, "gpus": 8, "device": "gpu",
    }  # fmt: skip


def test_settings_are_a_command_line(tmp_path):
    """What a pod reads is what was asked for, fields of the recipe and sweeps among it."""
    _, config = objects([*BARE, "lr=1e-5", "data=[/data/a:0.7,/data/b:0.3]", "trainer.strategy.ckpt_parallel_save=false"])
    (tmp_path / "settings.yaml").write_text(config["data"]["settings.yaml"])
    command = grammar.parse([f"config={tmp_path / 'settings.yaml'}"])
    assert command.keys["lr"] == 1e-5 and command.keys["data"] == ["/data/a:0.7", "/data/b:0.3"]
    assert command.overrides == {"trainer.strategy.ckpt_parallel_save": False}
    assert command.executor == "local"


def test_one_pod_runs_the_plain_command():
    job, _ = objects(BARE)
    assert pod_spec(job)["containers"][0]["command"] == ["python", "launchers/run.py", "config=/etc/llm-builder/settings.yaml"]
    assert job["spec"]["backoffLimit"] == 3


def test_every_key_arrives():
    job, config = objects(FULL)
    spec, pod = job["spec"], pod_spec(job)
    (container,) = pod["containers"]
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == ("my-run-1", "team")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-q"
    assert (spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"], spec["backoffLimit"]) == (26 * 3600, 60, 15)
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "H100", "zone": "a"}
    assert pod["tolerations"] == [
        {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}, {"key": "spot", "operator": "Exists"},
    ]  # fmt: skip
    assert (pod["priorityClassName"], pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("high", "trainer", 120)
    assert pod["imagePullSecrets"] == [{"name": "ngc"}] and pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (1000, 2000)
    assert container["resources"] == {
        "requests": {"cpu": "32", "memory": "500Gi"}, "limits": {"nvidia.com/gpu": "4", "rdma/ib": "4", "memory": "500Gi"},
    }  # fmt: skip
    assert container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"]}
    assert [each["secretRef"]["name"] for each in container["envFrom"]] == ["wandb", "s3"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment == {
        "POD_IP": None, "PYTHONUNBUFFERED": "1", "LLM_BUILDER_CACHE": "/data/cache", "NCCL_SOCKET_IFNAME": "bond0",
        "GLOO_SOCKET_IFNAME": "bond0", "NCCL_DEBUG": "INFO", "FLAG": "true",
    }  # fmt: skip
    mounts = {mount["mountPath"]: (mount["name"], mount.get("readOnly", False)) for mount in container["volumeMounts"]}
    assert mounts["/data"] == ("volume-0", False) == mounts["/more"] and mounts["/models"] == ("volume-1", True)
    assert {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"][:2]} == {
        "volume-0": "c", "volume-1": "m",
    }  # fmt: skip
    assert pod["volumes"][-1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert container["command"][0] == "python3" and container["workingDir"] == "/data/code"
    assert "ckpt_parallel_save: false" in config["data"]["settings.yaml"]


def test_a_pytorchjob_has_a_master_and_workers():
    job, _ = objects([*BARE, "nodes=4", "kind=pytorchjob"])
    roles = job["spec"]["pytorchReplicaSpecs"]
    assert {name: role["replicas"] for name, role in roles.items()} == {"Master": 1, "Worker": 3}
    for role in roles.values():
        (container,) = role["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # by which the operator finds it
        assert role["restartPolicy"] == "ExitCode" and "restartPolicy" not in role["template"]["spec"]
    assert manifest.AGAIN >= 128 and manifest.STOPPED >= 128 > manifest.REFUSED > manifest.FAILED  # what ExitCode starts again
    alone, _ = objects([*BARE, "kind=pytorchjob"])
    assert list(alone["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_a_rayjob_has_a_pod_a_machine():
    job, config = objects(RAY)
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 1
    assert workers["template"] == cluster["headGroupSpec"]["template"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8" and "command" not in container  # which KubeRay writes
    assert {"name": "PYTHONPATH", "value": "/opt/llm-builder"} in container["env"]
    assert job["spec"]["entrypoint"] == (
        "uv run --directory /opt/nemo-rl python -m launchers.k8s.driver run=/data/run settings=/etc/llm-builder/settings.yaml"
    )
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "nemo_rl_version: v0.5.0" in config["data"]["settings.yaml"]
    alone, _ = objects([key for key in RAY if key != "nodes=2"])
    assert "workerGroupSpecs" not in alone["spec"]["rayClusterSpec"]
