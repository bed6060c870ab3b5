"""How long a step takes under a layout: a small model, fitted to what was measured on H100 and H200.

Work is counted (operations of products and of attention, bytes of element-wise kernels, of the optimizer and between GPUs) and
divided by the rates of the GPU's data sheet (`nemo_ext.gpus`) times the share of them that runs sustained: the constants below,
which `benchmarks/fit_cost.py` fits. docs/plan.md has their errors. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from launchers.memory import Layout, Request, chunks, element_bytes, expert_parameters, stage_parameters
from nemo_ext.architecture import Architecture
from nemo_ext.gpus import KINDS, PCIE, PCIE_4


@dataclass(frozen=True)
class Constants:
    """What is fitted."""

    products: float  # share of the peak that products in bf16 sustain, clocks under full load included
    fp8: float  # the same in FP8, of FP8's peak
    attention_64: float  # share of bf16's peak in cuDNN's attention, heads of 64 or less, causal at half its square
    attention_128: float  # heads of 128 or more; between them on a line
    memory: float  # share of the memory's bandwidth in element-wise kernels, for the bytes counted here
    link: float  # share of NVLink in tensor parallelism; also stands for what narrower products lose
    adapter: float  # times that an adapter reads or writes all inputs and outputs of its linears, forward and backward
    handover: float  # seconds in which a pipeline stage waits for its neighbour, each time it is handed a micro batch
    host_layer: float  # seconds in which Python starts the kernels of a frozen layer, forward and backward: the least it takes
    host_weights: float  # more of them where its weights are trained
    host_adapter: float  # more of them for its adapters


FITTED = Constants(  # by benchmarks/fit_cost.py write=true
    products=0.72,
    fp8=0.686,
    attention_64=0.324,
    attention_128=0.391,
    memory=0.638,
    link=0.408,
    adapter=3.48,
    handover=0.00205,
    host_layer=0.00517,
    host_weights=0.00279,
    host_adapter=0.005,
)
ERROR = 0.05  # root mean square, of rows that were left out of the fit with all that are like them
HOST_ERROR = 0.17  # the same where Python is what takes the time
MEASURED_GPUS, MEASURED_SEQ = 2, (2048, 8192)  # the most GPUs, the shortest and the longest sequences

# Round assumptions: messages between stages, replicas, experts and the parts of a sequence were not measured, nor a CPU's.
MESSAGES = 0.7  # share of the links' rates
CPU_CORE = 5e10  # floating-point operations a second of one core
CPU_MEMORY = 1e10  # bytes a second of a process
CPU_LINK = 1e9  # gloo between two processes of a machine: 0.3 to 1.3 GB/s seen, on two busy cores
CPU_NETWORK = 5e8  # and over Ethernet of 10 Gb/s, the least that servers are sold with: half of it
CPU_MESSAGE = 1e-3  # seconds of a small message over gloo: 0.1 ms on idle cores, 3 ms on busy ones
CPU_ERROR = 0.25  # by so much a split model must be quicker than replicas on a CPU: neither was measured


@dataclass(frozen=True)
class Rates:
    """Sustained rates of one device: operations and bytes a second."""

    products: float
    layers: float  # products of the layers' linears, which FP8 quickens
    attention: float
    memory: float
    tensor: float  # to a GPU of the same node, with tensor parallelism
    within: float  # otherwise
    across: float  # to another node


def rates(architecture: Architecture, request: Request, c: Constants = FITTED) -> Rates:
    """What a device sustains of its data sheet; of a CPU a round assumption."""
    if request.device == "cpu":
        flops = CPU_CORE * request.cores
        return Rates(flops, flops, flops, CPU_MEMORY, CPU_LINK, CPU_LINK, CPU_NETWORK)
    kind = KINDS[request.gpu or "h100"]
    peak = kind.fp32 if request.precision == "fp32" else kind.bf16
    products = c.products * peak
    between = min(1.0, max(0.0, (architecture.kv_channels - 64) / 64))
    attention = (c.attention_64 + between * (c.attention_128 - c.attention_64)) * peak
    layers = c.fp8 * kind.fp8 if request.precision == "fp8" and kind.fp8 else products
    link = PCIE_4 if (request.interconnect or kind.interconnect) == PCIE else kind.link
    messages = (c.link * link, MESSAGES * link, MESSAGES * kind.network)
    return Rates(products, layers, attention, c.memory * kind.bandwidth, *messages)


@dataclass(frozen=True)
class Expected:
    """What a step is expected to take. `error`: the share by which it was off, in the root mean square, where rows like it were
    left out of the fit; nothing is known of it where the plan is extrapolated."""

    seconds: float
    tokens_per_s: float  # of all devices
    tflops: float  # of each device, by `Architecture.flops_per_token`
    error: float
    waits_for_python: bool  # whether the host starts kernels for longer than the GPU computes
    extrapolated: tuple[str, ...]  # in what the plan is unlike all that was measured


def expect(architecture: Architecture, request: Request, layout: Layout) -> Expected:
    """The step that a layout is expected to have."""
    seconds = step_seconds(architecture, request, layout)
    tokens = request.seq * request.global_batch / seconds
    adapter = round(request.trainable * architecture.num_parameters()) if request.trainable < 1 else None
    flops = architecture.flops_per_token(request.seq, adapter)
    tflops = tokens * flops / (request.nodes * request.gpus) / 1e12
    why = (error(architecture, request, layout), waits_for_python(architecture, request, layout))
    return Expected(seconds, tokens, tflops, *why, tuple(_unmeasured(architecture, request, layout)))


def error(architecture: Architecture, request: Request, layout: Layout) -> float:
    """The share by which a step's expected time may be off."""
    if request.device == "cpu":
        return CPU_ERROR
    return HOST_ERROR if waits_for_python(architecture, request, layout) else ERROR


def waits_for_python(a: Architecture, r: Request, layout: Layout, c: Constants = FITTED) -> bool:
    """Whether the host starts a micro batch's kernels for longer than the GPU computes them."""
    return python_share(a, r, layout, c) > 1


def python_share(a: Architecture, r: Request, layout: Layout, c: Constants = FITTED) -> float:
    """What the host needs to start a micro batch's kernels, as a share of the GPU's time for them."""
    return host_seconds(a, r, layout, c) / max(stage_seconds(a, r, layout, c))


def _unmeasured(a: Architecture, r: Request, layout: Layout) -> list[str]:
    """In what a plan goes beyond the measurements that the constants were fitted to."""
    if r.device == "cpu":
        return ["one CPU was measured, once"]
    kind = KINDS[r.gpu or "h100"]
    found = [] if kind.measured else [f"{kind.title} by its data sheet"]
    if r.instead_of:
        found.append(f"{r.instead_of} as if it were {kind.title}")
    if r.nodes > 1:
        found.append(f"{r.nodes} nodes")
    if r.nodes * r.gpus > MEASURED_GPUS:
        found.append(f"{r.nodes * r.gpus} GPUs ({MEASURED_GPUS} were measured)")
    found += [f"{name.upper()} {size}" for name in ("dp", "cp", "ep") if (size := getattr(layout, name)) > 1]
    if layout.tp > 1 and layout.pp > 1:
        found.append("TP with PP")
    if not MEASURED_SEQ[0] <= r.seq <= MEASURED_SEQ[1]:
        found.append(f"seq {r.seq}")
    if r.precision not in ("bf16", "fp8"):
        found.append(r.precision)
    if layout.recompute != "none":
        found.append("recomputation")
    if r.cuda_graphs and layout.pp > 1:
        found.append("a CUDA graph of a pipeline")
    if r.nf4:
        found.append("NF4")  # its rows are of an older program
    if r.cross_entropy in ("fused", "fp8") and r.nodes * r.gpus > 1:
        found.append("a fused output layer on several GPUs")
    if a.num_moe_experts is not None:
        found.append("experts")
    if a.attn_logit_softcapping is not None:
        found.append("capped attention")
    if r.tower is not None:
        found.append("without the tower's time")
    if r.packed:
        found.append("packed rows as if each were one conversation")
    return found


def step_seconds(architecture: Architecture, request: Request, layout: Layout, c: Constants = FITTED) -> float:
    """Seconds of one optimizer step."""
    a, rate = architecture, rates(architecture, request, c)
    pp, vp, microbatches = layout.pp, layout.vp or 1, layout.num_microbatches
    host = host_seconds(a, request, layout, c)
    slowest = max(*stage_seconds(a, request, layout, c), host)  # every stage waits for it
    layers = a.num_layers / pp * sum(layer_parts(a, request, layout, c).values())
    seconds = microbatches * slowest + (pp - 1) / vp * max(layers, host)
    if pp > 1:
        across = layout.tp * layout.cp * layout.dp >= request.gpus and request.nodes > 1
        message = _tokens(request, layout) * a.hidden_size * element_bytes(request.precision)
        message /= layout.tp if layout.sequence_parallel else 1
        handover = (c.handover if request.device == "gpu" else CPU_MESSAGE) + message / (rate.across if across else rate.within)
        seconds += microbatches * 2 * vp * handover * (0.5 if vp > 1 else 1.0)  # the interleaved schedule hides about half
    return seconds + update_seconds(a, request, layout, c) + max(0.0, reduction_seconds(a, request, layout, c) - slowest)


def stage_seconds(a: Architecture, r: Request, layout: Layout, c: Constants = FITTED) -> list[float]:
    """Seconds of the GPU for a micro batch on each pipeline stage, forward and backward."""
    layer, layers = sum(layer_parts(a, r, layout, c).values()), chunks(a, layout)
    found = [sum(layers[stage :: layout.pp]) * layer for stage in range(layout.pp)]
    found[-1] += sum(output_parts(a, r, layout, c).values())
    return found


def layer_parts(a: Architecture, r: Request, layout: Layout, c: Constants = FITTED) -> dict[str, float]:
    """Seconds of one layer, forward and backward, of one micro batch on one GPU, by kind."""
    rate, e, tp = rates(a, r, c), element_bytes(r.precision), layout.tp
    tokens, on_gpu = _tokens(r, layout), r.device == "gpu"
    h, width, kv, ffn = a.hidden_size, a.attention_width, a.kv_width, a.active_mlps_per_layer * a.ffn_hidden_size
    halves = 2 if a.gated_linear_unit else 1
    frozen = r.trainable < 1
    full, selective = layout.recompute == "full", layout.recompute == "selective"

    linear = (a.flops_per_token(0) / 3 - 2 * h * a.vocab_size) / a.num_layers  # forward, a token
    scores = (a.flops_per_token(r.attended or r.seq) - a.flops_per_token(0)) / 3 / a.num_layers
    mlp = 2 * (a.active_mlps_per_layer * a.mlp_parameters + a.router_parameters)
    operations = linear * (2 + r.trainable + full) + mlp * (selective and on_gpu)
    attended = scores * (3 + full + (selective and not on_gpu))

    # Elements read and written of a norm with the residual beside it, forward and backward: 12 of its width; for rotary positions
    # and copies of queries, keys and values: 6; the activation reads its halves and writes their product, backward three and two.
    normed = 12 * a.norms_per_layer * h / (tp if layout.sequence_parallel else 1)
    moved = e * (normed + (6 * (width + 2 * kv) + (3 * halves + 2) * ffn) / tp)
    moved *= 1.4 if full else 1.0
    moved += e * (halves + 1) * ffn / tp if selective and on_gpu else 0.0
    if a.attn_logit_softcapping is not None:  # unfused: scores are written and read several times
        moved += 8 * e * a.num_attention_heads * r.seq / tp
    if r.precision == "fp8":  # activations and gradients are written twice, as they are and transposed, where no norm does it
        moved += (e + 2) * (2 * width + 2 * kv + 2 * h + (1 + halves) * ffn) / tp
    adapter = 0.0
    if 0 < r.trainable < 1:  # of all linears
        adapter = c.adapter * e * (4 * h + 2 * width + 2 * kv + (1 + halves) * (h + ffn)) / tp

    # A layer gathers and scatters its tokens twice forward and twice backward, and gathers inputs again for trained weights.
    exchanges = 8 + (2 if layout.sequence_parallel and not frozen else 0) + (4 if full else 2 if selective and on_gpu else 0)
    message = tokens * h * e
    link = rate.tensor if tp <= r.gpus else rate.across
    communication = exchanges * (tp - 1) / tp * message / link
    if tp > 1 and not on_gpu:
        communication += exchanges * CPU_MESSAGE
    link = rate.within if tp * layout.cp <= r.gpus else rate.across
    ring = (layout.cp - 1) * tokens * 2 * kv / tp * e / link  # keys and values, forward once and backward twice, half hidden
    communication += 1.5 * ring
    if layout.ep > 1:  # tokens travel to their experts and back, forward and backward
        link = rate.within if tp * layout.ep <= r.gpus else rate.across
        sent = a.active_mlps_per_layer * message / tp * (layout.ep - 1) / layout.ep
        communication += exchanges / 2 * sent / link
    narrow = (tokens + 16 * tp) / tokens if not on_gpu else 1.0
    return {
        "products": operations * tokens / tp / rate.layers * narrow,
        "attention": attended * tokens / tp / rate.attention,
        "element-wise": moved * tokens / rate.memory,
        "adapter": adapter * tokens / rate.memory,
        "communication": communication,
    }


def output_parts(a: Architecture, r: Request, layout: Layout, c: Constants = FITTED) -> dict[str, float]:
    """Seconds of the output layer and the loss of one micro batch, forward and backward. Its gradients are in FP8 on request.

    A logit is read or written six times, of a fused layer three times.
    """
    fused = r.cross_entropy in ("fused", "fp8")
    rate, tokens = rates(a, r, c), _tokens(r, layout)
    vocabulary = a.padded_vocab_size / layout.tp
    product = 2 * a.hidden_size * vocabulary * tokens
    gradients = (2 if r.trainable == 1 else 1) * product
    return {
        "products": product / rate.products + gradients / (rate.layers if r.cross_entropy == "fp8" else rate.products),
        "element-wise": (3 if fused else 6) * element_bytes(r.precision) * vocabulary * tokens / rate.memory,
    }


def host_seconds(a: Architecture, r: Request, layout: Layout, c: Constants = FITTED) -> float:
    """Seconds that Python needs to start the kernels of a stage's micro batch: no GPU is quicker, however short the sequence.
    A graph's kernels are started without it."""
    if r.device == "cpu" or r.cuda_graphs:
        return 0.0
    more = c.host_weights if r.trainable == 1 else c.host_adapter if r.trainable > 0 else 0.0
    again = {"none": 1.0, "selective": 7 / 6, "full": 4 / 3}[layout.recompute]  # forward is a third
    layers = max(sum(chunks(a, layout)[stage :: layout.pp]) for stage in range(layout.pp))
    return layers * (c.host_layer + more) * again


def update_seconds(a: Architecture, r: Request, layout: Layout, c: Constants = FITTED) -> float:
    """Seconds of clipping and Adam: all gradients are read, scaled and zeroed; a shard's weight, moments and gradient are read,
    all but the gradient written, and the weight once more in its own precision."""
    parameters = sum(stage_parameters(a, layout, 0)) * r.trainable
    shards = layout.dp * layout.cp if r.distributed_optimizer else 1
    return parameters * (16 + (28 + element_bytes(r.precision)) / shards) / rates(a, r, c).memory


def reduction_seconds(a: Architecture, r: Request, layout: Layout, c: Constants = FITTED) -> float:
    """Seconds of reducing gradients over the replicas and gathering what each has updated; one micro batch hides them. Tied
    embeddings are on two stages of a pipeline, which add up their gradients."""
    replicas, rate = layout.dp * layout.cp, rates(a, r, c)
    experts = expert_parameters(a, layout)  # a replica of them is ep times rarer
    parameters = sum(stage_parameters(a, layout, 0)) - experts
    moved = parameters * (replicas - 1) / replicas + experts * (1 - layout.ep / replicas)
    link = rate.within
    if r.nodes > 1 and layout.tp * layout.cp * layout.dp > r.gpus:  # not all replicas of a stage in one node
        members = max(1, r.gpus // layout.tp) if r.device == "gpu" else 1  # each GPU has an adapter, and NCCL a ring for each
        link = min(rate.within, members * rate.across)
    back = element_bytes(r.precision) if r.distributed_optimizer else r.grad_bytes  # updated weights, or the sums of gradients
    seconds = (r.grad_bytes + back) * moved * r.trainable / link
    if layout.pp > 1 and a.share_embeddings_and_output_weights and r.trainable == 1:  # the first and the last stage sum theirs
        ends = rate.across if r.nodes > 1 else rate.within
        seconds += r.grad_bytes * a.padded_vocab_size * a.hidden_size / layout.tp / ends
    return seconds


def _tokens(r: Request, layout: Layout) -> float:
    """Tokens of a micro batch on one GPU, before tensor parallelism."""
    return r.seq * layout.micro_batch / layout.cp
