"""doctor.py: what it says of this machine against independent sources, and its judgement of machines it is told about."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from launchers import doctor
from nemo_ext.platform.hardware import Gpu, Machine
from nemo_ext.platform.versions import WRITTEN_FOR

SCRIPT = Path(doctor.__file__)
GIB = 1024**3
CPU = Machine(gpus=(), cuda=False, cpu_count=2, memory_bytes=16 * GIB)
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, (9, 0))
A100 = Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, (8, 0))
ALL = {name: WRITTEN_FOR.get(name, ("1.0",))[0] for name in doctor.PACKAGES}
NO_TOOLS = dict.fromkeys(doctor.TOOLS)


def abilities(machine, versions=ALL, tools=NO_TOOLS) -> dict[str, tuple[str, str]]:
    return {row.name: (row.value, row.note) for row in doctor.ability_rows(machine, versions, tools)}


def run(*arguments: str, cwd: Path) -> str:
    """Standard output of the script, as a person would start it from `cwd`."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=cwd, env=environment, check=True, text=True, capture_output=True
    ).stdout


def test_script_from_anywhere_and_fast(tmp_path):
    started = time.monotonic()
    text = run(cwd=tmp_path)
    assert time.monotonic() - started < 20  # NeMo alone takes longer to import on a slow machine
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == [
        "machine",
        "GPU",
        "packages",
        "tools",
        "what works here",
        "sandbox of rewards",
    ]
    assert platform.python_version() in text and max(map(len, text.splitlines())) < 160
    assert "--json" in run("--help", cwd=tmp_path)


def test_json_tells_this_machine(tmp_path):
    rows = {(row["group"], row["name"]): row for row in json.loads(run("--json", cwd=tmp_path))}
    assert rows["machine", "Python"]["value"] == platform.python_version()
    assert rows["machine", "Python"]["state"] == "ok"
    assert rows["packages", "megatron-core"] == {
        "group": "packages", "name": "megatron-core", "value": version("megatron-core"), "state": "ok", "note": ""
    }  # fmt: skip
    disk = os.statvfs(tmp_path)
    assert float(rows["machine", "free disk"]["value"].split()[0]) == pytest.approx(disk.f_bavail * disk.f_frsize / GIB, abs=2)


def test_cpu_machine():
    can = abilities(CPU)
    assert can["recipes on CPU (smoke size)"] == ("yes", "")
    assert can["recipes on GPU"] == ("no", "needs a CUDA GPU")
    assert can["FP8"] == ("no", "needs a CUDA GPU")  # one cause, named once
    assert can["SLURM submission"] == ("no", "needs sbatch")
    assert can["quantization"] == ("yes", "")


def test_two_h100_with_everything():
    machine = Machine(gpus=(H100, H100), cuda=True, cpu_count=16, memory_bytes=128 * GIB)
    can = abilities(machine, tools={**NO_TOOLS, "sbatch": "sbatch", "kubectl": "kubectl", "docker": "docker"})
    no = {name: note for name, (value, note) in can.items() if value == "no"}
    assert no == {"recipes on CPU (smoke size)": "CPU is used only where there is no CUDA GPU"}


def test_one_a100_without_transformer_engine():
    machine = Machine(gpus=(A100,), cuda=True, cpu_count=16, memory_bytes=128 * GIB)
    can = abilities(machine, {**ALL, "transformer_engine": None})
    assert can["recipes on GPU"] == ("no", "needs transformer_engine")
    assert can["bf16 on GPU"] == ("yes", "")
    assert can["FP8"] == ("no", "needs compute capability 8.9, transformer_engine")
    assert can["context parallelism"] == ("no", "needs a second GPU, transformer_engine")


@pytest.mark.parametrize(
    ("trtllm", "note"),
    [("1.1.0", ""), ("1.2.1", ""), ("1.3.0rc1", "needs trtllm-build (TensorRT-LLM up to 1.2)"), (None, "needs tensorrt_llm")],
)
def test_engines_need_a_trtllm_that_builds(trtllm, note):
    machine = Machine(gpus=(H100,), cuda=True, cpu_count=16, memory_bytes=128 * GIB)
    assert abilities(machine, {**ALL, "tensorrt_llm": trtllm})["TensorRT-LLM engines"][1] == note


def test_versions_that_differ_are_warned_of():
    found = {**ALL, "megatron-core": "0.17.0", "torch": "2.13.0+cpu", "nemo_toolkit": "2.7.0", "vllm": None}
    rows = {row.name: row for row in doctor.package_rows(found)}
    assert (rows["megatron-core"].state, rows["megatron-core"].note) == ("warning", "this project is written for 0.15.3 or 0.16")
    assert rows["torch"].state == rows["nemo_toolkit"].state == "ok"
    assert (rows["vllm"].state, rows["vllm"].value) == ("missing", "-")


def test_gpu_rows():
    rows = doctor.gpu_rows(
        Machine((A100, Gpu("Tesla V100", 32 * GIB, (7, 0))), True, 8, GIB), {"driver": "570.1", "CUDA": "12.8"}
    )
    assert [(row.name, row.value, row.state) for row in rows] == [
        ("driver", "570.1", "ok"),
        ("CUDA", "12.8", "ok"),
        ("GPU 0", "NVIDIA A100-SXM4-80GB, 80 GiB, compute capability 8.0", "ok"),
        ("GPU 1", "Tesla V100, 32 GiB, compute capability 7.0", "warning"),
    ]
    assert doctor.gpu_rows(CPU, {"error": "No module named 'torch'"})[0].note == "No module named 'torch'"


def test_driver_without_torch_is_a_row_not_a_crash(monkeypatch):
    from nemo_ext.platform import hardware

    def broken():
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(hardware, "detect", broken)
    rows = {row.name: row for row in doctor.examine()}
    assert rows["CUDA"].note == "No module named 'torch'" and int(rows["cores"].value) >= 1


def test_old_python(monkeypatch, capsys):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    assert doctor.main([]) == 1
    assert "use Python 3.11 or 3.12" in capsys.readouterr().err
