"""Queries, keys and values, split and rotated in one kernel, against Megatron's own functions."""

from types import SimpleNamespace

import pytest
import torch

from nemo_ext import platform
from nemo_ext.platform import hardware

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hardware.has_cuda(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("s, b, groups, heads, dim", [(1000, 2, 2, 4, 64), (33, 1, 8, 1, 128)])
def test_against_megatrons_unfused_rotation(s, b, groups, heads, dim):
    platform.activate()
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from nemo_ext.platform import rotary

    draw = torch.Generator("cuda").manual_seed(1)
    joint = torch.randn(s, b, groups, (heads + 2) * dim, device="cuda", generator=draw).bfloat16().requires_grad_()
    angles = torch.outer(torch.arange(s, device="cuda").float(), 10000 ** -(torch.arange(0, dim, 2, device="cuda").float() / dim))
    angles = torch.cat((angles, angles), -1).view(s, 1, 1, dim)
    sizes = [heads * dim, dim, dim]
    query, key, value = torch.split(joint.float(), sizes, 3)
    query = query.reshape(s, b, groups * heads, dim)
    wanted = [_apply_rotary_pos_emb_bshd(query, angles), _apply_rotary_pos_emb_bshd(key, angles), value]
    gradients = [torch.randn(each.shape, device="cuda", generator=draw).bfloat16() for each in wanted]
    (expected,) = torch.autograd.grad(wanted, joint, [each.float() for each in gradients])
    found = rotary.split(joint, angles, angles, sizes)
    (gradient,) = torch.autograd.grad(found, joint, gradients)
    for ours, theirs in zip([*found, gradient], [*wanted, expected], strict=True):
        assert ours.is_contiguous()  # 2**-7: a unit in the last place of bf16, to which autograd rounds the gradient too
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=1e-5)


def test_where_it_holds():
    platform.activate()
    from megatron.core.transformer.attention import SelfAttention

    from nemo_ext.platform import rotary

    config = SimpleNamespace(
        apply_rope_fusion=True, rotary_interleaved=False, flash_decode=False, test_mode=False, no_rope_freq=None
    )
    attention = SelfAttention.__new__(SelfAttention)
    torch.nn.Module.__init__(attention)
    attention.config, attention.hidden_size_per_attention_head = config, 64
    attention.q_layernorm = attention.k_layernorm = None
    angles = torch.zeros(8, 1, 1, 64, device="cuda")
    assert rotary._holds(attention, rotary_pos_emb=angles, attention_mask=None)
    assert not rotary._holds(attention)
    assert not rotary._holds(attention, rotary_pos_emb=angles[..., :32])
    assert not rotary._holds(attention, rotary_pos_emb=angles, packed_seq_params=object())
    assert not rotary._holds(attention, rotary_pos_emb=angles, inference_context=object())
    attention.q_layernorm = torch.nn.LayerNorm(64)
    assert not rotary._holds(attention, rotary_pos_emb=angles)
    attention.q_layernorm, config.no_rope_freq = None, [0, 1]
    assert not rotary._holds(attention, rotary_pos_emb=angles)


@pytest.mark.parametrize("packed", [False, True])
def test_megatrons_attention_is_the_same(tmp_path, monkeypatch, packed):
    """Output and gradients of its self-attention in bf16, and packed rows, which stay Megatron's."""
    platform.activate()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from nemo_ext.platform import rotary

    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        config = TransformerConfig(
            num_layers=1, hidden_size=256, num_attention_heads=4, num_query_groups=2, kv_channels=64, add_bias_linear=False,
            normalization="RMSNorm", bf16=True, params_dtype=torch.bfloat16, apply_rope_fusion=True, attention_dropout=0.0,
            hidden_dropout=0.0,
        )  # fmt: skip
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        spec = get_gpt_layer_with_transformer_engine_spec().submodules.self_attention
        attention = build_module(spec, config=config, layer_number=1).cuda()
        angles = RotaryEmbedding(64, 1.0)(128)
        params = None
        if packed:
            ends = torch.tensor([0, 40, 128], dtype=torch.int32, device="cuda")
            params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=88, max_seqlen_kv=88)
        seen, inner = [], rotary.Split.apply
        monkeypatch.setattr(rotary.Split, "apply", lambda *parts: seen.append(1) or inner(*parts))
        found = []
        for choose in (rotary.remove, rotary.install):
            choose()
            draw = torch.Generator("cuda").manual_seed(3)
            hidden, gradient = (torch.randn(128, 1, 256, device="cuda", generator=draw).bfloat16() for _ in range(2))
            hidden.requires_grad_()
            attention.zero_grad()
            out, _ = attention(hidden, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=params)
            out.backward(gradient)
            found.append([each.float() for each in (out.detach(), hidden.grad, attention.linear_qkv.weight.grad)])
        assert len(seen) == (not packed)
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() < 4e-3 * theirs.norm()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
