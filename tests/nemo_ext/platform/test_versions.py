"""What is done where NVIDIA's packages differ, on stand-ins for both of two releases."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys

import pytest
import torch

from nemo_ext import platform
from nemo_ext.errors import RunError
from nemo_ext.platform import versions

platform.activate()


@pytest.mark.parametrize(
    ("found", "prefix", "same"),
    [
        ("2.13.0+cpu", "2.13", True),
        ("2.1.0", "2.13", False),
        ("2.130.0", "2.13", False),
        ("0.15.3", "0.15.3", True),
        ("0.15.30", "0.15.3", False),
        ("0.16.1", "0.16", True),
    ],
)
def test_version_prefixes(found, prefix, same):
    assert versions.matches(found, prefix) is same


def test_a_gpu_without_megatron():
    """GRPO's embedded engine runs there."""
    program = (
        "import sys; sys.modules['megatron'] = None; import torch; torch.cuda.is_available = lambda: True; "
        "from nemo_ext import platform; print(platform.activate())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


def test_what_is_read_for_cpus_is_written_for():
    for package, releases in versions.READ_FOR_CPU.items():
        for release in releases:
            assert any(versions.matches(release, prefix) for prefix in versions.WRITTEN_FOR[package]), (package, release)


def test_the_lock_holds_what_is_written_for():
    """The first version of each is pip's."""
    from pathlib import Path

    text = (
        "".join(file.read_text() for file in (Path(__file__).parents[3] / "requirements").glob("*.txt")).lower().replace("_", "-")
    )
    for package, (first, *_) in versions.WRITTEN_FOR.items():
        name = package.lower().replace("_", "-")
        pinned = next((line.partition("==")[2] for line in text.splitlines() if line.startswith(f"{name}==")), None)
        assert pinned is None or versions.matches(pinned, first), (package, pinned)


def test_nemo_names_arguments_that_megatron_0_16_does_not_have(monkeypatch):
    import megatron.core.optimizer as optimizer

    calls = []

    def megatron_0_16(config, model_chunks, config_overrides=None, use_gloo_process_groups=True):
        calls.append((config, model_chunks, config_overrides, use_gloo_process_groups))
        return "optimizer"

    def megatron_0_15(
        config, model_chunks, no_weight_decay_cond=None, scale_lr_cond=None, lr_mult=1.0, use_gloo_process_groups=True
    ):
        raise NotImplementedError

    monkeypatch.setattr(optimizer, "get_megatron_optimizer", megatron_0_15)
    versions.bridge()
    assert optimizer.get_megatron_optimizer is megatron_0_15
    monkeypatch.setattr(optimizer, "get_megatron_optimizer", megatron_0_16)
    versions.bridge()
    bridged = optimizer.get_megatron_optimizer
    versions.bridge()
    assert optimizer.get_megatron_optimizer is bridged is not megatron_0_16
    as_nemo = dict(no_weight_decay_cond=None, scale_lr_cond=None, lr_mult=1.0, use_gloo_process_groups=False)
    assert bridged("config", ["model"], **as_nemo) == "optimizer" and calls == [("config", ["model"], None, False)]
    assert inspect.signature(megatron_0_15).parameters.keys() >= as_nemo.keys()
    for said in ({"lr_mult": 2.0}, {"scale_lr_cond": max}, {"no_weight_decay_cond": max}):
        with pytest.raises(RunError, match="no conditions on weight decay"):
            bridged("config", [], **said)


def test_nemos_checkpoints_find_the_module_that_megatron_0_16_dropped(monkeypatch):
    name = "megatron.core.dist_checkpointing.strategies.tensorstore"
    strategies = importlib.import_module(name.rpartition(".")[0])
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(strategies, "tensorstore", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == name else find(each))
    versions.bridge()
    module = importlib.import_module(name)
    assert strategies.tensorstore is module
    with pytest.raises(RunError, match="zarr"):
        module.TensorStoreLoadShardedStrategy(load_directly_on_device=True)
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setitem(sys.modules, name, module)  # goes again after the test
    assert find(name) is not None


def test_nemos_rotary_embedding_takes_megatron_0_16s_group():
    class Rotary(torch.nn.Module):
        def forward(self, length, packed_seq=False):
            return torch.full((length,), float(packed_seq))

    class New(Rotary):
        def forward(self, length, packed_seq=False, cp_group=None):
            return super().forward(length, packed_seq)

    rotary, new = Rotary(), New()
    versions.let_rotary_be_called(rotary)
    versions.let_rotary_be_called(new)
    assert torch.equal(rotary(3, packed_seq=True, cp_group=None), new(3, packed_seq=True, cp_group=None))
    assert "forward" not in vars(new)
    with pytest.raises(ValueError, match="Rotary is not for context parallelism"):
        rotary(3, cp_group=object())
