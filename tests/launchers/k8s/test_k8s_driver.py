"""A RayJob's driver: which steps it makes, with stand-ins for the steps. NeMo-RL itself is not started here."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from launchers.k8s import driver


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """What the driver does, in order; `codes` are what its steps end with."""
    (tmp_path / "settings.yaml").write_text("recipe: grpo_llama3\nengine: nemo_rl\nnemo_rl_version: v0.5.0\nout: /data/run\n")
    found = SimpleNamespace(done=[], codes={}, settings=str(tmp_path / "settings.yaml"))

    def phase(name, settings):
        found.done.append(name)
        return found.codes.get(name, 0)

    def run(command, env):
        assert command[:2] == ["uv", "run"] and {"run=/data/run", "version=v0.5.0"} <= set(command)
        assert env["NRL_MEGATRON_CHECKPOINT_DIR"] == "/data/run/megatron"
        found.done.append("train")
        return subprocess.CompletedProcess(command, found.codes.get("train", 0))

    monkeypatch.setattr(driver, "phase", phase)
    monkeypatch.setattr(driver.subprocess, "run", run)
    return found


@pytest.mark.parametrize(
    ("codes", "done", "code"),
    [
        ({}, ["prepare", "train", "finish"], 0),
        ({"prepare": 10}, ["prepare"], 0),
        ({"prepare": 2}, ["prepare"], 2),
        ({"train": 1, "finish": 1}, ["prepare", "train", "finish"], 1),
        ({"train": 7}, ["prepare", "train", "finish"], 7),
    ],
)
def test_the_driver_prepares_trains_and_reports(steps, codes, done, code):
    steps.codes = codes
    assert driver.main(["run=/data/run", f"settings={steps.settings}"]) == code
    assert steps.done == done


def test_settings_without_a_version_are_refused(tmp_path, steps, capsys):
    (tmp_path / "settings.yaml").write_text("recipe: grpo_llama3\nengine: nemo_rl\n")
    assert driver.main(["run=/data/run", f"settings={steps.settings}"]) == 2
    assert "does not say nemo_rl_version" in capsys.readouterr().err and steps.done == []
