"""`launchers/jobs.py` for runs on Kubernetes: what they do, what they say, ending them, starting them again."""

from __future__ import annotations

import subprocess
from typing import Any

from launchers import grammar
from launchers.k8s import keys, submit
from launchers.k8s.kubectl import Kubectl
from launchers.k8s.manifest import Run
from launchers.registry import Entry
from nemo_ext.errors import RunError, UserError


def status(entry: Entry) -> list[str]:
    """The job's state and its pods, in lines. Raises RunError where the cluster does not answer."""
    run = submit.load(entry.folder)
    found = _kubectl(run).get(submit.RESOURCES[run.kind], run.name)
    return status_lines(run, found, _pods(run) if found else [])


def status_lines(run: Run, found: dict[str, Any] | None, pods: list[dict[str, Any]]) -> list[str]:
    """A job's state and its pods, for people."""
    where = f"{run.kind} {run.name}, run {run.folder}"
    if found is None:
        return [f"{where}: not on the cluster (any more)"]
    lines = [f"{where}: {_state(found)}"]
    for pod in sorted(pods, key=lambda each: each["metadata"]["name"]):
        reported = pod.get("status", {})
        states = [each.get("state", {}) for each in reported.get("containerStatuses", [])]
        waiting = [state["waiting"].get("reason", "") for state in states if "waiting" in state]
        unmet = [each.get("message", "") for each in reported.get("conditions", []) if each.get("reason") == "Unschedulable"]
        why = next(iter([*waiting, *unmet]), "")
        machine = pod.get("spec", {}).get("nodeName", "-")
        lines.append(f"  {pod['metadata']['name']}  {reported.get('phase', '?')}  {machine}  {' '.join(why.split())}".rstrip())
    return lines


def logs(entry: Entry, options: Any) -> None:
    """Print what the pods print: the last `options.lines` of each, with `options.follow` until they end.

    What a rank prints lies in the run's folder, in its volume. Raises UserError, RunError.
    """
    run = submit.load(entry.folder)
    if options.rank is not None or options.point is not None:
        raise UserError(f"executor=k8s shows what pods print; a rank's log is {run.folder}/logs/rankN.log in its volume")
    arguments = [f"--selector={_selector(run)}", f"--tail={options.lines or -1}", "--all-containers",
                 f"--max-log-requests={max(run.nodes + 1, 5)}"]  # fmt: skip
    arguments += ["--prefix"] if run.nodes > 1 else []
    arguments += ["--follow"] if options.follow else []
    if code := subprocess.run(_kubectl(run).command("logs", *arguments)).returncode:
        raise RunError(f"kubectl logs ended with exit code {code}")


def cancel(entry: Entry, now: bool) -> list[str]:
    """End the job; unless it has to be `now`, its pods save first. Raises UserError where it is not there."""
    run = submit.load(entry.folder)
    kubectl = _kubectl(run)
    if kubectl.get(submit.RESOURCES[run.kind], run.name) is None:
        raise UserError(f"{run.kind} {run.name} is not on the cluster (any more)")
    kubectl.run("delete", submit.RESOURCES[run.kind], run.name, "--wait=false")
    if now:
        kubectl.run("delete", "pods", f"--selector={_selector(run)}", "--grace-period=1", "--wait=false")
        return [f"{run.kind} {run.name}: ended; resume goes on from the newest checkpoint"]
    return [f"{run.kind} {run.name}: told to end; its pods have {run.keys.grace} seconds to save, resume goes on from there"]


def resume(entry: Entry, given: list[str]) -> int:
    """Submit the run again, with other keys where some are `given`: it goes on from its newest checkpoint. The exit code."""
    if given:
        command = grammar.parse([f"config={entry.folder / submit.COMMAND}", "executor=k8s", *given])
        submit.send(submit.describe(command, keys.build(command.executor_keys)))
    else:
        submit.send(submit.load(entry.folder))
    return 0


def _selector(run: Run) -> str:
    return f"app.kubernetes.io/instance={run.name}"


def _kubectl(run: Run) -> Kubectl:
    return Kubectl(run.keys.context, run.keys.namespace)


def _pods(run: Run) -> list[dict[str, Any]]:
    found = _kubectl(run).items("pods", f"--selector={_selector(run)}")
    if found is None:
        raise RunError("this user may not list pods")
    return found


def _state(found: dict[str, Any]) -> str:
    reported = found.get("status") or {}
    if deployment := reported.get("jobDeploymentStatus"):
        return f"{deployment}, {reported.get('jobStatus') or 'not started'}"
    met = [each for each in reported.get("conditions") or [] if each.get("status") == "True"]
    if met and (found["kind"] != "Job" or submit.finished(found)):
        last = met[-1]
        return " ".join(filter(None, [last["type"], f"({last['message']})" if last.get("message") else ""]))
    counts = {name: reported.get(name) for name in ("active", "ready", "succeeded", "failed")}
    return ", ".join(f"{count} pods {name}" for name, count in counts.items() if count) or "waiting"
