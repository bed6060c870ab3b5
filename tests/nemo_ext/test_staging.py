"""A checkpoint's way to host memory: beside training, but before what was saved changes."""

import threading
from types import SimpleNamespace

import pytest
import torch

from nemo_ext import platform
from nemo_ext.errors import RunError

platform.activate()

from nemo_ext.callbacks import checkpoint, staging  # noqa: E402  (Lightning imports torchvision, which needs the platform)


@pytest.fixture
def held(monkeypatch):
    """Copies begin when this event is set."""
    event, copy = threading.Event(), staging._copy
    monkeypatch.setattr(staging, "_copy", lambda *arguments: event.wait(60) and copy(*arguments))
    yield event
    event.set()


def buckets(*tensors):
    """As Megatron's writer has them: (file, key, (bytes, [(item, tensor)]))."""
    return [("file", "key", ([], list(enumerate(tensors))))]


def contents(copied):
    return [tensor for _, _, (_, held) in copied for _, tensor in held]


def test_the_optimizer_waits_for_the_copies(held):
    """And nobody else does: `copy` is back before the first of them."""
    weights, moments = torch.arange(1000.0), torch.ones(3, 5, dtype=torch.bfloat16).t()
    staged = staging.Staging()
    copied = staged.copy(buckets(weights, moments, torch.empty(0)))
    callback = checkpoint.AtomicCheckpoint("", every=1, keep=1, async_save=True)
    callback._calls = SimpleNamespace(staging=staged)
    step = threading.Thread(target=callback._after_copies(lambda: weights.zero_()))
    step.start()
    step.join(0.2)
    assert step.is_alive() and weights[-1] == 999
    held.set()
    step.join(60)
    assert not weights.any()
    assert torch.equal(contents(copied)[0], torch.arange(1000.0))
    assert torch.equal(contents(copied)[1], moments) and contents(copied)[2].numel() == 0


def test_what_was_not_copied_is_not_written(monkeypatch):
    """The run ends at its next step, and no process writes what lay in that memory before."""
    monkeypatch.setattr(staging, "_copy", lambda *arguments: 1 / 0)
    staged, written = staging.Staging(), []
    caller = staging.StagedCaller(staged)
    caller.schedule_async_call(SimpleNamespace(async_fn=written.append, async_fn_args=("", buckets(torch.ones(2)))))
    with pytest.raises(ZeroDivisionError):
        staged.wait()
    assert isinstance(caller._writing.exception(), ZeroDivisionError) and not written


def test_a_save_takes_the_state_once():
    taken = []

    class Model(torch.nn.ModuleList):
        def sharded_state_dict(self, prefix="", metadata=None):
            taken.append(metadata)
            return {"weight": prefix}

    strategy = SimpleNamespace(megatron_parallel=Model(), lightning_module_state_dict=lambda: taken.append("Lightning's"))
    for _ in range(2):
        with checkpoint._state_taken_once(strategy):
            assert strategy.lightning_module_state_dict() == {}
            state = strategy.megatron_parallel.sharded_state_dict()
            assert strategy.megatron_parallel.sharded_state_dict(metadata={}) is state == {"weight": ""}
    assert taken == [None, None]
    assert strategy.megatron_parallel.sharded_state_dict(metadata=1) == {"weight": ""} and taken[-1] == 1


def test_no_copy_without_host_memory(monkeypatch):
    """Also where it is a job's or container's that is missing: `hardware.free_memory`."""
    monkeypatch.setattr(staging, "free_memory", lambda: 3 << 30)
    assert len(staging.Memory(1 << 20).bytes) == 1 << 20
    with pytest.raises(RunError, match="needs 4.0 GiB for its part, and 3.0 are free on its node, or left of what its job"):
        staging.Memory(4 << 30)
