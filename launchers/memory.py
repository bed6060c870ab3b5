"""How much memory one step of training takes on one GPU (or in one CPU process).

Counts the tensors that Megatron-Core 0.15.3 with Transformer Engine 2.12 keeps: parameters, the gradient buffer, Adam's
states, what autograd saves in each layer, and the logits. The method is that of Korthikanti et al. 2022, "Reducing activation
recomputation in large transformer models" (arXiv:2205.05198), redone for RMSNorm, gated MLPs, grouped queries, fused
attention (no s x s matrix) and no dropout; docs/plan.md has the formulas. Pure arithmetic: no torch, NeMo or Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_ext.architecture import Architecture
from nemo_ext.chunks import chunk_tokens
from nemo_ext.pipeline import chunk_layers

GiB = 2**30

# What a process takes beside the tensors counted here, none of it in `torch.cuda.max_memory_allocated`. Measured at the end of
# runs on H100 and H200 (docs/plan.md), NCCL on two GPUs only; the allocator's gaps are an allowance. On a CPU all is measured.
CUDA_CONTEXT = 2.1 * GiB  # driver context, loaded kernels, cuBLAS and cuDNN handles, Transformer Engine's workspaces
NCCL_BUFFERS = 1.6 * GiB  # communicators of the data, tensor and pipeline groups
FRAGMENTATION = 0.03  # of activations and logits: reserved by the allocator, not in use
# A CUDA graph of a step, an allowance: the driver's record of each kernel (NVIDIA's CCCL #3768 found 10 KiB), of which a layer's
# forward and backward passes start so many. One whole run was measured, the 1B's: 0.08 GiB more outside torch, 0.12 allowed for.
GRAPH_KERNEL = 16 * 2**10
LAYER_KERNELS = 60
IMPORTED_PROCESS = 0.8 * GiB  # resident size of a CPU process that has imported NeMo
HEAP = 0.30  # of all tensors on a CPU: pages that malloc keeps when they are freed, and the optimizer's temporaries
SAVED = 0.5  # copies of what a CPU process saves, beside it

# Bytes per logit at the peak of the cross entropy, on a GPU in half precision. "native" is Megatron's compiled one: logits, their
# fp32 copy, and one more fp32 tensor that its in-place updates seem to become under torch.compile (inferred from a measured peak,
# not from a profile). "unfused" runs in place on one fp32 copy; "te" writes the gradient over the logits.
LOGIT_BYTES = {"native": 10, "unfused": 6, "te": 2}


@dataclass(frozen=True)
class Tower:
    """An encoder with its projector, whole on each GPU of the first pipeline stage. Sizes are of the encoder."""

    name: str
    parameters: int  # with the projector's
    trained: int  # of them, those with gradients
    projector: int  # parameters
    layers: int  # that are computed
    hidden_size: int
    ffn_hidden_size: int
    positions: int  # of one input
    embeddings: int  # of the decoder's, that one input becomes
    keeps: bool  # its layers' activations, for a backward pass


@dataclass(frozen=True)
class Request:
    """What is to be trained on what. `None` leaves the choice to the planner."""

    nodes: int
    gpus: int  # per node; processes on a CPU
    gpu_memory: float  # bytes usable on each GPU; on a CPU, RAM for each process
    device: str  # "gpu" or "cpu"
    seq: int  # tokens
    global_batch: int  # sequences a step
    micro_batch: int | None = None
    tp: int | None = None
    pp: int | None = None
    vp: int | None = None  # model chunks per pipeline stage; 1 asks for none
    cp: int | None = None
    ep: int | None = None
    sequence_parallel: bool | None = None
    precision: str = "bf16"  # "bf16", "fp16", "fp32" or "fp8"
    fp8_recipe: str = "delayed"  # of `nemo_ext.gpus`, HOPPER_FP8
    recompute: str = "auto"  # "auto", "none", "selective" or "full"
    distributed_optimizer: bool = True
    grad_bytes: int = 4  # per element of the main gradient buffer
    optimizer_bytes: int | None = None  # per trainable parameter; None: 12 (fp32 master and two moments), 8 for fp32 weights
    trainable: float = 1.0  # fraction of the parameters that have gradients and optimizer states (adapters: far below 1)
    statistics: float = 0.0  # bytes that an adapter keeps of each of its parameters beside that, on every data parallel rank
    nf4: bool = False  # the frozen weights of the layers' linears are in 4 bits (`nemo_ext.adapters.nf4`)
    double_quant: bool = True  # and the magnitudes of their blocks in 8
    fp8_params: bool = False  # the parameters themselves are FP8 (`fp8_param_gather`): no bf16 copy beside the FP8 ones
    cross_entropy: str = "native"  # "native", "te", "unfused", or with the output layer (`nemo_ext.platform`) "fused" and "fp8"
    tower: Tower | None = None  # of a model with a sense
    gpu: str | None = None  # kind of `nemo_ext.gpus`; None: not said, rates are an H100's and no time is shown
    instead_of: str | None = None  # the name of a GPU that is none of the kinds, or why this one is taken
    interconnect: str | None = None  # between the GPUs of a node: "nvlink" or "pcie"; None: the kind's
    cores: float = 1.0  # of a CPU process
    packed: bool = False  # whether rows hold several conversations that do not see each other
    attended: int | None = None  # tokens of one of them, where it is known; None: seq
    balanced: bool = False  # see Layout
    cuda_graphs: bool | None = False  # a step's kernels are one CUDA graph; None: the planner's choice


@dataclass(frozen=True)
class Layout:
    """How the model and the batch are spread. tp x pp x cp x dp processes in all, and ep divides dp x cp of them: the experts of
    a layer lie on ep of the processes that otherwise hold the same weights."""

    tp: int
    pp: int
    vp: int | None
    cp: int
    dp: int
    sequence_parallel: bool
    micro_batch: int
    num_microbatches: int
    recompute: str  # "none", "selective" or "full"
    ep: int = 1
    balanced: bool = False  # the last pipeline stage has fewer layers, for its output layer (`nemo_ext.pipeline`)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest pipeline stage at the fullest moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    other: float

    @property
    def total(self) -> float:
        """All kinds together."""
        return self.allocated + self.other

    @property
    def allocated(self) -> float:
        """What torch allocates: compare with `torch.cuda.max_memory_allocated()`."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def element_bytes(precision: str) -> int:
    """Bytes of a parameter and of an activation between modules."""
    return 4 if precision == "fp32" else 2


def nf4_bytes(double_quant: bool, tp: int) -> float:
    """Bytes of an element in NF4: 4 bits, and for each 64 elements a magnitude, fp32 or of 8 bits with a scale for each 256.

    Tensor ranks round their magnitudes together, and keep their values in fp32.
    """
    return 0.5 + ((1 + 4 / 256) / 64 if double_quant and tp == 1 else 4 / 64)


def chunks(architecture: Architecture, layout: Layout) -> list[float]:
    """Decoder layers of each model chunk in the order of the data; chunk c is on stage c % pp."""
    if layout.balanced:
        return list(chunk_layers(architecture, layout.pp, layout.vp))
    count = layout.pp * (layout.vp or 1)
    return [architecture.num_layers / count] * count


def expert_parameters(architecture: Architecture, layout: Layout, stage: int = 0) -> float:
    """Parameters in the experts that one GPU of a pipeline stage holds; 0 in a dense model."""
    a = architecture
    if a.num_moe_experts is None:
        return 0.0
    return sum(chunks(a, layout)[stage :: layout.pp]) * a.num_moe_experts * a.mlp_parameters / (layout.tp * layout.ep)


def stage_parameters(architecture: Architecture, layout: Layout, stage: int) -> tuple[float, float]:
    """Parameters that one GPU of a pipeline stage holds: (inside the layers' linear modules, all others).

    Linear weights and embeddings are divided by TP; norms and routers are not; experts by EP too. Tied embeddings exist on the
    first and the last stage.
    """
    a, tp = architecture, layout.tp
    layers = sum(chunks(a, layout)[stage :: layout.pp])
    mlps = expert_parameters(a, layout, stage) or layers * a.mlp_parameters / tp
    linear = layers * a.hidden_size * (2 * a.attention_width + 2 * a.kv_width) / tp + mlps
    others = layers * (a.norms_per_layer * a.norm_parameters + a.qk_norm_parameters + a.router_parameters)
    others += layers * (a.split_bias_parameters / tp + a.whole_bias_parameters)
    embedding = a.padded_vocab_size * a.hidden_size / tp
    first, last = stage == 0, stage == layout.pp - 1
    if first:
        others += embedding
    if last:
        others += a.norm_parameters
        if not (first and a.share_embeddings_and_output_weights):
            others += embedding
        if a.add_output_bias:
            others += a.padded_vocab_size / tp
    return linear, others


def layers_in_flight(architecture: Architecture, layout: Layout, stage: int) -> float:
    """Layers x microbatches whose activations a stage holds at its peak.

    1F1B: min(m, pp - stage) microbatches of the stage's layers. Interleaved (arXiv:2104.04473): Megatron's warm-up of
    2 (pp - stage - 1) + (vp - 1) pp chunks, and one more; of layers/(pp vp) layers each that is on the first stage
    layers x (1 + (pp - 1)/(pp vp)). Chunks take turns every pp microbatches, the last one first in the backward pass.
    """
    own, pp = chunks(architecture, layout)[stage :: layout.pp], layout.pp
    vp, total = len(own), layout.num_microbatches * len(own)
    ahead = min(total, pp - stage - 1 if vp == 1 else 2 * (pp - stage - 1) + (vp - 1) * pp)
    held = peak = sum(own[number // pp % vp] for number in range(ahead))
    for number in range(min(total - ahead, pp * vp)):
        held += own[(ahead + number) // pp % vp]
        peak = max(peak, held)
        held -= own[vp - 1 - number // pp % vp]
    return peak


def saved_per_token(architecture: Architecture, request: Request, layout: Layout, recompute: str) -> float:
    """Bytes that autograd saves in one layer for one token of this GPU's share of the sequence, each tensor counted once.

    Of experts, every GPU is taken to get its equal share of the tokens, as the balancing loss wants it.
    """
    a, tp = architecture, layout.tp
    shard = tp if layout.sequence_parallel else 1  # of the tensors between the linear layers
    e = element_bytes(request.precision)
    h, width, kv, ffn = a.hidden_size, a.attention_width, a.kv_width, a.ffn_hidden_size
    if recompute == "full":
        return e * h / shard  # the layer's input
    if request.device == "cpu":
        return _saved_per_token_cpu(a, request.seq, e, tp, shard, selective=recompute == "selective")
    fp8 = request.precision == "fp8"
    linear = 1 if fp8 and request.trainable == 1 else e  # a linear layer keeps its input in the precision of its product
    shared = 1 if a.parallel_residual else 2  # norms before linear layers
    norms = shared * (e + linear) * h / shard  # a norm keeps its input; the linear layer after it, the norm's output
    attention = (e * (2 * width + 2 * kv) + 4 * a.num_attention_heads) / tp  # q, k, v after RoPE, output; fp32 log-sum-exp
    if fp8:
        attention += width / tp  # the output projection's own copy of its input
    if a.qk_layernorm or a.qk_layernorm_per_head:
        attention += e * (width + kv) / tp
    if a.attn_logit_softcapping is not None:  # unfused: the capped scores, their softmax in fp32 and in this precision
        attention += (2 * e + 4) * a.num_attention_heads * request.seq / tp
    if a.norms_per_layer == 4:  # inputs of the norms after attention and MLP
        norms += 2 * e * h / shard
    copies = a.active_mlps_per_layer
    halves = 2 if a.gated_linear_unit else 1
    mlp = copies * (halves * e + linear) * ffn / tp  # input of the activation (gated: two halves), and of the second linear layer
    if a.num_moe_experts is not None:
        norms += (e - linear) * h / shard  # the router keeps the norm's output as it is
        mlp += copies * linear * h  # and the experts a copy of each token, which tensor parallelism does not split
        if recompute == "selective":  # router and experts, from the norm's output
            return norms + attention
    if recompute == "selective":  # the MLP with its norm, from the norm's input
        return norms - linear * h / shard + attention
    return norms + attention + mlp


def _saved_per_token_cpu(a: Architecture, seq: int, e: int, tp: int, shard: int, selective: bool) -> float:
    """The same on a CPU: Megatron's own modules and torch's unfused operators.

    RMSNorm keeps its input, the normalised input and its output; attention the scores after softmax [heads, seq] and keys and
    values repeated for every head; the gated activation both halves, its own two factors and its product; an expert also its
    tokens and the activation before it is weighted. `selective` recomputes attention from q, k and the projection they were
    split from.
    """
    h, width, kv, ffn = a.hidden_size, a.attention_width, a.kv_width, a.ffn_hidden_size
    norms = (a.norms_per_layer * (3 * h + 1)) / shard
    mixed = width + 2 * kv
    normed = a.qk_layernorm or a.qk_layernorm_per_head
    qk_norm = 2 * width + kv + mixed if normed else 0
    if selective:
        attention = 2 * width + kv + (0 if normed else mixed)
    else:  # scores that are capped are kept before the softmax too
        attention = 4 * width + (1 if a.attn_logit_softcapping is None else 2) * a.num_attention_heads * seq
    dense = (5 if a.gated_linear_unit else 3) * ffn / tp
    mlp = dense if a.num_moe_experts is None else a.active_mlps_per_layer * (6 * ffn / tp + h)
    return e * (norms + (qk_norm + attention) / tp + mlp)


def working_per_token(architecture: Architecture, request: Request, layout: Layout) -> float:
    """Bytes per token of the gradients that one layer's backward pass holds at once, beside what was saved."""
    a, e = architecture, element_bytes(request.precision)
    copies = a.active_mlps_per_layer
    h = (2 if a.num_moe_experts is None else 2 + copies) * a.hidden_size
    if request.device == "cpu":
        return e * (h + max(2 * a.num_attention_heads * request.seq, 4 * copies * a.ffn_hidden_size) / layout.tp)
    return e * (h + 3 * copies * a.ffn_hidden_size / layout.tp)


def logits_memory(architecture: Architecture, request: Request, layout: Layout) -> float:
    """Bytes at the peak of the output layer and its cross entropy, [seq, micro_batch, vocabulary/tp]."""
    e = element_bytes(request.precision)
    tokens = request.seq * layout.micro_batch / layout.cp
    vocabulary = architecture.padded_vocab_size / layout.tp
    if request.cross_entropy in ("fused", "fp8"):
        return fused_logits_memory(architecture, request, layout, tokens, vocabulary)
    if e == 4:
        per_logit = 4  # every implementation works in place when the logits are fp32 already ("native" is not used then)
    elif request.device == "cpu":
        per_logit = LOGIT_BYTES["unfused"]
    else:
        per_logit = LOGIT_BYTES[request.cross_entropy]
    if architecture.final_logit_softcapping is not None:
        per_logit += e  # the hyperbolic tangents, for their gradient
    # before it is added to the gradient buffer; frozen weights have none
    weight_gradient = e * vocabulary * architecture.hidden_size if request.trainable == 1 else 0.0
    return max(per_logit * tokens * vocabulary, e * tokens * vocabulary + weight_gradient)


def fused_logits_memory(a: Architecture, request: Request, layout: Layout, tokens: float, vocabulary: float) -> float:
    """The same of an output layer that is one with its loss (`nemo_ext.platform.output_layer`), in half precision.

    The logits' gradient is kept for the weight's, of one byte each in FP8. Beside it, or alone where the weight is frozen, there
    are logits and, in FP8, gradients of a chunk of tokens. Of [tokens, hidden] there are the inputs' gradient before and after it
    is scaled, inputs that were gathered, and scaled inputs for the weight's gradient, in FP8 too. That one's placeholder is never
    given back.
    """
    fp8, learnt = request.cross_entropy == "fp8", request.trainable == 1
    hidden = 2 * tokens * a.hidden_size
    chunk = min(tokens, chunk_tokens(int(vocabulary))) * vocabulary
    kept = (1 if fp8 else 2) * tokens * vocabulary if learnt else 0.0
    forward = 3 * chunk if fp8 else 0.0 if learnt else 2 * chunk
    backward = hidden + (hidden * (2 if fp8 else 1) if learnt else 0.0)
    gathered = hidden if layout.sequence_parallel else 0.0
    placeholder = 2 * vocabulary * a.hidden_size if learnt else 0.0
    return kept + gathered + hidden + max(forward, backward) + placeholder


def tower_memory(architecture: Architecture, request: Request, layout: Layout) -> tuple[float, float]:
    """Bytes that the tower's forward passes leave for the backward, and of one layer at work, on a GPU of the first stage.

    A micro batch is taken to be all images. A layer with fused attention keeps the inputs of its norms and linears, its queries,
    keys, values and the activation's input; the projector its input, its middle and its output.
    """
    tower, e = request.tower, element_bytes(request.precision)
    inputs = request.seq * layout.micro_batch / tower.embeddings
    h, ffn = tower.hidden_size, tower.ffn_hidden_size
    layer = e * (8 * h + 2 * ffn)
    kept = layer * tower.layers if tower.keeps and layout.recompute != "full" else e * h * tower.layers if tower.keeps else 0.0
    projected = e * (h * tower.positions / tower.embeddings + 3 * architecture.hidden_size) * tower.embeddings
    in_flight = min(layout.num_microbatches, layout.pp)
    return in_flight * inputs * (kept * tower.positions + projected), inputs * tower.positions * layer


def estimate_stage(architecture: Architecture, request: Request, layout: Layout, stage: int) -> Memory:
    """Memory of one GPU of one pipeline stage (0 .. pp - 1)."""
    e = element_bytes(request.precision)
    linear, others = stage_parameters(architecture, layout, stage)
    parameters = linear + others
    weights = e * parameters
    if request.nf4:
        weights = nf4_bytes(request.double_quant, layout.tp) * linear + e * others
    if request.precision == "fp8" and not request.fp8_params:
        weights += 2 * linear  # FP8 copies, as they are and transposed, kept over the microbatches of a step
    adapter = parameters * request.trainable if request.trainable < 1 else 0.0
    weights += e * adapter
    gradients = request.grad_bytes * parameters * request.trainable
    state_bytes = request.optimizer_bytes if request.optimizer_bytes is not None else 8 + (4 if e == 2 else 0)
    shards = layout.dp * layout.cp if request.distributed_optimizer else 1
    experts = expert_parameters(architecture, layout, stage)  # there are ep times fewer copies to shard their states over
    shares = (parameters - experts) / shards + experts / max(1, shards // layout.ep)
    optimizer = state_bytes * shares * request.trainable
    if request.statistics:
        optimizer += request.statistics * adapter

    tokens = request.seq * layout.micro_batch / layout.cp
    kept = saved_per_token(architecture, request, layout, layout.recompute)
    saved = layers_in_flight(architecture, layout, stage) * tokens * kept
    working = tokens * working_per_token(architecture, request, layout)
    if layout.recompute != "none":  # one layer's activations come back while its gradient is computed
        working += tokens * max(0.0, saved_per_token(architecture, request, layout, "none") - kept)
    if request.nf4:  # the largest weight of a layer, while it is multiplied by
        halves = 2 if architecture.gated_linear_unit else 1
        widest = max(halves * architecture.ffn_hidden_size, architecture.attention_width + 2 * architecture.kv_width)
        working += e * widest * architecture.hidden_size / layout.tp
    if request.tower is not None and stage == 0:
        tower = request.tower
        weights += e * tower.parameters
        gradients += request.grad_bytes * tower.trained
        optimizer += state_bytes * tower.trained / shards
        kept, at_work = tower_memory(architecture, request, layout)
        saved += kept
        working = max(working, at_work)
    logits = 0.0
    if stage == layout.pp - 1:
        shard = layout.tp if layout.sequence_parallel else 1
        saved += 2 * e * tokens * architecture.hidden_size / shard  # the final norm's input and output
        logits = logits_memory(architecture, request, layout)
        if request.cross_entropy == "fp8":  # the output layer's weight, transposed
            weights += architecture.padded_vocab_size * architecture.hidden_size / layout.tp
    # A layer's backward pass comes after the logits are gone: only the larger of the two counts.
    activations = saved + max(0.0, working - logits)
    if request.device == "cpu":
        # Half of a process's part of a checkpoint is copied while it is written, when the activations are gone.
        saving = max(0.0, SAVED * ((e * adapter or weights) + optimizer) - activations - logits)
        other = IMPORTED_PROCESS + saving + HEAP * (weights + gradients + optimizer + activations + logits)
    else:
        other = CUDA_CONTEXT + FRAGMENTATION * (activations + logits)
        if request.nodes * request.gpus > 1:
            other += NCCL_BUFFERS
        if request.cuda_graphs:  # the memory of its activations stays its own: an evaluation's layer and logits lie beside it
            layers = sum(chunks(architecture, layout)[stage :: layout.pp])
            other += GRAPH_KERNEL * LAYER_KERNELS * layers * layout.num_microbatches
            other += tokens * saved_per_token(architecture, request, layout, "none") + logits
    return Memory(weights, gradients, optimizer, activations, logits, other)


def estimate(architecture: Architecture, request: Request, layout: Layout) -> Memory:
    """Memory of one GPU of the fullest pipeline stage, in bytes by kind."""
    stages = range(layout.pp)
    return max((estimate_stage(architecture, request, layout, stage) for stage in stages), key=lambda memory: memory.total)
