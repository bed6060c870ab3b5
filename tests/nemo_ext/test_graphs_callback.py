"""The batches of a step's CUDA graph."""

from __future__ import annotations

import pytest

from nemo_ext.platform import hardware

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hardware.has_cuda(), reason="needs a CUDA GPU")]


def test_a_batch_is_not_overwritten_while_it_is_read(monkeypatch):
    import torch
    from megatron.core.full_cuda_graph import StaticBufferLoader

    from nemo_ext.callbacks.graphs import order_copies

    monkeypatch.setattr(StaticBufferLoader, "static_buffers", {"training": [], "validation": []})
    order_copies()
    before, after = (torch.full((1, 8192), value).pin_memory() for value in (1, 2))
    batch = StaticBufferLoader()({"tokens": before}, "training", 0)
    torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second, in which the host is ahead
    read = batch["tokens"].clone()
    assert StaticBufferLoader()({"tokens": after}, "training", 0) is batch
    assert read.eq(1).all()
    assert batch["tokens"].eq(2).all()
