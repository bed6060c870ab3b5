"""The planner on mixtures of experts: parameters and bytes by hand, what autograd saves on a CPU, and Megatron's rules for EP."""

import dataclasses

import pytest

from launchers.memory import GiB, Layout, Request, estimate_stage, expert_parameters, saved_per_token, stage_parameters
from launchers.plan import plan
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

MIXTRAL = Architecture(
    "mixtral", 32, 4096, 14336, 32, 8, 32000, layernorm_epsilon=1e-5, rotary_base=1e6, num_moe_experts=8, moe_router_topk=2
)
TINY = Architecture("mixtral", 4, 256, 512, 8, 4, 1000, num_moe_experts=4, moe_router_topk=2)
DENSE = dataclasses.replace(TINY, family="llama", num_moe_experts=None, moe_router_topk=None)
ONE = Layout(1, 1, None, 1, 1, False, 1, 8, "none")


def gpu(nodes=1, gpus=8, gpu_memory=79.1 * GiB, seq=4096, global_batch=128, **other):
    return Request(nodes=nodes, gpus=gpus, gpu_memory=gpu_memory, device="gpu", seq=seq, global_batch=global_batch, **other)


def test_parameters():
    assert sum(stage_parameters(MIXTRAL, ONE, 0)) == MIXTRAL.num_parameters() == 46_702_792_704
    assert expert_parameters(MIXTRAL, ONE) == 32 * 8 * 3 * 4096 * 14336
    split = dataclasses.replace(ONE, dp=8, ep=8)
    saved = expert_parameters(MIXTRAL, ONE) * 7 / 8
    assert sum(stage_parameters(MIXTRAL, ONE, 0)) - sum(stage_parameters(MIXTRAL, split, 0)) == saved


def test_memory_by_hand():
    """TINY: bf16, TP2 with sequence parallel, PP2, DP2, EP2, 256 tokens a micro batch; every number below worked out on paper."""
    layout = Layout(tp=2, pp=2, vp=None, cp=1, dp=2, sequence_parallel=True, micro_batch=2, num_microbatches=4,
                    recompute="none", ep=2)  # fmt: skip
    request = gpu(gpus=8, seq=128, global_batch=16)
    attention, experts = 2 * (256 * 512 + 256 * 256) // 2, 2 * 2 * 3 * 256 * 512 // 2  # of two layers; two of four experts
    others = 2 * (2 * 256 + 4 * 256) + 1024 * 256 // 2  # norms and routers, which TP does not divide, and half the embedding
    assert stage_parameters(TINY, layout, 0) == (attention + experts, others)
    first = estimate_stage(TINY, request, layout, 0)
    assert (first.weights, first.gradients) == (2 * (attention + experts + others), 4 * (attention + experts + others))
    assert first.optimizer == 12 * ((attention + others) / 2 + experts)  # two replicas share states, an expert has one
    # norms: three inputs and outputs of [h] and the router's; attention; two experts: their tokens and 3 x [ffn]
    norms, attended, mlp = 4 * 2 * 256 / 2, 784, 2 * 2 * 256 + 2 * 3 * 2 * 512 / 2
    assert saved_per_token(TINY, request, layout, "none") == norms + attended + mlp
    assert saved_per_token(TINY, request, layout, "selective") == norms + attended
    assert saved_per_token(TINY, request, layout, "full") == 256
    assert estimate_stage(TINY, request, dataclasses.replace(layout, ep=1), 0).weights == first.weights + 2 * experts


@pytest.mark.parametrize(("experts", "topk", "measured"), [(4, 2, 13_676), (8, 3, 18_200)])
def test_cpu_activations_are_what_autograd_saves(experts, topk, measured):
    """Bytes a token and layer, each storage once, seen by torch.autograd.graph.saved_tensors_hooks in Megatron-Core 0.15.3.

    Its decoder on a CPU in fp32 without the final norm, tokens spread over the experts by a random router: hidden 64, MLP 176, 4
    heads, 2 groups, sequence 128, batch 2.
    """
    tiny = Architecture("mixtral", 2, 64, 176, 4, 2, 256, num_moe_experts=experts, moe_router_topk=topk)
    request = Request(1, 1, 8 * GiB, "cpu", 128, 2, precision="fp32")
    layout = dataclasses.replace(ONE, micro_batch=2, num_microbatches=1)
    assert saved_per_token(tiny, request, layout, "none") == pytest.approx(measured, rel=0.03)


def test_a_dense_model_is_as_it_was():
    assert expert_parameters(DENSE, ONE) == 0
    assert plan(DENSE, gpu(global_batch=16)).layout.ep == 1


@pytest.mark.parametrize(
    ("architecture", "request_", "words"),
    [
        (DENSE, gpu(ep=2), "ep=2 needs a mixture of experts; nearest that works: tp=1 pp=1 ep=1"),
        (MIXTRAL, gpu(nodes=3, global_batch=24, ep=3), "ep=3 does not divide num_moe_experts=8"),
        (MIXTRAL, gpu(nodes=2, tp=4, pp=1, ep=8), "ep=8 does not divide dp x cp = 4"),
        (MIXTRAL, gpu(tp=2, sequence_parallel=False), "tp=2 with experts needs sequence parallelism"),
        (MIXTRAL, gpu(ep=0), "ep=0: give a number above 0"),
    ],
)
def test_what_megatron_refuses(architecture, request_, words):
    with pytest.raises(UserError) as caught:
        plan(architecture, request_)
    assert words in str(caught.value)


def test_what_does_not_fit_is_refused():
    """18 bytes for each of 46.7 billion parameters are 783 GiB: no layout of one node of 79 GiB GPUs holds them."""
    with pytest.raises(UserError, match=r"does not fit: 46\.7B parameters .* nearest that works: nodes=\d+ gpus=8"):
        plan(MIXTRAL, gpu())


def test_experts_are_split_where_they_do_not_fit():
    chosen = plan(MIXTRAL, gpu(nodes=4))
    layout = chosen.layout
    assert layout.tp * layout.pp * layout.cp * layout.dp == 32
    assert layout.ep > 1 and layout.dp * layout.cp % layout.ep == 0
    assert f"EP {layout.ep}" in "\n".join(chosen.lines())
    assert any(f"each GPU holds {8 // layout.ep} of a layer's 8 experts" in reason for reason in chosen.why)
    asked = plan(MIXTRAL, gpu(nodes=4, ep=4)).layout
    assert asked.ep == 4
    assert chosen.to_dict()["layout"]["ep"] == layout.ep
