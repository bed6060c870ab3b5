"""Submitting, with a stand-in for kubectl that remembers what it was given and answers from files."""

from __future__ import annotations

import json
import os
import stat
import sys
from types import SimpleNamespace

import pytest
import yaml
from k8s_commands import BARE

from launchers import registry, run
from launchers.k8s import jobs, submit
from nemo_ext.errors import RunError, UserError

# Answers `get KIND [NAME]` from KIND.json, which is an object, a list, or "forbidden"; the rest is noted in calls.jsonl.
STUB = """#!{python}
import json, sys
from pathlib import Path
here, arguments = Path(__file__).parent, sys.argv[1:]
words = [each for each in arguments if not each.startswith("-")]
given = sys.stdin.read() if "--filename=-" in arguments else None
with open(here / "calls.jsonl", "a") as calls:
    calls.write(json.dumps([arguments, given]) + "\\n")
if words[0] == "get":
    file = here / f"{{words[1]}}.json"
    answer = json.loads(file.read_text()) if file.exists() else None
    if answer == "forbidden":
        sys.exit("Error from server (Forbidden): nodes is forbidden: User cannot list")
    if isinstance(answer, list):
        answer = {{"items": answer}}
    if answer is not None:
        print(json.dumps(answer))
elif words[0] == "api-resources":
    print((here / "crds").read_text() if (here / "crds").exists() else "")
elif words[0] == "create":
    if (here / "down").exists() and len(given.split("kind: ConfigMap")) > 1:
        sys.exit("error: no route to host")
    print(json.dumps({{"metadata": {{"name": "run", "uid": "u-1"}}}}))
elif words[0] == "delete" and words[1] != "pods":
    (here / f"{{words[1]}}.json").unlink(missing_ok=True)
elif words[0] == "logs":
    print("said something")
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster with one claim, c, and a kubectl that is first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kubectl").write_text(STUB.format(python=sys.executable))
    (folder / "kubectl").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def answer(kind: str, value) -> None:
        (folder / f"{kind}.json").write_text(json.dumps(value))

    def calls() -> list[tuple[list[str], str | None]]:
        file = folder / "calls.jsonl"
        return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []

    answer("persistentvolumeclaims", [{"metadata": {"name": "c"}, "spec": {"accessModes": ["ReadWriteMany"]}}])
    return SimpleNamespace(folder=folder, answer=answer, calls=calls)


def changes(cluster) -> list[list[str]]:
    return [call for call, _ in cluster.calls() if call[0] in ("create", "delete")]


def test_a_job_and_what_goes_with_it_are_created(cluster, capsys):
    assert run.main([*BARE, "name=first"]) == 0
    assert "submitted job first: python launchers/jobs.py status first" in capsys.readouterr().out
    job, config = [yaml.safe_load(given) for call, given in cluster.calls() if call[0] == "create"]
    assert (job["kind"], config["kind"]) == ("Job", "ConfigMap")
    assert config["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "run", "uid": "u-1", "blockOwnerDeletion": True}
    ]
    assert registry.find("first").executor == "k8s"


def test_a_dry_run_prints_and_asks_nobody(cluster, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run.main([*BARE, "dryrun=true"]) == 0
    assert [each["kind"] for each in yaml.safe_load_all(capsys.readouterr().out)] == ["Job", "ConfigMap"]
    assert cluster.calls() == [] and registry.entries() == []


def test_what_cannot_be_listed_is_not_checked(cluster):
    for kind in ("persistentvolumeclaims", "nodes", "secrets"):
        cluster.answer(kind, "forbidden")
    assert run.main([*BARE, "secrets=[s]"]) == 0


def test_a_finished_job_makes_room_and_another_does_not(cluster, capsys):
    def job(status: dict, place: str = "/data/run") -> dict:
        return {"kind": "Job", "metadata": {"name": "run", "annotations": {"llm-builder/run": place}}, "status": status}

    cluster.answer("jobs.batch", job({"active": 1}))
    assert run.main(BARE) == 2
    assert "job run is there and has not ended" in capsys.readouterr().err
    cluster.answer("jobs.batch", job({"conditions": [{"type": "Failed", "status": "True"}]}, "/data/other"))
    assert run.main(BARE) == 2
    assert "name=run: the cluster has such a job, of /data/other" in capsys.readouterr().err
    assert changes(cluster) == []
    cluster.answer("jobs.batch", job({"conditions": [{"type": "Failed", "status": "True"}]}))
    assert run.main(BARE) == 0
    assert [call[0] for call in changes(cluster)] == ["delete", "create", "create"]


def test_a_job_without_its_settings_is_taken_back(cluster):
    (cluster.folder / "down").touch()
    assert run.main(BARE) == 1
    assert [call[:3] for call in changes(cluster)][-1] == ["delete", "jobs.batch", "run"]
    assert registry.entries() == []


BAD = {
    "image= is missing": [key for key in BARE if not key.startswith("image")],
    "gpus= is missing": [key for key in BARE if not key.startswith("gpus")],
    "out=: with executor=k8s give an absolute path": [key for key in BARE if not key.startswith("out")],
    "out=runs/a: with executor=k8s give an absolute path": [*BARE[:-1], "out=runs/a"],
    "out=/other/run lies in no volume: volumes=[CLAIM:/other]": [*BARE[:-1], "out=/other/run"],
    "out=/etc/x lies in no volume": [*BARE[:-1], "out=/data/../etc/x"],
    "out=/data is the volume itself": [*BARE[:-1], "out=/data"],
    "is mounted to be read": [*BARE[:-2], "volumes=[c:/data:ro]", "out=/data/run"],
    "volumes=c: give CLAIM:/path": [*BARE[:-2], "volumes=[c]", "out=/data/run"],
    "/data is given twice": [*BARE[:-2], "volumes=[c:/data,d:/data]", "out=/data/run"],
    "no such persistent volume claim; there are c": [*BARE[:-2], "volumes=[d:/data]", "out=/data/run"],
    "Kubernetes takes up to 40 lower-case letters": [*BARE, "name=My_Run"],
    "namespace=Team": [*BARE, "namespace=Team"],
    "memory=lots is no quantity": [*BARE, "memory=lots"],
    "resources=rdma: give KEY=VALUE": [*BARE, "resources=[rdma]"],
    "resources=rdma/ib=x is no quantity": [*BARE, "resources=[rdma/ib=x]"],
    "tolerations=gpu:Never": [*BARE, "tolerations=[gpu:Never]"],
    "time=soon is no duration": [*BARE, "time=soon"],
    "kind=cronjob is none of job, pytorchjob, rayjob": [*BARE, "kind=cronjob"],
    "engine=nemo_rl, and nothing else, runs as a rayjob": [*BARE, "kind=rayjob"],
    "env.9= is no name": [*BARE, "env.9=x"],
    "retries=-1 must be 0 or above": [*BARE, "retries=-1"],
    "secret s: the namespace has no such secret": [*BARE, "secrets=[s]"],
    "gpus=8: no machine of this cluster has more than 4": BARE,
    "this cluster has no pytorchjobs.kubeflow.org, which Kubeflow's training operator brings": [*BARE, "kind=pytorchjob"],
    "plan=true plans here": [*BARE, "plan=true"],
    "a claim that is ReadWriteMany": [*BARE, "nodes=2"],
    "the embedded engine trains on one device": ["recipe=grpo_llama3", "engine=embedded", "nodes=2", *BARE[1:]],
    "a sweep's points run one after the other in one pod": [*BARE, "nodes=2", "sweep.lr=[1e-5,2e-5]"],
    "image= is for executor=k8s, not for executor=local": ["recipe=cpt_llama3", "image=x"],
    "unknown key pullsecrets, did you mean pull_secrets?": [*BARE, "pullsecrets=[x]"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_before_anything_is_created(cluster, capsys, message):
    cluster.answer("nodes", [{"status": {"allocatable": {"nvidia.com/gpu": "4" if "no machine" in message else "8"}}}, {}])
    if "ReadWriteMany" in message:
        cluster.answer("persistentvolumeclaims", [{"metadata": {"name": "c"}, "spec": {"accessModes": ["ReadWriteOnce"]}}])
    assert run.main(BAD[message]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert changes(cluster) == []


def test_without_kubectl(cluster, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run.main(BARE) == 2
    assert "kubectl is not on the PATH" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer(cluster, capsys):
    (cluster.folder / "kubectl").write_text("#!/bin/sh\necho a warning >&2\necho 'Unable to connect to the server' >&2\nexit 1\n")
    assert run.main(BARE) == 1
    assert capsys.readouterr().err == "error: kubectl get: Unable to connect to the server\n"


@pytest.fixture
def entry(cluster):
    assert run.main([*BARE, "name=mine", "namespace=team", "context=far", "retries=2"]) == 0
    return registry.find("mine")


def test_status_says_what_pods_wait_for(cluster, entry):
    assert jobs.status(entry) == ["job mine, run /data/run: not on the cluster (any more)"]
    cluster.answer("jobs.batch", {"kind": "Job", "metadata": {"name": "mine"}, "status": {"active": 2, "ready": 1}})
    cluster.answer("pods", [
        {"metadata": {"name": "mine-1-b"}, "status": {"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "Insufficient nvidia.com/gpu"}]}},
        {"metadata": {"name": "mine-0-a"}, "spec": {"nodeName": "n1"}, "status": {"phase": "Pending", "containerStatuses": [
            {"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}},
    ])  # fmt: skip
    assert jobs.status(entry) == [
        "job mine, run /data/run: 2 pods active, 1 pods ready",
        "  mine-0-a  Pending  n1  ImagePullBackOff",
        "  mine-1-b  Pending  -  Insufficient nvidia.com/gpu",
    ]
    assert cluster.calls()[-1][0][:4] == ["--context=far", "--namespace=team", "get", "pods"]


@pytest.mark.parametrize("kind, status, text", [
    ("Job", {"conditions": [{"type": "Complete", "status": "True"}]}, "Complete"),
    ("Job", {"conditions": [{"type": "Failed", "status": "True", "message": "code 2"}]}, "Failed (code 2)"),
    ("Job", {}, "waiting"),
    ("PyTorchJob", {"conditions": [{"type": "Created", "status": "True"}, {"type": "Running", "status": "True"}]}, "Running"),
    ("RayJob", {"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}, "Running, PENDING"),
])  # fmt: skip
def test_states(entry, kind, status, text):
    found = {"kind": kind, "metadata": {}, "status": status}
    assert jobs.status_lines(submit.load(entry.folder), found, []) == [f"job mine, run /data/run: {text}"]


def test_logs_are_the_pods(cluster, entry, capfd):
    options = dict(rank=None, point=None)
    jobs.logs(entry, SimpleNamespace(lines=0, follow=True, **options))
    assert capfd.readouterr().out == "said something\n"
    call = cluster.calls()[-1][0]
    assert {"logs", "--selector=app.kubernetes.io/instance=mine", "--tail=-1", "--follow"} <= set(call)
    with pytest.raises(UserError, match="a rank's log is /data/run/logs/rankN.log"):
        jobs.logs(entry, SimpleNamespace(lines=1, follow=False, **{**options, "rank": 3}))
    (cluster.folder / "kubectl").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(RunError, match="exit code 3"):
        jobs.logs(entry, SimpleNamespace(lines=1, follow=False, **options))


def test_cancel_deletes_the_job(cluster, entry):
    with pytest.raises(UserError, match="not on the cluster"):
        jobs.cancel(entry, now=False)
    cluster.answer("jobs.batch", {"kind": "Job", "metadata": {"name": "mine"}})
    assert "600 seconds to save" in jobs.cancel(entry, now=False)[0]
    assert cluster.calls()[-1][0][2:] == ["delete", "jobs.batch", "mine", "--wait=false"]


def test_resume_is_the_same_run_again(cluster, entry, capsys):
    assert jobs.resume(entry, []) == jobs.resume(entry, ["retries=7", "steps=9", "context=near"]) == 0
    made = [yaml.safe_load(given) for call, given in cluster.calls() if "create" in call]
    first, second, third = made[::2]
    assert first == second  # of one pod: no start's number in it
    assert third["spec"]["backoffLimit"] == 7
    assert yaml.safe_load(made[5]["data"]["settings.yaml"])["steps"] == 9
    assert "--context=near" in cluster.calls()[-1][0]
