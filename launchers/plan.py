"""How a model is spread over the machine: checks a layout, or chooses one, before anything starts.

`plan(architecture, request)` applies the rules that Megatron-Core 0.15.3, NeMo 2.7.3 and Transformer Engine assert once a job
is running, and the memory model of `launchers.memory`. A layout that breaks a rule or does not fit is refused in one line with
the nearest one that works. Pure arithmetic: no torch, NeMo or Megatron.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launchers.cost import Expected, error, expect, python_share, step_seconds
from launchers.memory import GiB, Layout, Memory, Request, chunks, estimate
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.gpus import KINDS, NVLINK, PCIE

__all__ = ["GiB", "Layout", "Memory", "Plan", "Request", "estimate", "plan"]

HEADROOM = 0.9  # a chosen layout fills at most this share of the memory where it can; one asked for may fill it all
SHARES = (HEADROOM, 0.95, 1.0)  # where nothing is left below one of them, the next
QUICKER = 0.8  # of the time that the chosen layout takes: a layout above HEADROOM that needs less is worth a word
TIE = 1.01  # a layout that is expected to be slower by less is taken if it is simpler: well under what the estimate distinguishes
MICROBATCH_TOKENS = 8192  # a chosen micro batch grows up to this; longer ones only cost memory
GRAPH_PYTHON = 0.8  # of the GPU's time, from which a graph brought 2 to 4 % (0.9 to 1.1); nothing at half of it
# Of the memory that a chosen graph's plan fills at most: one of LoRA planned to fill 0.89 ran out, 14.8 GiB reserved and unused.
GRAPH_MEMORY = 0.75
GRAPH_MICROBATCHES = 8  # a chosen graph has at most as many as one that was measured
CONTEXT_TOKENS = 8192  # a chosen context parallelism leaves each GPU at least this much of the sequence
SIZES = ("tp", "pp", "vp", "cp", "ep", "micro_batch")
FREE = {**dict.fromkeys(SIZES), "sequence_parallel": None, "recompute": "auto"}
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """A layout that works, what it needs and why it was chosen."""

    layout: Layout
    memory: Memory
    fits: bool
    parameters: int
    tokens_per_step: int
    why: list[str]
    request: Request
    expected: Expected | None  # None where the request does not say for which GPU

    def lines(self) -> list[str]:
        """The plan for people, as aligned text without markup."""
        layout, memory, request = self.layout, self.memory, self.request
        unit = "process" if request.device == "cpu" else "GPU"
        device = KINDS[request.gpu].title if request.gpu else unit
        device = f"{unit} taken for {device}" if request.instead_of else device
        split = f"TP {layout.tp}  PP {layout.pp}  VP {layout.vp or '-'}  CP {layout.cp}  DP {layout.dp}"
        split += f"  EP {layout.ep}" if layout.ep > 1 else ""
        split += f"  sequence parallel {'on' if layout.sequence_parallel else 'off'}  recompute {layout.recompute}"
        count = layout.num_microbatches
        batch = f"{request.global_batch} x {request.seq} tokens = {layout.dp} x {count} micro batch{'es' if count > 1 else ''}"
        memory_each = f"{request.gpu_memory / GiB:.1f} GiB each"
        rows = [
            ("machine", f"{request.nodes} x {request.gpus} {device}, {memory_each}, {request.precision}"),
            ("layout", split),
            ("batch", f"{batch} of {layout.micro_batch}; {self.tokens_per_step:,} tokens a step"),
            ("parameters", f"{self.parameters:,}"),
        ]
        if (tower := request.tower) is not None:
            sizes = f"{tower.parameters - tower.projector:,} parameters, projector {tower.projector:,}; {tower.trained:,} trained"
            rows.append(("tower", f"{tower.name}: {sizes}; {tower.embeddings} embeddings an input"))
        lines = [f"{name:<11} {text}" for name, text in rows]
        for name in ("weights", "gradients", "optimizer", "activations", "logits", "other", "total"):
            size = getattr(memory, name)
            label = "memory" if name == "weights" else ""
            lines.append(f"{label:<11} {name:<11} {size / GiB:8.2f} GiB a {unit} {size / request.gpu_memory:6.1%}")
        lines.append(f"{'fits':<11} {'yes' if self.fits else 'no'}")
        if self.expected is not None:
            lines += [f"{'expected' if i == 0 else '':<11} {text}" for i, text in enumerate(self._speed())]
        lines += [f"{'why' if i == 0 else '':<11} {reason}" for i, reason in enumerate(self.why)]
        return lines

    def _speed(self) -> list[str]:
        """What a step is expected to take, for people."""
        expected, request = self.expected, self.request
        devices = request.nodes * request.gpus
        whole = f"{_figure(expected.tokens_per_s)} tokens/s"
        if devices > 1:
            whole += f", {_figure(expected.tokens_per_s / devices)} a {'process' if request.device == 'cpu' else 'GPU'}"
        if request.device == "gpu":
            whole += f"; {expected.tflops:.0f} TFLOP/s a GPU"
        words = [f"{_figure(expected.seconds)} s a step, {whole}"]
        if expected.waits_for_python:
            more = "longer rows (seq=) cost" if request.packed else "a larger micro batch costs"
            words.append(f"Python starts kernels for longer than the GPU computes: {more} little")
        if expected.extrapolated:
            words.append(f"extrapolated: {'; '.join(expected.extrapolated)}")
        else:
            words[0] += f"; ± {expected.error:.0%}"
        return words

    def to_dict(self) -> dict:
        """JSON-ready form; memory in bytes, with its total."""
        return {
            "layout": dataclasses.asdict(self.layout),
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "fits": self.fits,
            "parameters": self.parameters,
            "tokens_per_step": self.tokens_per_step,
            "why": list(self.why),
            "expected": dataclasses.asdict(self.expected) if self.expected else None,
        }


def plan(architecture: Architecture, request: Request) -> Plan:
    """The layout for `request`: the fields given are kept and checked, the others chosen.

    Of the layouts that fit, the one with the shortest expected step (`launchers.cost`) is taken; within the estimate's error one
    that recomputes or splits the model less, and of those within 1% the simplest.
    Raises UserError where a given value breaks a rule or nothing fits, naming the nearest layout that works.
    """
    _check_values(request)
    graphs, request = request.cuda_graphs, dataclasses.replace(request, cuda_graphs=bool(request.cuda_graphs))
    layouts = list(_layouts(architecture, request))
    if not layouts:
        kind, text = _first_problem(architecture, request)
        raise UserError(f"{text}; {_nearest(architecture, request, kind)}")
    layout = _best(architecture, request, layouts)
    if layout is None:
        smallest = min(layouts, key=lambda candidate: estimate(architecture, request, candidate).total)
        need = estimate(architecture, request, smallest).total
        what = "one process" if request.device == "cpu" else "one GPU"
        text = (
            f"does not fit: {_count(architecture.num_parameters())} parameters at {_describe(request, smallest)} need "
            f"{need / GiB:.1f} GiB on {what} of {request.gpu_memory / GiB:.1f} GiB"
        )
        raise UserError(f"{text}; {_nearest(architecture, request, 'memory')}")
    why = _reasons(architecture, request, layout) + _tighter(architecture, request, layout, layouts)
    if graphs is None and (graph := _with_graph(architecture, request, layout)).cuda_graphs:
        share = python_share(architecture, request, layout)
        why.append(f"cuda_graphs: Python would start kernels for {share:.0%} of the time that the GPU computes them")
        request = graph
    return Plan(
        layout=layout,
        memory=estimate(architecture, request, layout),
        fits=True,
        parameters=architecture.num_parameters() + (request.tower.parameters if request.tower else 0),
        tokens_per_step=request.global_batch * request.seq,
        why=why,
        request=request,
        expected=expect(architecture, request, layout) if request.gpu or request.device == "cpu" else None,
    )


def _with_graph(architecture: Architecture, request: Request, layout: Layout) -> Request:
    """The request, with a CUDA graph where that was seen to pay: on one GPU of a kind that was measured, where Python starts
    kernels for nearly as long as the GPU computes, and the graph is neither larger than those nor its memory too much."""
    kind = KINDS.get(request.gpu)
    graph = dataclasses.replace(request, cuda_graphs=True)
    pays = (
        kind is not None
        and kind.measured
        and request.instead_of is None
        and request.nodes * request.gpus == 1
        and layout.recompute == "none"
        and layout.num_microbatches <= GRAPH_MICROBATCHES
        and python_share(architecture, request, layout) > GRAPH_PYTHON
        and estimate(architecture, graph, layout).total <= GRAPH_MEMORY * request.gpu_memory
    )
    return graph if pays else request


def _check_values(request: Request) -> None:
    """Refuse what no layout can mend."""
    for name in ("nodes", "gpus", "gpu_memory", "seq", "global_batch", *SIZES):
        value = getattr(request, name)
        if value is not None and value <= 0:
            raise UserError(f"{name}={value}: give a number above 0")
    for name, allowed in (
        ("device", ("gpu", "cpu")),
        ("precision", ("bf16", "fp16", "fp32", "fp8")),
        ("recompute", ("auto", *RECOMPUTE)),
        ("cross_entropy", ("native", "te", "unfused", "fused", "fp8")),
        ("gpu", (None, *KINDS)),
        ("interconnect", (None, NVLINK, PCIE)),
    ):
        if getattr(request, name) not in allowed:
            raise UserError(f"{name}={getattr(request, name)}: give one of {', '.join(filter(None, allowed))}")
    if request.device == "cpu" and request.precision == "fp8":
        raise UserError("precision=fp8 needs a GPU; nearest that works on a CPU: precision=bf16")
    if request.cuda_graphs and (request.device == "cpu" or request.recompute not in ("auto", "none")):
        what = "a CPU has none" if request.device == "cpu" else f"nothing can be recomputed in one: recompute={request.recompute}"
        raise UserError(f"cuda_graphs=true: {what}; nearest that works: cuda_graphs=false")
    if request.gpu and request.precision == "fp8":
        kind = KINDS[request.gpu]
        name = request.instead_of or kind.title
        if kind.fp8 is None:
            raise UserError(f"precision=fp8: {name} has no FP8: precision=bf16")
        if request.fp8_recipe not in kind.fp8_recipes:
            known = " or ".join(kind.fp8_recipes)
            raise UserError(f"fp8_recipe={request.fp8_recipe}: {name} has no such scaling: fp8_recipe={known}")


def _problem(
    a: Architecture, r: Request, tp: int, pp: int, vp: int | None, cp: int, sequence_parallel: bool, micro_batch: int, ep: int
) -> tuple[str, str] | None:
    """The first rule that a layout breaks as (kind, text); None if it breaks none.

    Where each is asserted: heads, groups, layers: megatron/core/transformer/transformer_config.py; vocabulary:
    tensor_parallel/layers.py; world size, vp without pp: parallel_state.py; sequence parallel without tp:
    model_parallel_config.py; 2 cp: utils.py, get_batch_on_this_cp_rank; batch: num_microbatches_calculator.py; microbatches
    by pp: pipeline_parallel/schedules.py; experts and ep: parallel_state.py and transformer/moe/moe_layer.py, which also wants
    sequence parallelism with tp; FP8's multiples of 8 and 16: transformer_engine/pytorch/utils.py,
    assert_dim_for_fp8_exec.
    """
    world = r.nodes * r.gpus
    if r.device == "cpu" and cp > 1:
        return "layout", f"cp={cp}: context parallelism needs a GPU"
    for name, size in (
        ("num_attention_heads", a.num_attention_heads),
        ("num_query_groups", a.num_query_groups),
        ("ffn_hidden_size", a.ffn_hidden_size),
        ("padded vocabulary", a.padded_vocab_size),
    ):
        if size % tp:
            return "layout", f"tp={tp} does not divide {name}={size}"
    if a.num_layers % pp:
        return "layout", f"pp={pp} does not divide num_layers={a.num_layers}"
    if vp is not None and pp == 1:
        return "layout", f"vp={vp} needs pp above 1"
    if vp is not None and a.num_layers // pp % vp:
        stage = f"the {a.num_layers // pp} layers of a stage (num_layers={a.num_layers}, pp={pp})"
        return "layout", f"vp={vp} does not divide {stage}"
    if sequence_parallel and tp == 1:
        return "layout", "sp=true needs tp above 1"
    if world % (tp * pp * cp):
        return "layout", f"tp={tp} x pp={pp} x cp={cp} = {tp * pp * cp} does not divide nodes={r.nodes} x gpus={r.gpus} = {world}"
    if ep > 1 and a.num_moe_experts is None:
        return "layout", f"ep={ep} needs a mixture of experts"
    if ep > 1 and a.num_moe_experts % ep:
        return "layout", f"ep={ep} does not divide num_moe_experts={a.num_moe_experts}"
    if world // (tp * pp) % ep:
        return "layout", f"ep={ep} does not divide dp x cp = {world // (tp * pp)}, the processes that share an expert's work"
    if cp > 1 and r.seq % (2 * cp):
        return "seq", f"seq={r.seq} is not a multiple of 2 x cp = {2 * cp}"
    if sequence_parallel and r.seq // cp % tp:
        return "seq", f"seq={r.seq} / cp={cp} is not a multiple of tp={tp}, as sp=true needs"
    if r.precision == "fp8":
        columns = {"hidden_size": a.hidden_size, "ffn_hidden_size": a.ffn_hidden_size, "heads x head size": a.attention_width}
        for name, size in columns.items():
            share = size if name == "hidden_size" else size // tp
            if share % 16:
                return "layout", f"precision=fp8 needs {name} on each GPU as a multiple of 16, not {share} (tp={tp})"
        rows = r.seq * micro_batch // cp // (tp if sequence_parallel else 1)
        if rows % 8:
            return "seq", f"precision=fp8 needs a multiple of 8 tokens on each GPU, not {rows} (seq={r.seq})"
    dp = world // (tp * pp * cp)
    if r.global_batch % (micro_batch * dp):
        return "batch", f"global_batch={r.global_batch} is not a multiple of micro_batch={micro_batch} x dp={dp}"
    microbatches = r.global_batch // (micro_batch * dp)
    if vp is not None and microbatches % pp:
        return "batch", f"vp={vp} needs the number of micro batches, {microbatches}, as a multiple of pp={pp}"
    if a.num_moe_experts is not None and tp > 1 and not sequence_parallel:
        return "layout", f"tp={tp} with experts needs sequence parallelism"
    return None


def _first_problem(a: Architecture, r: Request) -> tuple[str, str]:
    """Why no layout is left: the rule that what was given breaks, with 1 where nothing was given."""
    tp, vp = r.tp or 1, r.vp if r.vp != 1 else None
    problem = _problem(a, r, tp, r.pp or 1, vp, r.cp or 1, bool(r.sequence_parallel), r.micro_batch or 1, r.ep or 1)
    return problem or ("layout", f"no layout of {r.nodes} x {r.gpus} keeps what was given")


def _layouts(a: Architecture, r: Request) -> Iterator[Layout]:
    """Every layout that keeps what was given and breaks no rule; free fields take the values worth trying."""
    world = r.nodes * r.gpus
    for tp in [r.tp] if r.tp else [n for n in _powers(r.gpus) if r.gpus % n == 0]:
        for pp in [r.pp] if r.pp else [n for n in range(1, min(a.num_layers, world) + 1) if a.num_layers % n == 0]:
            for cp in [r.cp] if r.cp else _context_sizes(r, world):
                if world % (tp * pp * cp):
                    continue
                dp = world // (tp * pp * cp)
                for vp, parallel, micro, ep in _finer(a, r, tp, pp, cp, dp):
                    if _problem(a, r, tp, pp, vp, cp, parallel, micro, ep):
                        continue
                    microbatches = r.global_batch // (micro * dp)
                    if r.pp is None and pp > microbatches:
                        continue
                    free = ("none",) if r.cuda_graphs else RECOMPUTE
                    for recompute in free if r.recompute == "auto" else (r.recompute,):
                        balanced = r.balanced and pp > 1
                        yield Layout(tp, pp, vp, cp, dp, parallel, micro, microbatches, recompute, ep, balanced)


def _finer(a: Architecture, r: Request, tp: int, pp: int, cp: int, dp: int) -> Iterator[tuple[int | None, bool, int, int]]:
    """Values to try of (vp, sequence parallel, micro batch, ep) under one tp, pp, cp.

    Free chunks have two layers or more; on a CPU the smaller bubble does not pay for the extra messages over gloo.
    """
    per_stage = a.num_layers // pp
    if r.vp is not None:
        chunks = [r.vp if r.vp > 1 else None]
    else:
        chunks = [None, *(n for n in range(2, per_stage // 2 + 1) if pp > 1 and per_stage % n == 0 and r.device == "gpu")]
    if r.sequence_parallel is not None:
        parallel = r.sequence_parallel
    else:
        parallel = tp > 1 and r.seq // cp % tp == 0
    if r.micro_batch:
        sizes = [r.micro_batch]
    else:
        sizes = [n for n in _powers(8) if n == 1 or n * r.seq / cp <= MICROBATCH_TOKENS]
    experts = [r.ep] if r.ep else [n for n in range(1, dp * cp + 1) if dp * cp % n == 0 and (a.num_moe_experts or 1) % n == 0]
    yield from itertools.product(chunks, [parallel], sizes, experts)


def _powers(largest: int) -> list[int]:
    return [2**i for i in range(largest.bit_length())]


def _context_sizes(r: Request, world: int) -> list[int]:
    """Free context parallelism: only for sequences long enough to be worth cutting."""
    if r.device == "cpu":
        return [1]
    return [n for n in _powers(world) if n == 1 or r.seq / n >= CONTEXT_TOKENS]


def _best(a: Architecture, r: Request, layouts: list[Layout]) -> Layout | None:
    """The quickest layout that fits with headroom, or failing that at all; None if none fits."""
    for share in SHARES:
        fitting = [layout for layout in layouts if estimate(a, r, layout).total <= share * r.gpu_memory]
        if fitting:
            seconds = {layout: step_seconds(a, r, layout) for layout in fitting}
            best = min(fitting, key=seconds.__getitem__)
            near = [layout for layout in fitting if seconds[layout] <= (1 + error(a, r, best)) * seconds[best]]
            least = min(map(_effort, near))
            easy = [layout for layout in near if _effort(layout) == least]
            limit = TIE * min(seconds[layout] for layout in easy)
            quick = [layout for layout in easy if seconds[layout] <= limit]
            return min(quick, key=lambda layout: (_simplicity(layout), seconds[layout]))
    return None


def _effort(layout: Layout) -> tuple[int, int]:
    """What has to win by more than the estimate's error: recomputation, whose cost was not measured, and model parallelism."""
    return RECOMPUTE.index(layout.recompute), layout.tp * layout.pp * layout.cp


def _simplicity(layout: Layout) -> tuple:
    """Sorts simpler layouts first: less recomputation and model parallelism, whole layers of experts, fewer chunks, fewer micro
    batches."""
    return (*_effort(layout), layout.ep, layout.vp or 1, -layout.micro_batch)


def _nearest(a: Architecture, r: Request, kind: str) -> str:
    """The words "nearest that works: ..." for a request that was refused: the least change first."""
    free = dataclasses.replace(r, **FREE)
    variants = {
        "micro": [dataclasses.replace(r, micro_batch=None, recompute="auto")],
        "layout": [free],
        "batch": [dataclasses.replace(r, global_batch=size) for size in _batches(r)],
        "seq": [dataclasses.replace(r, seq=size) for size in _sequences(a, r)],
        "machine": [dataclasses.replace(free, **machine) for machine in _machines(r)],
        "shorter": [dataclasses.replace(free, seq=r.seq >> i) for i in range(1, 8) if r.seq >> i >= 128],
    }
    order = {
        "batch": ("micro", "batch", "layout", "machine"),
        "seq": ("seq", "layout", "batch", "machine"),
        "memory": ("micro", "layout", "machine", "shorter"),
        "layout": ("layout", "batch", "seq", "machine", "shorter"),
    }[kind]
    for step in order:
        for variant in variants[step]:
            need = {layout: estimate(a, variant, layout).total for layout in _layouts(a, variant)}
            fitting = [layout for layout in need if need[layout] <= variant.gpu_memory]
            if fitting:
                chosen = min(
                    fitting,
                    key=lambda layout: (
                        _distance(r, layout),
                        next(share for share in SHARES if need[layout] <= share * variant.gpu_memory),
                        step_seconds(a, variant, layout),
                        _simplicity(layout),
                    ),
                )
                return f"nearest that works: {_changes(r, variant)}{_describe(r, chosen)}"
    return "no layout works here: take a smaller size or seq, or GPUs with more memory"


def _batches(r: Request) -> list[int]:
    """Global batches near the one given that the data-parallel replicas divide, nearest first."""
    world, model = r.nodes * r.gpus, (r.tp or 1) * (r.pp or 1) * (r.cp or 1)
    unit = (world // model if world % model == 0 else world) * (r.micro_batch or 1)
    units = (unit, unit * (r.pp or 1)) if r.vp else (unit,)
    found = [max(1, n) * u for u in units for n in (r.global_batch // u, r.global_batch // u + 1)]
    return sorted(found, key=lambda size: abs(size - r.global_batch))


def _sequences(a: Architecture, r: Request) -> list[int]:
    """Sequence lengths below and above the one given that every split divides."""
    unit = math.lcm(2 * (r.cp or 1), (r.tp or 1) * (r.cp or 1), 8 * (r.tp or 1) * (r.cp or 1) if r.precision == "fp8" else 1)
    below = r.seq // unit * unit
    return [size for size in (below, below + unit) if size and size != r.seq]


def _machines(r: Request) -> list[dict[str, Any]]:
    """Other machines, smallest change first: fuller nodes up to 8 of the same GPUs, then more nodes; fewer processes of a CPU."""
    if r.device == "cpu":
        return [{"gpus": n, "gpu_memory": r.gpu_memory * r.gpus / n} for n in range(r.gpus - 1, 0, -1)]
    gpus = [n for n in (2, 4, 8) if n > r.gpus]
    full = max(8, r.gpus)
    more = [(r.nodes, n) for n in gpus] + [(n, full) for n in (2, 4, 8, 16, 32, 64, 128) if n > r.nodes]
    return [{"nodes": nodes, "gpus": each} for nodes, each in more]


def _distance(r: Request, layout: Layout) -> float:
    """How far a layout is from what was asked: doublings of each given size, less for switches."""
    total = 0.0
    for name in SIZES:
        asked = getattr(r, name)
        if asked is not None:
            total += abs(math.log2(asked / (getattr(layout, name) or 1)))
    total += 0.5 * (r.recompute not in ("auto", layout.recompute))
    return total + 0.25 * (r.sequence_parallel not in (None, layout.sequence_parallel))


def _changes(asked: Request, variant: Request) -> str:
    """The machine and batch of `variant` as far as they differ, as keys."""
    machine = (variant.nodes, variant.gpus) != (asked.nodes, asked.gpus)
    words = [f"nodes={variant.nodes}", f"gpus={variant.gpus}"] if machine else []
    changed = [name for name in ("seq", "global_batch") if getattr(variant, name) != getattr(asked, name)]
    words += [f"{name}={getattr(variant, name)}" for name in changed]
    return "".join(f"{word} " for word in words)


def _describe(r: Request, layout: Layout) -> str:
    """A layout as keys: tp and pp always, the rest where it matters or was given."""
    words = [f"tp={layout.tp}", f"pp={layout.pp}"]
    if r.vp is not None:
        words.append(f"vp={layout.vp or 1}")
    if r.cp is not None or layout.cp > 1:
        words.append(f"cp={layout.cp}")
    if r.ep is not None or layout.ep > 1:
        words.append(f"ep={layout.ep}")
    if r.micro_batch is not None and r.micro_batch != layout.micro_batch:
        words.append(f"micro_batch={layout.micro_batch}")
    if r.sequence_parallel not in (None, layout.sequence_parallel):
        words.append(f"sp={str(layout.sequence_parallel).lower()}")
    if layout.recompute != "none" or r.recompute not in ("auto", layout.recompute):
        words.append(f"recompute={layout.recompute}")
    return " ".join(words)


def _figure(value: float) -> str:
    """Three digits of a number, or all before its point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _reasons(a: Architecture, r: Request, layout: Layout) -> list[str]:
    """Short sentences that say why the layout is what it is."""
    memory = estimate(a, r, layout)
    what = "process" if r.device == "cpu" else "GPU"
    room = f"{r.gpu_memory / GiB:.0f} GiB"
    why = []
    model = layout.tp * layout.pp * layout.cp
    given = [f"{name}={getattr(r, name)}" for name in SIZES if getattr(r, name) is not None]
    if given:
        why.append(f"fixed: {' '.join(given)}")
    whole = Layout(1, 1, None, 1, layout.dp * model, False, 1, layout.num_microbatches, "none")
    alone = estimate(a, r, whole).total
    plain = dataclasses.replace(layout, recompute="none")
    if layout.dp == r.nodes * r.gpus and layout.recompute == "none":
        if layout.dp > 1:
            why.append(f"the whole model fits on each {what}: all {layout.dp} work on different data, the least communication")
        else:
            why.append(f"the whole model fits on one {what}")
    elif model > 1 and alone > HEADROOM * r.gpu_memory and not (r.tp and r.pp and r.cp):
        size = f"{_count(a.num_parameters())} parameters, their Adam states and activations"
        why.append(f"{size} need {alone / GiB:.0f} GiB on each {what} of {room} without model parallelism: split over {model}")
    elif model > 1 and r.tp is None and r.pp is None:
        replicas = layout.dp * model
        why.append(f"split over {model}: better than {replicas} replicas for a global batch of {r.global_batch} in this memory")
    if layout.tp > 1 and r.tp is None:
        pcie = (r.interconnect or (KINDS[r.gpu].interconnect if r.gpu else None)) == PCIE
        where = (
            f"inside a node{', over PCIe, which is slow' if pcie else ''}"
            if layout.tp <= r.gpus
            else "across nodes, which is slow"
        )
        why.append(f"tp={layout.tp} {where}: divides {a.num_query_groups} query groups")
    if layout.sequence_parallel and r.sequence_parallel is None:
        why.append("sequence parallel: the same communication, and norms and residuals are stored once, not on every tensor rank")
    if layout.cp > 1 and r.cp is None:
        why.append(f"cp={layout.cp}: each GPU holds {r.seq // layout.cp:,} of {r.seq:,} tokens")
    if layout.ep > 1 and r.ep is None:
        why.append(f"ep={layout.ep}: each {what} holds {a.num_moe_experts // layout.ep} of a layer's {a.num_moe_experts} experts")
    if layout.pp > 1:
        bubble = (layout.pp - 1) / (layout.num_microbatches * (layout.vp or 1))
        parts = f" in {layout.vp} chunks a stage" if layout.vp else ""
        why.append(f"pp={layout.pp}{parts}: the pipeline idles {bubble / (1 + bubble):.0%} of a step")
        layers = [sum(chunks(a, layout)[stage :: layout.pp]) for stage in range(layout.pp)]
        if len(set(layers)) > 1:
            why.append(f"stages of {', '.join(map(str, layers))} layers: the last one has the output layer too")
    if layout.micro_batch > 1 and r.micro_batch is None:
        tokens = layout.micro_batch * r.seq // layout.cp
        limit = f"up to {MICROBATCH_TOKENS:,}, kernels are fewer and larger"
        why.append(f"micro_batch={layout.micro_batch}: {tokens:,} tokens at a time; {limit}")
    if layout.recompute != "none" and r.recompute == "auto":
        saved = estimate(a, r, plain).total
        if saved > HEADROOM * r.gpu_memory:
            why.append(f"recompute={layout.recompute}: storing all activations would need {saved / GiB:.0f} GiB of {room}")
    if memory.total > HEADROOM * r.gpu_memory:
        why.append(f"tight: {memory.total / r.gpu_memory:.0%} of the memory, and the estimate is good to a few percent only")
    return why


def _tighter(a: Architecture, r: Request, chosen: Layout, layouts: list[Layout]) -> list[str]:
    """A word on the quickest layout that was passed over for want of headroom, where it is expected to be much quicker."""
    fitting = [layout for layout in layouts if estimate(a, r, layout).total <= r.gpu_memory]
    best = min(fitting, key=lambda layout: step_seconds(a, r, layout))
    quicker = step_seconds(a, r, best) / step_seconds(a, r, chosen)
    if quicker > QUICKER:
        return []
    full = estimate(a, r, best).total / r.gpu_memory
    return [f"{_describe(r, best)} may take {1 - quicker:.0%} less time, and {full:.0%} of the memory: safer layouts go first"]
