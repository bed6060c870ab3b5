"""executor=local asks of torchrun what NeMo-Run's torchrun component does; docs/architecture.md says why that is not used."""

from __future__ import annotations

import dataclasses

from torch.distributed import run as torch_run

from launchers import local

# Names, and what becomes of the workers' output: ours write logs of their own.
OTHERS = {"run_id", "logs_specs", "log_line_prefix_template", "local_addr", "metrics_cfg", "rdzv_configs"}


def launched(arguments: list[str], monkeypatch) -> tuple[dict, list[str]]:
    """What torchrun would launch: its configuration but for `OTHERS`, and the workers' command."""
    found = []
    monkeypatch.setattr(torch_run, "elastic_launch", lambda config, entrypoint: lambda *command: found.append((config, command)))
    torch_run.run(torch_run.parse_args(arguments))
    ((config, command),) = found
    fields = {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.name not in OTHERS}
    return fields, list(command)


def test_the_same_is_asked_of_torchrun(tmp_path, monkeypatch):
    from nemo_run.run.torchx_backend.components.torchrun import torchrun

    (role,) = torchrun(str(tmp_path), m="launchers.worker", j="1x3").roles
    assert role.entrypoint == "torchrun"
    ours, command = launched(local.torchrun(tmp_path, 3), monkeypatch)
    theirs, their_command = launched(list(map(str, role.args)), monkeypatch)
    assert ours == theirs and ours["nproc_per_node"] == 3 and ours["max_nodes"] == 1
    assert (ours["rdzv_backend"], ours["rdzv_endpoint"]) == ("c10d", "localhost:0")  # a free port
    assert command == their_command and command[-3:] == ["-m", "launchers.worker", str(tmp_path)]
