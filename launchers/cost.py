"""What a step costs in time under a layout: a ranking for the planner, not a forecast.

The rates below are round assumptions, good for ordering layouts on one machine (is recomputing dearer than splitting?). They
are not measurements and no figure from here is shown to people.
"""

from __future__ import annotations

from dataclasses import dataclass

from launchers.memory import Layout, Request, element_bytes, expert_parameters, stage_parameters
from nemo_ext.architecture import Architecture


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU (or CPU process): floating-point operations a second, bytes a second to its neighbours."""

    flops: float
    within: float  # to a GPU of the same node
    across: float  # to another node
    small: float  # tokens in a product that runs at half the rate


def machine(request: Request) -> Machine:
    """Assumed sustained rates: Hopper with NVLink and 400 Gb/s between nodes, Ada on PCIe 4, or one CPU core on gloo."""
    if request.device == "cpu":
        return Machine(flops=5e10, within=1e9, across=1e8, small=16)
    half = {"fp32": 0.5, "fp8": 1.6}.get(request.precision, 1.0)
    if request.interconnect == "pcie":
        return Machine(flops=1.1e14 * half, within=2e10, across=1e10, small=256)
    return Machine(flops=4.5e14 * half, within=3.5e11, across=4e10, small=256)


def step_seconds(architecture: Architecture, request: Request, layout: Layout) -> float:
    """Assumed seconds of one optimizer step: computation, recomputation, exposed communication and the pipeline's bubble."""
    a, m = architecture, machine(request)
    e = element_bytes(request.precision)
    tp, pp, cp, vp = layout.tp, layout.pp, layout.cp, layout.vp or 1
    tokens = request.seq * layout.micro_batch / cp  # of a microbatch, on this GPU
    message = tokens * a.hidden_size * e  # bytes of one activation [seq, micro_batch, hidden]

    output = 2 * a.hidden_size * a.vocab_size
    layer = (a.flops_per_token(request.seq) / 3 - output) / a.num_layers  # forward, a token
    if layout.recompute == "none":
        again = 0.0
    elif layout.recompute == "full":
        again = layer
    else:
        mlp = 2 * (a.active_mlps_per_layer * a.mlp_parameters + a.router_parameters)
        again = 2 * request.seq * a.attention_width if request.device == "cpu" else mlp
    # The pipeline moves at the pace of its last stage, which has the output layer besides its share of the layers.
    operations = a.num_layers / pp * (3 * layer + again) + 3 * output
    efficiency = tokens / (tokens + m.small * tp)  # small and narrow products run below the machine's rate
    compute = operations * tokens / tp / (m.flops * efficiency)

    layers = a.num_layers / pp
    exchanges = 6 if layout.recompute == "full" else 5 if layout.recompute == "selective" and request.device == "gpu" else 4
    tp_link = m.within if tp <= request.gpus else m.across
    communication = layers * exchanges * 2 * (tp - 1) / tp * message / tp_link  # all-reduces, or their two halves
    cp_link = m.within if tp * cp <= request.gpus else m.across
    keys_values = tokens * 2 * a.kv_width / tp * e
    communication += layers * 1.5 * (cp - 1) * keys_values / cp_link  # a ring, forward once and backward twice, half hidden
    if layout.ep > 1:  # tokens travel to their experts and back, forward and backward
        ep_link = m.within if tp * layout.ep <= request.gpus else m.across
        sent = a.active_mlps_per_layer * message / tp * (layout.ep - 1) / layout.ep
        communication += layers * (exchanges if request.device == "gpu" else 4) * sent / ep_link

    microbatches = layout.num_microbatches
    seconds = microbatches * (compute + communication) * (1 + (pp - 1) / (microbatches * vp))
    if pp > 1:
        pp_link = m.across if tp * cp * layout.dp >= request.gpus and request.nodes > 1 else m.within
        sends = 2 * vp * message / (tp if layout.sequence_parallel else 1) / pp_link
        seconds += microbatches * sends * (0.5 if vp > 1 else 1.0)  # the interleaved schedule hides about half
    replicas = layout.dp * cp
    experts = expert_parameters(a, layout)  # a replica of them is ep times rarer
    parameters = sum(stage_parameters(a, layout, 0)) - experts
    dp_link = m.across if request.nodes > 1 else m.within
    moved = parameters * (replicas - 1) / replicas + experts * (1 - layout.ep / replicas)
    reduction = (request.grad_bytes + e) * moved * request.trainable / dp_link
    return seconds + max(0.0, reduction - compute)  # overlapped with one microbatch
