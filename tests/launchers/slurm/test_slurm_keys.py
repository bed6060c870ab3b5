"""executor=slurm's keys: durations, profiles of sites, refusals."""

import dataclasses

import pytest

from launchers import executors, grammar
from launchers.slurm import keys
from launchers.slurm.keys import SlurmKeys
from nemo_ext.command_line import keys_of
from nemo_ext.errors import UserError
from recipes.grpo import GrpoKeys
from recipes.keys import TrainKeys


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("2:30", 150), ("4:00:00", 14400), ("1-6", 108000), ("1-06:30", 109800), ("2-00:00:05", 172805),
        ("0", None), ("infinite", None), ("UNLIMITED", None),
    ],
)  # fmt: skip
def test_durations(text, seconds):
    assert keys.seconds("time", text) == seconds


@pytest.mark.parametrize("text", ["4h", "1:2:3:4", "-5", "1-", "four", ""])
def test_what_is_no_duration(text):
    with pytest.raises(UserError, match="is no duration: give minutes, HH:MM:SS or D-HH:MM:SS"):
        keys.seconds("time", text)


@pytest.mark.parametrize("schema", [TrainKeys, GrpoKeys])
@pytest.mark.parametrize("executor", ["slurm", "allocation"])
def test_no_key_has_two_meanings(schema, executor):
    assert not set(executors.fields(executor)) & (set(keys_of(schema)) | set(grammar.LAUNCH_KEYS))


def test_the_command_line_gives_executor_keys_apart_and_times_as_text():
    command = grammar.parse(["recipe=cpt_llama3", "executor=slurm", "time=1:30:00", "account=0123", "lr=1e-5", "partition=a_1",
                             "env.NCCL_DEBUG=INFO", "env.USE_IT=true", "env.N=1"])  # fmt: skip
    assert command.keys == {"lr": 1e-5}
    assert command.executor_keys == {
        "time": "1:30:00", "account": "0123", "partition": "a_1", "env": {"NCCL_DEBUG": "INFO", "USE_IT": "true", "N": "1"},
    }  # fmt: skip


def test_a_config_file_gives_times_as_text(tmp_path):
    (tmp_path / "base.yaml").write_text("recipe: cpt_llama3\nexecutor: slurm\ntime: 1:30:00\nsteps: 10\nenv:\n  A: 0x\n")
    command = grammar.parse([f"config={tmp_path / 'base.yaml'}"])
    assert command.executor_keys == {"time": "1:30:00", "env": {"A": "0x"}} and command.keys == {"steps": 10}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["partition=debug"], "partition= is for executor=slurm, not for executor=local"),
        (["executor=slurm", "particion=debug"], "unknown key particion, did you mean partition"),
        (["executor=slurm", "grace=soon"], "grace=soon must be a whole number"),
        (["executor=slurm", "env.A=[1,2]"], r"env.A=\[1, 2\] must be text"),
        (["executor=clurm"], "executor=clurm is unknown: local, slurm"),
    ],
)
def test_bad_lines(line, says):
    with pytest.raises(UserError, match=says):
        grammar.parse(["recipe=cpt_llama3", *line])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"time": "10:00", "grace": 600}, "time=10:00 is no longer than grace=600 seconds"),
        ({"time": "4h"}, "time=4h is no duration"),
        ({"grace": -1}, "grace=-1 must be between 0 and 65535"),
        ({"chain": 0}, "chain=0 must be above 0"),
        ({"chain": 3, "requeue": True}, "chain=3 and requeue=true both continue a run"),
        ({"name": "a b"}, "name=a b must be letters, digits"),
        ({"account": "a\nb"}, "account='a\\\\nb' must be one line of text"),
        ({"runtime": "pyxis"}, "runtime=pyxis is for a container"),
        ({"runtime": "docker", "container": "x"}, "runtime=docker is none of pyxis, apptainer"),
        ({"sbatch": "mail-type=END"}, "sbatch=mail-type=END: an option begins with a hyphen"),
        ({"setup": {"a": 1}}, "setup={'a': 1} must be a list of texts"),
        ({"env": {"A B": "1"}}, "env.A B= is no name of an environment variable"),
        ({"site": "mars"}, "site=mars: there is no .*/sites/mars.yaml; known: moon"),
    ],
)
def test_refusals(given, says, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    keys.sites_folder().mkdir(parents=True)
    (keys.sites_folder() / "moon.yaml").write_text("account: a\n")
    with pytest.raises(UserError, match=says):
        keys.build(given)


def test_a_site_is_what_the_command_line_goes_over(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    keys.sites_folder().mkdir(parents=True)
    (keys.sites_folder() / "moon.yaml").write_text(
        "account: physics\npartition: h100\ntime: 12:00:00\ngpus: 8\ngpu: h100\ngpu_memory: 80\nsetup: [module load cuda]\n"
        "env:\n  NCCL_IB_HCA: mlx5\n  NCCL_DEBUG: INFO\n"
    )
    built, machine = keys.build({"site": "moon", "partition": "short", "env": {"NCCL_DEBUG": "WARN"}})
    assert machine == {"gpus": 8, "gpu": "h100", "gpu_memory": 80}
    assert built == dataclasses.replace(
        SlurmKeys(), site="moon", account="physics", partition="short", time="12:00:00", setup=["module load cuda"],
        env={"NCCL_IB_HCA": "mlx5", "NCCL_DEBUG": "WARN"},
    )  # fmt: skip
    wrong = {"gpu: h1000": "gpu=h1000 is none of h100", "gpus: all": "gpus=all must be", "gpu_memory: 0": "must be above 0"}
    for line, says in wrong.items():
        (keys.sites_folder() / "moon.yaml").write_text(line)
        with pytest.raises(UserError, match=says):
            keys.build({"site": "moon"})
    (keys.sites_folder() / "moon.yaml").write_text("acount: physics\n")
    with pytest.raises(UserError, match="moon.yaml: unknown key acount, did you mean account"):
        keys.build({"site": "moon"})


def test_help_shows_the_keys_of_the_executor_only_where_it_is_asked():
    assert "partition=" not in "\n".join(grammar.help_lines("cpt_llama3", {}))
    text = "\n".join(grammar.help_lines("cpt_llama3", {}, "slurm"))
    assert all(f"  {name}=" in text for name in keys_of(SlurmKeys))
