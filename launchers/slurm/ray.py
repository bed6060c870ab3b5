"""The batch script of a GRPO run through NeMo-RL, which needs Ray on all machines of the job.

phase=prepare on the first machine; Ray's head there and a worker on each other one, all in NeMo-RL's container; the driver beside
the head once all GPUs are there; phase=finish. What `ray.sub` of NeMo-RL does, without its retries of everything and its attach
scripts. SLURM is asked for no warning: NeMo-RL saves and ends by a clock of its own, which the driver is given.
"""

from __future__ import annotations

import dataclasses
import shlex

from launchers import nemo_rl_engine as engine
from launchers.allocation import COMPLETE, FINISH, PREPARE
from launchers.slurm import script
from launchers.slurm.keys import SlurmKeys
from launchers.slurm.script import Job, quote
from nemo_ext import run_folder
from nemo_ext.errors import UserError

# Ports of the versions' ray.sub: of the head, and of Ray's workers, first and last.
PORTS = {"v0.5.0": (54514, 54001, 54513), "v0.8.0": (1200, 2000, 2999)}


def settle(keys: SlurmKeys, version: str) -> SlurmKeys:
    """The keys as NeMo-RL needs them: in its container of the version if no other is given, whole machines. Raises UserError."""
    if keys.runtime == script.APPTAINER:
        raise UserError("runtime=apptainer: engine=nemo_rl enters a running container with Ray in it, which only pyxis can")
    container = keys.container or f"{engine.IMAGE}:{version}"
    return dataclasses.replace(keys, container=container, exclusive=True)


def render(job: Job, version: str) -> str:
    """The whole script. Raises UserError for a value that it cannot hold."""
    return "\n".join([script.header(job, warning=False), script.preamble(job), _ray(job, version)])


def _ray(job: Job, version: str) -> str:
    head_port, first_port, last_port = PORTS[version]
    phase = script.phase(job)
    resources = shlex.quote(f'{{"worker_units": {job.gpus}, "slurm_managed_ray_cluster": 1}}')
    ray = f"ray start --disable-usage-stats --block --resources={resources}"
    head = f'{ray} --head --node-ip-address="$RAY_HEAD" --port={head_port}'
    worker = f'{ray} --address="$RAY_HEAD:{head_port}" --min-worker-port={first_port} --max-worker-port={last_port}'
    others = f"""
# A worker may come before the head listens: it tries again.
"${{srun[@]}}" --overlap --nodes={job.nodes - 1} --ntasks={job.nodes - 1} --ntasks-per-node=1 --cpu-bind=none \\
    --nodelist="$(IFS=,; echo "${{machines[*]:1}}")" "${{inside[@]}}" --container-name=ray-worker \\
    --output="$logs/ray-worker-%t.log" bash -c {shlex.quote(f"for try in {{1..20}}; do {worker}; sleep 5; done; exit 1")} &
started+=($!)
"""
    driver = shlex.join(engine.driver(engine.HOME))
    return f"""{script.leave(job)}
{phase} executor=allocation phase={PREPARE}
code=$?
(( code == {COMPLETE} )) && exit 0  # complete: an earlier job has done it
(( code != 0 )) && leave "$code"

export RAY_HEAD=$(getent ahostsv4 "$MASTER_ADDR" | awk 'NR == 1 {{print $1}}')
export PYTHONPATH={quote(job.project)}
export NRL_MEGATRON_CHECKPOINT_DIR="$run/{engine.CONVERTED}"
unset UV_CACHE_DIR  # the container has its own
inside+=(--no-container-mount-home)
logs="${{run//%/%%}}/{run_folder.LOGS}"  # a percent sign is SLURM's in names of outputs
mkdir -p "$run/{run_folder.LOGS}"
started=()
trap 'kill "${{started[@]}}" 2> /dev/null' EXIT

"${{srun[@]}}" --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpu-bind=none --nodelist="$MASTER_ADDR" "${{inside[@]}}" \\
    --container-name=ray-head --output="$logs/ray-head.log" bash -c {shlex.quote(head)} &
started+=($!)
{others if job.nodes > 1 else ""}
on_head=("${{srun[@]}}" --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpu-bind=none --nodelist="$MASTER_ADDR"
    --no-container-mount-home --container-name=ray-head)
until [[ "$("${{on_head[@]}}" ray status 2> /dev/null)" == *"/{job.nodes * job.gpus}.0 worker_units"* ]]; do
    for each in "${{started[@]}}"; do
        kill -0 "$each" 2> /dev/null || {{ echo "Ray did not start: see $run/{run_folder.LOGS}" >&2; exit 1; }}
    done
    sleep 5
done

# NeMo-RL saves and ends so many seconds from now, where the job has a time limit.
ends=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o ' EndTime=[^ ]*')
limit=()
ends=$(date -d "${{ends# EndTime=}}" +%s 2> /dev/null) && limit=("save_within=$(( ends - $(date +%s) - {job.keys.grace} ))")
"${{on_head[@]}}" --container-workdir={engine.HOME} --output="$logs/{engine.LOG}" \\
    {driver} "run=$run" version={version} "${{limit[@]}}"
echo "the driver ended with exit code $?"
kill "${{started[@]}}" 2> /dev/null
wait

{phase} executor=allocation phase={FINISH}
code=$?
leave "$code"
"""
