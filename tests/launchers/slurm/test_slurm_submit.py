"""Submitting: what sbatch is given, what is written down, and what is refused before."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from launchers import grammar, registry, run
from launchers.slurm import cluster as slurm
from launchers.slurm.submit import ROOT
from nemo_ext import run_folder

CPU = ("device=cpu", "nodes=2", "gpus=1")
GPU = ("partition=h100", "nodes=2", "gpus=8")


def test_a_run_is_submitted_and_written_down(cluster, submit, tmp_path):
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n')
    code, out, err = submit(*CPU, "out=it's mine/run", "time=20:00", "data=docs.jsonl", "lr=1e-3", "trainer.strategy.a=1")
    assert (code, err) == (0, "")
    assert out.endswith("submitted run as job 100; python launchers/jobs.py status run\n")
    home = tmp_path / "it's mine" / "run"
    assert cluster.calls("sbatch") == [["--parsable", str(home / "slurm" / "job.sbatch")]]
    script = (home / "slurm" / "job.sbatch").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for line in ("--nodes=2", "--ntasks-per-node=1", "--time=20:00", "--requeue", "--signal=B:USR1@300"):
        assert f"#SBATCH {line}\n" in script
    assert "gpus-per-node" not in script and "NCCL" not in script
    settings = yaml.safe_load((home / "slurm" / "settings.yaml").read_text())
    assert settings == {
        "recipe": "pretrain_custom", "layers": 2, "hidden": 64, "heads": 4, "device": "cpu", "nodes": 2, "gpus": 1, "lr": 1e-3,
        "data": str(tmp_path / "docs.jsonl"), "out": str(home), "trainer.strategy.a": 1,
    }  # fmt: skip
    step = grammar.parse([f"config={home / 'slurm' / 'settings.yaml'}", "executor=allocation", "phase=finish"])
    assert (
        step.keys["out"] == str(home)
        and step.overrides == {"trainer.strategy.a": 1}
        and step.executor_keys == {"phase": "finish"}
    )
    record = run_folder.read_json(home / "slurm" / "submission.json")
    assert record["jobs"] == ["100"] and record["runs"] == [str(home)] and record["executor_keys"] == {"time": "20:00"}
    assert registry.find("run") == registry.Entry("run", "slurm", home)


def test_paths_are_absolute_and_a_container_sees_them(cluster, submit, tmp_path):
    cluster.answer("srun", "--container-image=IMAGE\n")
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "extra").mkdir()
    code, out, _ = submit(*GPU, "data=[docs.jsonl:0.5,docs.jsonl:0.5]", "container=nvcr.io#nvidia/nemo:26.02.01",
                          "mounts=[extra:/mnt]", "name=mine", "out=runs/a", "env.NCCL_IB_HCA=mlx5")  # fmt: skip
    assert code == 0 and "submitted mine as job 100" in out
    script = (tmp_path / "runs" / "a" / "slurm" / "job.sbatch").read_text()
    mounts = script.partition("--container-mounts=")[2].partition(")")[0].split(",")
    assert f"{tmp_path}/extra:/mnt" in mounts and f"{tmp_path}:{tmp_path}" in mounts and f"{ROOT}:{ROOT}" in mounts
    assert "--container-image='nvcr.io#nvidia/nemo:26.02.01'" in script and "#SBATCH --gpus-per-node=8\n" in script
    assert "export NCCL_IB_HCA=mlx5\n" in script and "python=(python)\n" in script


def test_the_partition_says_how_many_gpus_a_machine_has(cluster, submit, tmp_path):
    assert submit("partition=h100", "out=a")[0] == 0
    assert "#SBATCH --gpus-per-node=8\n" in (tmp_path / "a" / "slurm" / "job.sbatch").read_text()


def test_a_chain_waits_for_the_job_before(cluster, submit, tmp_path):
    code, out, _ = submit(*CPU, "out=a", "chain=3")
    assert code == 0 and "jobs 100 to 102, one after the other" in out
    dependencies = [[word for word in call if word.startswith("--dependency")] for call in cluster.calls("sbatch")]
    assert dependencies == [[], ["--dependency=afterany:100"], ["--dependency=afterany:101"]]
    script = (tmp_path / "a" / "slurm" / "job.sbatch").read_text()
    assert "#SBATCH --no-requeue\n" in script and "scontrol requeue" not in script
    assert run_folder.read_json(tmp_path / "a" / "slurm" / "submission.json")["jobs"] == ["100", "101", "102"]


def test_a_chain_that_breaks_is_known_as_far_as_it_went(cluster, submit, tmp_path):
    sbatch = cluster.bin / "sbatch"
    sbatch.write_text(
        sbatch.read_text() + '\nif number == 101:\n    sys.stderr.write("sbatch: error: too many\\n")\n    sys.exit(1)\n'
    )
    code, _, err = submit(*CPU, "out=a", "chain=3")
    assert code == 2 and err.startswith("error: sbatch refused the job: too many; ")
    assert run_folder.read_json(tmp_path / "a" / "slurm" / "submission.json")["jobs"] == ["100"]


def test_a_sweep_is_an_array(cluster, submit, tmp_path):
    code, out, _ = submit(*CPU, "out=grid", "sweep.lr=[1e-3,2e-3]", "sweep.seed=[1,2]", "parallel=2")
    assert code == 0 and "submitted grid as job 100, an array of 4 points" in out
    script = (tmp_path / "grid" / "slurm" / "job.sbatch").read_text()
    assert "#SBATCH --array=0-3%2\n" in script and f"#SBATCH --output={tmp_path}/grid/slurm/%A_%a.log\n" in script
    runs = run_folder.read_json(tmp_path / "grid" / "slurm" / "submission.json")["runs"]
    found = [yaml.safe_load((Path(run) / "slurm" / "settings.yaml").read_text()) for run in runs]
    assert [(each["lr"], each["seed"]) for each in found] == [(1e-3, 1), (1e-3, 2), (2e-3, 1), (2e-3, 2)]
    assert [each["out"] for each in found] == runs and f"    {runs[2]}\n" in script
    assert len(run_folder.read_json(tmp_path / "grid" / "sweep.json")["points"]) == 4


def test_dryrun_prints_the_script_without_a_cluster(cluster, submit, tmp_path):
    for program in cluster.bin.iterdir():
        program.unlink()
    code, out, err = submit("dryrun=true", "gpus=4", "out=a", "container=~/nemo.sif", "partition=any", "time=9-0")
    assert (code, err) == (0, "") and out.startswith("#!/bin/bash\n#SBATCH --job-name=a\n")
    assert f"{Path.home()}/nemo.sif python)" in out and "apptainer exec --nv" in out
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)
    assert not (tmp_path / "a").exists() and not registry.entries()


def test_plan_uses_what_the_site_says(cluster, submit, tmp_path):
    sites = tmp_path / "config" / "llm-builder" / "sites"
    sites.mkdir(parents=True)
    (sites / "moon.yaml").write_text("gpus: 8\ngpu_memory: 80\n")
    code, out, _ = submit("plan=true", "site=moon", "nodes=2")
    assert code == 0 and "GiB a GPU" in out and not cluster.calls("sbatch")
    assert submit("plan=true", "gpus=8")[2] == (
        "error: planning for a cluster's GPUs: give gpu= (such as h100) or gpu_memory= in GiB, or let site= say it\n"
    )
    assert "8 GPU taken for H100, 80.0 GiB each" in out
    (sites / "moon.yaml").write_text("gpus: 8\ngpu: l40\ngpu_memory: 40\n")
    assert "8 L40, 40.0 GiB each" in submit("plan=true", "site=moon")[1]
    assert "8 H200, 139.8 GiB each" in submit("plan=true", "site=moon", "gpu=h200")[1]  # not the site's memory
    assert submit(*CPU, "site=moon", "out=a")[0] == 0  # on its cores the site's GPUs mean nothing
    assert "gpu" not in yaml.safe_load((tmp_path / "a" / "slurm" / "settings.yaml").read_text())


@pytest.mark.parametrize(
    ("engine", "more", "says"), [("embedded", "gpus=1", "one device of 44.4"), ("nemo_rl", "nodes=2", "2 x 8 L40")]
)
def test_grpo_is_planned_for_what_the_site_says(engine, more, says, cluster, capsys, tmp_path):
    sites = tmp_path / "config" / "llm-builder" / "sites"
    sites.mkdir(parents=True)
    (sites / "moon.yaml").write_text("gpus: 8\ngpu: l40\n")
    line = f"recipe=grpo_llama3 size=1b executor=slurm site=moon plan=true engine={engine} {more}"
    assert run.main(line.split()) == 0
    assert says in capsys.readouterr().out


def test_grpo_through_nemo_rl_starts_ray(cluster, capsys, tmp_path):
    cluster.answer("srun", "--container-image=IMAGE\n")
    line = "recipe=grpo_llama3 size=8b engine=nemo_rl executor=slurm partition=h100 nodes=2 gpus=8 out=rl time=2:00:00".split()
    assert run.main([*line, "model=hf:nowhere"]) == 2
    assert "model=hf:nowhere: neither a folder nor a model" in capsys.readouterr().err and not cluster.calls("sbatch")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    }))  # fmt: skip
    assert run.main([*line, "model=hf:base"]) == 0, capsys.readouterr().err
    script = (tmp_path / "rl" / "slurm" / "job.sbatch").read_text()
    assert "ray start" in script and "nvcr.io#nvidia/nemo-rl:v" in script and "save_within=" in script
    settings = yaml.safe_load((tmp_path / "rl" / "slurm" / "settings.yaml").read_text())
    assert settings["model"] == f"hf:{tmp_path / 'base'}" and f"{tmp_path / 'base'}:" in script
    assert settings["engine"] == "nemo_rl" and settings["nemo_rl_version"].startswith("v")


def test_grpo_of_the_embedded_engine_is_one_process(cluster, capsys, tmp_path):
    assert run.main("recipe=grpo_llama3 executor=slurm device=cpu out=rl".split()) == 0
    script = (tmp_path / "rl" / "slurm" / "job.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=1\n" in script and "launchers.worker" in script


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["partition=deb"], "partition=deb: the cluster has no such partition, did you mean debug?"),
        (["partition=zzz"], "partition=zzz: the cluster has no such partition, it has debug, h100, old"),
        (["partition=old"], "partition=old is down"),
        ([*CPU, "nodes=3"], "nodes=3: partition debug has 2 machines"),
        ([*CPU, "gpus=5"], "gpus=5 processes are 5 cores: a machine of partition debug has at most 4"),
        ([*CPU, "gpus=2", "cpus=3"], "gpus=2 x cpus=3 are 6 cores: a machine of partition debug has at most 4"),
        (["gpus=1"], "gpus=1: no machine of partition debug has GPUs that SLURM knows"),
        (["partition=h100", "gpus=16"], "gpus=16: a machine of partition h100 has at most 8"),
        ([*CPU, "time=1:00:00"], "time=1:00:00: the limit of partition debug is 0:30:00; the run goes on after it by itself"),
        ([*CPU, "time=unlimited"], "time=unlimited: the limit of partition debug is 0:30:00"),
        ([*CPU, "time=soon"], "time=soon is no duration"),
        ([*GPU, "container=a#b", "runtime=pyxis", "mounts=[/nowhere/data]"], "mounts=/nowhere/data: there is no /nowhere/data"),
        ([*GPU, "container=/nowhere/a.sqsh"], "container=/nowhere/a.sqsh: there is no such file"),
        ([*GPU, "container=nvcr.io#a"], "container=nvcr.io#a: this cluster has neither pyxis nor apptainer"),
        ([*CPU, "python=/nowhere/python"], "python=/nowhere/python: there is no such program"),
        ([*CPU, "lr=-1"], "lr=-1.0 must be above 0"),
        ([*CPU, "data=nowhere.jsonl"], "data=nowhere.jsonl"),
        ([*CPU, "tokenizer=nowhere"], "tokenizer=nowhere: there is no such folder"),
        (["device=cpu", "sweep.gpus=[1,2]"], "sweep.gpus: the jobs of an array are alike"),
        (["device=cpu", "sweep.partition=[debug,old]"], "sweep.partition: the jobs of an array are alike"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_submitted(cluster, submit, tmp_path, arguments, says):
    given = dict(argument.partition("=")[::2] for argument in arguments)
    code, out, err = submit(*(f"{name}={value}" for name, value in given.items()), "out=a")
    assert code == 2 and err.startswith(f"error: {says}") and err.count("\n") == 1
    assert not cluster.calls("sbatch") and not (tmp_path / "a").exists()


def test_without_slurm(cluster, submit, monkeypatch):
    monkeypatch.setattr("launchers.slurm.cluster.shutil.which", lambda name: None)
    code, _, err = submit(*CPU)
    assert (code, err) == (
        2, "error: executor=slurm: sinfo is not on the path: start this on a login node; dryrun=true prints the script\n"
    )  # fmt: skip


def test_what_slurm_says_is_one_line(cluster, submit):
    cluster.fail("sbatch", "sbatch: error: Batch job submission failed:\n  Invalid account or account/partition combination\n")
    code, _, err = submit(*CPU, "out=a")
    assert code == 2 and "refused the job: Batch job submission failed: Invalid account or account/partition combination; " in err
    for said, shown in (
        ("slurm_load_partitions: Unable to contact slurm controller (connect failure)\n",) * 2,
        ("sinfo: error: fetch_config: DNS SRV lookup failed\nsinfo: fatal: Could not establish\n    a configuration source\n",
         "fetch_config: DNS SRV lookup failed; Could not establish a configuration source"),
    ):  # fmt: skip
        cluster.fail("sinfo", said)
        question = "is this a machine of the cluster, and its controller up?"
        assert submit(*CPU, "out=a")[2] == f"error: sinfo: {shown.strip()}: {question}\n"


def test_an_account_that_is_not_the_users(cluster, submit):
    (cluster.bin / "sacctmgr").write_text((cluster.bin / "sinfo").read_text())
    (cluster.bin / "sacctmgr").chmod(0o755)
    cluster.answer("sacctmgr", "physics\nchemistry\nphysics\n")
    assert submit(*CPU, "account=biology")[2] == "error: account=biology: yours are chemistry, physics\n"
    assert submit(*CPU, "account=physics", "out=a")[0] == 0


def test_one_submission_of_a_folder_at_a_time(cluster, submit):
    assert submit(*CPU, "out=a")[0] == 0
    cluster.answer("squeue", "100|RUNNING|0:10|19:50|node1|None\n")
    code, _, err = submit(*CPU, "out=a")
    assert code == 2 and "job 100 is running; python launchers/jobs.py cancel a ends it" in err
    cluster.answer("squeue", "")
    assert submit(*CPU, "out=a")[0] == 0
    assert cluster.calls("squeue")[-1][1] == "--jobs=100"
    code, _, err = submit(*CPU, "out=b/a")
    assert code == 2 and err.startswith("error: name=a is the run in ")


def test_another_runs_folder_is_refused(cluster, submit, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("recipe: pretrain_custom\nlr: 0.5\nsteps: 10\n")
    code, _, err = submit(*CPU, "out=a", "lr=1e-3")
    assert code == 2 and "holds a run with" in err and not cluster.calls("sbatch")


def test_a_complete_run_is_not_submitted(cluster, submit, tmp_path, monkeypatch):
    monkeypatch.setattr("launchers.submission.Submission.check_folder", lambda self: {"steps": 10})
    code, out, _ = submit(*CPU, "out=a")
    assert code == 0 and f"{tmp_path / 'a'} is complete at step 10" in out and not cluster.calls("sbatch")


def test_sinfo_is_read():
    text = "a*|up|infinite|3|4+|gpu:2(S:0),gpu:a100:2\nb|drain|30:00|1|8|(null)\nbroken line\n"
    assert slurm.parse(text) == [
        slurm.Partition("a", True, True, None, 3, 4, 4), slurm.Partition("b", False, False, 1800, 1, 8, 0),
    ]  # fmt: skip
    assert json.dumps(slurm.duration(90061)) == '"1-1:01:01"'
