"""The objects that serve a model: their types, their whole text, what of them agrees with the server, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubernetes_check import wrong

from deploy import manifests, metrics, serve
from nemo_ext import kubernetes
from nemo_ext.command_line import parse
from nemo_ext.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden")
ROOTS = {"Deployment": "V1Deployment", "Service": "V1Service", "PodDisruptionBudget": "V1PodDisruptionBudget",
         "HorizontalPodAutoscaler": "V2HorizontalPodAutoscaler"}  # fmt: skip
VERSIONS = {"Deployment": "apps/v1", "Service": "v1", "PodDisruptionBudget": "policy/v1",
            "HorizontalPodAutoscaler": "autoscaling/v2"}  # fmt: skip
BARE = ["model=hf:/models/llama", "volumes=[models:/models]", "image=registry.example/llm-builder:1", "name=llama"]
FULL = [
    BARE[0], *BARE[2:], "volumes=[models:/models:ro,lora:/lora,models:/more]", "namespace=team", "served=Llama-3",
    "api_keys=clients/tokens",
    "cpus=8", "memory=64Gi", "shm=8Gi", "startup=605", "user=2000", "group=3000", "python=python3", "project=/lora/code",
    "node_selector=[zone=a]", "tolerations=[gpu=yes:NoSchedule]", "priority=high", "pull_secrets=[ngc]", "replicas=3",
    "max_replicas=9", "queue_target=2", "surge=0", "adapters=polite=/lora/polite,terse=/lora/terse", "dtype=bfloat16",
    "context=2048", "rows=32", "prefill_tokens=256", "queue=10", "max_tokens=500", "max_body=1.5", "body_timeout=5", "timeout=50",
    "drain=30.5", "connections=99",
]  # fmt: skip
VLLM = [*BARE, "backend=vllm", "tp=4", "pp=2", "rows=64", "gpu_memory=0.9"]
VARIANTS = {
    "bare": BARE,
    "full": FULL,
    "vllm": VLLM,
    "cpu": [*BARE, "gpus=0", "max_replicas=2", "dtype=float32"],
}


def options(arguments: list[str]):
    return parse(manifests.Options, arguments, "")


def objects(arguments: list[str]) -> dict[str, dict]:
    """The objects by kind, read back from the YAML."""
    asked = options(arguments)
    manifests.check(asked)
    return {each["kind"]: each for each in yaml.safe_load_all(kubernetes.text(manifests.objects(asked)))}


def pod(found: dict[str, dict]) -> dict:
    return found["Deployment"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_objects_are_what_the_cluster_takes(variant):
    found = objects(VARIANTS[variant])
    assert set(found) == set(ROOTS) - ({"HorizontalPodAutoscaler"} if variant == "cpu" else set())
    for kind, each in found.items():
        assert wrong(each, ROOTS[kind]) == []
        assert each["apiVersion"] == VERSIONS[kind]


def test_the_check_finds_what_is_wrong():
    found = objects(BARE)
    found["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["target"]["averageValue"] = 4
    del found["HorizontalPodAutoscaler"]["spec"]["maxReplicas"]
    found["Service"]["spec"]["ports"][0]["containerPort"] = 8000
    messages = [text.split(": ", 1)[1] for kind, each in found.items() for text in wrong(each, ROOTS[kind])]
    assert messages == ["V1ServicePort has no containerPort", "V2HorizontalPodAutoscalerSpec needs maxReplicas", "4 is no str"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(variant):
    """The whole text: what `kubectl apply` gets changes on purpose only."""
    asked = options(VARIANTS[variant])
    manifests.check(asked)
    assert kubernetes.text(manifests.objects(asked)) == (GOLDEN / f"serve_{variant}.yaml").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_finds_the_same_pods(variant):
    found = objects(VARIANTS[variant])
    template = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [found["Deployment"]["spec"]["selector"]["matchLabels"], found["Service"]["spec"]["selector"],
                 found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]]  # fmt: skip
    assert all(selector and selector.items() <= template.items() for selector in selectors)
    assert template["app.kubernetes.io/component"] == "server"  # a training run of this name has no such label
    (container,) = pod(found)["containers"]
    (port,) = container["ports"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert f"port={port['containerPort']}" in container["command"]
    if variant != "cpu":
        target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": found["Deployment"]["metadata"]["name"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_server_takes_its_command_line(variant):
    """What the pod runs is a command line of deploy/serve.py that says what was asked for here."""
    asked, found = options(VARIANTS[variant]), objects(VARIANTS[variant])
    (container,) = pod(found)["containers"]
    python, script, *arguments = container["command"]
    assert (python, script) == (asked.python, "deploy/serve.py") and container["workingDir"] == asked.project
    served = parse(serve.Options, arguments, "")
    serve.check(served)
    same = [name for name in manifests.SERVER if name != "drain" or asked.backend == "embedded"]
    assert {name: getattr(served, name) for name in same} == {name: getattr(asked, name) for name in same}
    assert (served.model, served.host, served.backend) == (asked.model, "0.0.0.0", asked.backend)


def test_the_metrics_are_the_servers():
    """The autoscaler's names are among those that the embedded server exposes."""
    wanted = {manifests.BACKENDS["embedded"].queue, manifests.BACKENDS["embedded"].running}
    assert wanted == {f"{metrics.PREFIX}_queue", f"{metrics.PREFIX}_batch"}
    assert {"queue", "batch"} <= set(metrics.GAUGES)
    found = objects([*BARE, "rows=32"])["HorizontalPodAutoscaler"]["spec"]["metrics"]
    values = {each["pods"]["metric"]["name"]: each["pods"]["target"]["averageValue"] for each in found}
    assert values == {"llm_builder_queue": "4", "llm_builder_batch": "24"}
    annotations = objects(BARE)["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] == "/metrics" and annotations["prometheus.io/port"] == "8000"


def test_the_rows_are_the_servers():
    """Where rows= is not given, the target is of the server's own default."""
    assert f"rows=options.rows or {manifests.EMBEDDED_ROWS}" in (ROOT / "deploy/serve.py").read_text()


@pytest.mark.parametrize("drain", [0, 30.5, 600])
def test_a_pod_ends_after_its_requests(drain):
    found = pod(objects([*BARE, f"drain={drain}"]))
    (container,) = found["containers"]
    (sleep, seconds) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep" and found["terminationGracePeriodSeconds"] >= int(seconds) + drain + 10


def test_probes():
    (container,) = pod(objects([*BARE, "startup=605"]))["containers"]
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    start = container["startupProbe"]
    assert start["failureThreshold"] * start["periodSeconds"] >= 605
    served = (ROOT / "deploy/server.py").read_text()
    assert all(re.search(rf'@app.get\("{path}"\)', served) for path in (*paths.values(), "/metrics"))
    (container,) = pod(objects(VLLM))["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"  # vLLM has no /ready


def test_no_root_and_nothing_written():
    found = pod(objects(FULL))
    (container,) = found["containers"]
    assert found["securityContext"]["runAsNonRoot"] and found["securityContext"]["runAsUser"] == 2000
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {"/models": True, "/lora": True, "/more": True, manifests.API_KEYS: True, "/tmp": False, "/dev/shm": False}
    volumes = {volume["name"]: volume for volume in found["volumes"]}
    assert len(volumes) == 5 and {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}


def test_the_keys_are_a_file_of_the_secret():
    found = pod(objects([*BARE, "api_keys=clients/tokens.txt"]))
    (container,) = found["containers"]
    (secret,) = [volume["secret"] for volume in found["volumes"] if "secret" in volume]
    assert secret == {"secretName": "clients", "items": [{"key": "tokens.txt", "path": "tokens.txt"}], "defaultMode": 0o440}
    assert f"api_keys={manifests.API_KEYS}/tokens.txt" in container["command"]
    (container,) = pod(objects([*BARE, "api_keys=clients"]))["containers"]
    assert f"api_keys={manifests.API_KEYS}/keys" in container["command"]
    assert not any("api_keys" in word for word in pod(objects(BARE))["containers"][0]["command"])


def test_devices():
    def limits(*keys: str) -> dict:
        return pod(objects([*BARE, *keys]))["containers"][0]["resources"].get("limits", {})

    assert limits() == {"nvidia.com/gpu": "1"} and limits("gpus=0") == {}
    assert limits("backend=vllm", "tp=4", "pp=2") == {"nvidia.com/gpu": "8"}
    assert "tolerations" in pod(objects(BARE)) and "tolerations" not in pod(objects([*BARE, "gpus=0"]))


def test_replicas():
    assert "replicas" not in objects(BARE)["Deployment"]["spec"]  # the autoscaler's
    fixed = objects([*BARE, "replicas=1", "max_replicas=1"])
    assert fixed["Deployment"]["spec"]["replicas"] == 1 and "HorizontalPodAutoscaler" not in fixed
    rolling = [objects([*BARE, f"surge={n}"])["Deployment"]["spec"]["strategy"]["rollingUpdate"] for n in (0, 2)]
    assert rolling == [{"maxSurge": 0, "maxUnavailable": 1}, {"maxSurge": 2, "maxUnavailable": 0}]


@pytest.mark.parametrize(
    "keys, words",
    [
        (["model=hf:models/llama"], "model=models/llama must be an absolute path"),
        (["model=hf:/other/llama"], r"lies in none of volumes=: give volumes=\[CLAIM:/other\]"),
        (["model=hf:/llama"], r"give volumes=\[CLAIM:/llama\]"),
        (["model=hf:/models/../etc"], "lies in none"),
        (["adapters=polite"], "is not NAME=FOLDER"),
        (["adapters=polite=/lora/p"], "adapters=/lora/p lies in none"),
        (["volumes=[models]"], "give CLAIM:/path"),
        (["volumes=[models:/models,x:/tmp]"], "/tmp is where the pods have something else"),
        (["volumes=[models:/models,x:/etc]"], "/etc is where the pods have something else"),
        (["name=Llama"], "lower-case letters"),
        (["name=" + "a" * 41], "up to 40"),
        (["image=a b"], "no image's name"),
        (["namespace=x_y"], "lower-case letters"),
        (["memory=lots"], "no quantity"),
        (["user=0"], "user=0 must be 1 or more"),
        (["max_replicas=1"], "below replicas=2"),
        (["surge=-1"], "0 or more"),
        (["startup=0"], "1 or more"),
        (["api_keys=a/b/c"], "SECRET/ENTRY"),
        (["api_keys=a/.."], "SECRET/ENTRY"),
        (["project=code"], "absolute path"),
        (["rows=0"], "1 or more"),
        (["drain=-1"], "0 or more"),
        (["tp=2"], "tp= is for backend=vllm"),
        (["gpus=2"], "one device"),
        (["backend=vllm", "tp=2", "gpus=4"], "tp=2 times pp=1 is 2"),
        (["backend=vllm", "queue=5"], "queue= is the embedded backend's"),
        (["backend=trtllm"], "none of embedded, vllm"),
        (["tolerations=[x:Never]"], "effects are"),
        (["replica=3"], "did you mean replicas"),
        (['served="a\\nb"'], "one line"),
    ],
)
def test_refused(keys, words):
    given = {each.partition("=")[0]: each for each in [*BARE, *keys]}
    with pytest.raises(UserError, match=words):
        manifests.check(options(list(given.values())))


def test_the_command(tmp_path):
    out = tmp_path / "llama.yaml"
    run = subprocess.run([sys.executable, "deploy/manifests.py", *BARE, f"out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == f"{out}: kubectl apply --filename {out}\n"
    assert out.read_text() == (GOLDEN / "serve_bare.yaml").read_text()
    run = subprocess.run([sys.executable, "deploy/manifests.py", "model=hf:/x"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: image= is missing") and run.stderr.count("\n") == 1
