"""The CPU platform: versions it refuses, what "cuda" means, Transformer Engine's names on Megatron's layers."""

import gc
import importlib.metadata
import queue
import re
import signal
from pathlib import Path

import pytest
import torch

from nemo_ext import platform
from nemo_ext.errors import UserError
from nemo_ext.platform import versions
from nemo_ext.signals import SIGNALS

pytestmark = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="the CPU platform is not installed where CUDA is")


@pytest.fixture(scope="module", autouse=True)
def active():
    assert platform.activate() is True


def test_other_versions_are_refused(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.0" if name == "megatron-core" else version(name))
    with pytest.raises(UserError, match="written for megatron-core 0.15.3 or 0.16.1, found 0.17.0"):
        versions.check_cpu()


def test_what_was_imported_is_not_looked_through_again():
    assert gc.isenabled() and gc.get_freeze_count() > 500_000


def test_the_queue_of_checkpoint_writers_knows_no_torch():
    from megatron.core.dist_checkpointing.strategies import filesystem_async as writers
    from torch.distributed.checkpoint.metadata import MetadataIndex

    results = writers._get_write_results_queue()
    assert results is writers._get_write_results_queue()
    results.put({0: [MetadataIndex("weight", torch.Size([2]))]})
    assert results.get_nowait() == {0: [MetadataIndex("weight", torch.Size([2]))]}
    with pytest.raises(queue.Empty):
        results.get_nowait()
    server = results.queue._manager._process
    assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
    held_back = int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{server.pid}/status").read_text())[1], 16)
    assert all(held_back >> each - 1 & 1 for each in SIGNALS)  # else a cluster's would end it before it ignores them
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(SIGNALS)


def test_cuda_devices_are_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).cuda().device.type == torch.ones(2).to("cuda:0").device.type == "cpu"
    assert torch.ones(2).new_zeros(3, device=torch.device("cuda", 1)).device.type == "cpu"
    assert torch.nn.Linear(2, 2).to("cuda").weight.device.type == "cpu"
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_the_meta_device_stays_meta():
    """Modules built under it take no memory, whatever device the code in them asks torch's factories for by default."""
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.nn.Linear(3, 4).weight.is_meta


def test_every_megatron_configuration_gets_the_cpus_choices():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_ext.platform.cpu_megatron import CPU_CONFIG

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, deallocate_pipeline_outputs=True, masked_softmax_fusion=True
    )
    assert {name: getattr(config, name) for name in CPU_CONFIG if hasattr(config, name)}.items() <= CPU_CONFIG.items()
    assert config.deallocate_pipeline_outputs is False


def test_a_gpt_has_transformer_engines_parameter_names():
    """What checkpoints, importers and adapters address; built through NeMo's own layer spec."""
    import fiddle as fdl

    import recipes
    from conversion.compare.megatron import single_process

    config = fdl.build(recipes.load("pretrain_qwen2.5", size="smoke").model.config)
    with single_process():
        names = dict(config.configure_model(None, pre_process=True, post_process=True).named_parameters())
    layer = {n.removeprefix("decoder.layers.0.") for n in names if n.startswith("decoder.layers.0.")}
    assert layer == {
        "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias", "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_proj.weight", "mlp.linear_fc1.weight", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc2.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    "normalization, zero_centred", [("RMSNorm", False), ("RMSNorm", True), ("LayerNorm", False), ("LayerNorm", True)]
)
def test_norms_follow_their_definition(normalization, zero_centred):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_ext.platform.te_layers import TENorm

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization=normalization,
                               layernorm_zero_centered_gamma=zero_centred, layernorm_epsilon=1e-3)  # fmt: skip
    norm = TENorm(config, 8, eps=1e-3)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm.weight, torch.full((8,), 0.0 if zero_centred else 1.0))
    torch.nn.init.normal_(norm.weight)
    gamma = norm.weight + 1 if zero_centred else norm.weight
    centred = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * gamma
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)
