"""Compares two checkpoints, by their tensors and by what the models compute.

python conversion/verify.py a=hf:FOLDER b=nemo:FOLDER                     tensors and logits
python conversion/verify.py a=hf:FOLDER b=nemo:FOLDER tp=2 pp=2           the NeMo model on four processes
python conversion/verify.py a=nemo:RUN b=hf:FOLDER dtype=bfloat16 out=report.json

Exit codes: 0 equal, 1 they differ, 2 bad input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder, whose gguf.py would stand before the package

from conversion.checkpoint import Checkpoint
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.errors import RunError, UserError
from nemo_ext.progress import bar

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from conversion.compare.activations import LogitDifference, Trace
    from conversion.compare.megatron import Layout, Processes
    from conversion.compare.prompts import Prompt
    from conversion.compare.tensors import LazyTensor, TensorReport

Progress = Callable[[int, int, str], None]

LOG_COLUMNS = 130  # of the table where there is no terminal
DTYPES = ("float32", "bfloat16")
ABSOLUTE = 1e-4  # fp32: largest difference of a logit
RELATIVE = 1e-5  # or this part of the largest logit where that is more: 84 units in the last place of fp32
BF16_MEAN = 1.5  # bf16: mean difference, as a multiple of what the reference's own bf16 run has
BF16_LARGEST = 3.0  # and the largest one, which is a single element's and scatters more


@dataclass(frozen=True)
class PromptResult:
    """One prompt through both models."""

    label: str
    tokens: int
    difference: LogitDifference  # of b from a, both in the asked dtype's terms (a always in fp32)
    allowed: float  # largest difference of a logit
    allowed_mean: float | None = None  # bf16 only
    own: LogitDifference | None = None  # bf16 only: a's own run in bf16 from a in fp32

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        d = self.difference
        return d.max_abs <= self.allowed and (self.allowed_mean is None or d.mean_abs <= self.allowed_mean)


@dataclass
class Report:
    """What a comparison found. `passed`, `failure` (one line), `lines()` for people, `to_dict()` for a file."""

    a: str
    b: str
    dtype: str
    layout: str = ""
    tolerance: str = ""  # what is allowed and why; empty where no logits were compared
    tokenizers: str = ""
    prompts: list[PromptResult] = field(default_factory=list)
    tensors: TensorReport | None = None
    first_difference: dict[str, Any] | None = None  # where the models part: point, modules, tensors, configuration
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failure(self) -> str | None:
        """One line that says what differs; None when the check has passed."""
        return "; ".join(self.failures) or None

    @property
    def summary(self) -> str:
        """One line for a check that has passed."""
        parts = []
        if self.tensors is not None:
            rounded = f", {self.tensors.rounded} after rounding" if self.tensors.rounded else ""
            parts.append(f"{self.tensors.total} tensors: {self.tensors.bitwise} equal bit for bit{rounded}")
        if self.prompts:
            worst = max(self.prompts, key=lambda prompt: prompt.difference.max_abs)
            agreement = min(prompt.difference.top1_agreement for prompt in self.prompts)
            parts.append(
                f"logits of {len(self.prompts)} prompts in {self.dtype}: largest difference {worst.difference.max_abs:.2g} "
                f"(allowed {worst.allowed:.2g}), the most likely token agrees at {agreement:.1%} of positions or more"
            )
        return "; ".join(parts + self.notes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the fields, `passed` and `failure`."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["prompts"] = [dataclasses.asdict(prompt) | {"passed": prompt.passed} for prompt in self.prompts]
        content["tensors"] = self.tensors.to_dict() if self.tensors is not None else None
        return {"passed": self.passed, "failure": self.failure} | content

    def lines(self) -> list[str]:
        """The report as plain text: a table with a row a prompt, what was compared, and the verdict."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=LOG_COLUMNS, color_system=None)
        self.show(console)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]

    def show(self, console: Any) -> None:
        """Print the report on a rich console: with rules and colours on a terminal, plain in a log."""
        from rich.text import Text

        def say(line: str, style: str = "") -> None:
            console.print(Text(line, style=style), soft_wrap=not console.is_terminal)

        say(f"a  {self.a}")
        say(f"b  {self.b}" + (f"  ({self.layout})" if self.layout else ""))
        if self.tensors is not None:
            t = self.tensors
            say(f"tensors    {t.total}: {t.bitwise} equal bit for bit, {t.rounded} after rounding ({' / '.join(t.dtypes)}), "
                f"{len(t.differences)} differ")  # fmt: skip
        if self.tokenizers:
            say(f"tokenizers {self.tokenizers}")
        if self.prompts:
            console.print(self._table(console.is_terminal))
            say(f"tolerance  {self.tolerance}")
        for note in self.notes:
            say(f"note       {note}")
        verdict = f"FAILED: {'; '.join(self.failures)}" if self.failures else "equal"
        say(f"{verdict}  ({self.seconds:.0f} s)", "bold red" if self.failures else "bold green")

    def _table(self, rules: bool) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD if rules else None, pad_edge=False)
        table.add_column("prompt", max_width=32, no_wrap=True, overflow="ellipsis")
        for heading in ("tokens", "max |Δ|", "mean |Δ|", "max |logit|", "KL mean", "KL max", "top-1"):
            table.add_column(heading, justify="right", no_wrap=True, min_width=max(len(heading), 7))
        if any(prompt.own for prompt in self.prompts):
            table.add_column("a's own max, mean", justify="right", no_wrap=True, min_width=17)
        for prompt in self.prompts:
            d = prompt.difference
            numbers = [f"{value:.2g}" for value in (d.max_abs, d.mean_abs, d.largest_logit, d.kl_mean, d.kl_max)]
            cells = [str(prompt.tokens), *numbers, f"{d.top1_agreement:.1%}"]
            if prompt.own:
                cells.append(f"{prompt.own.max_abs:.2g}, {prompt.own.mean_abs:.2g}")
            style = "" if prompt.passed else "red"
            table.add_row(Text(" ".join(prompt.label.split()), style=style), *cells, style=style)
        return table


def check(
    a: str | Path | Checkpoint,
    b: str | Path | Checkpoint,
    *,
    prompts: str | Path | None = None,
    dtype: str = "float32",
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    tensors: bool = False,
    logits: bool = True,
    max_tokens: int = 128,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare checkpoint `b` with the reference `a`: `hf:FOLDER`, `nemo:FOLDER`, `gguf:FILE`, or a path that shows which it is.

    With `logits` the same prompts go through both models (transformers with eager attention, NeMo's Megatron model on
    tp x pp x ep local processes; where both are NeMo's, a in one process), one model in memory at a time. `prompts` is a file
    with one a line; without it default texts are used where there is a tokenizer, else random ids. In "float32" logits may
    differ by 1e-4, or 1e-5 of the largest logit. In "bfloat16" b's bf16 logits may differ from a's fp32 logits by a stated
    multiple of what a's own bf16 logits do, which is measured too. On failure both run once more in fp32, recording hidden
    states, and the first layer that differs is named with its tensors and configuration.

    With `tensors` all tensors are compared under Hugging Face's names. A GGUF file has no model here: its tensors are compared,
    and the other model's logits must be finite. `processes` are tp x pp x ep running ones, for several checks in a row.
    `progress(done, total, unit)` follows tensors and models.

    Raises UserError: not a checkpoint, a layout that does not divide the model, too little memory, prompts without a tokenizer.
    """
    from conversion.compare import tensors as tensor_files
    from conversion.compare.megatron import Layout, Processes

    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not one of {', '.join(DTYPES)}")
    a, b = Checkpoint.parse(a), Checkpoint.parse(b)
    layout, kinds = Layout(tp, pp, ep), (a.kind, b.kind)
    if layout.processes > 1 and "nemo" not in kinds:
        raise UserError("tp=, pp= and ep= split a NeMo model, and neither checkpoint is one")
    for checkpoint in (a, b):
        if checkpoint.kind == "nemo" and logits:
            layout.check(checkpoint.architecture)
    report = Report(str(a), str(b), dtype, str(layout) if layout.processes > 1 else "")
    started = time.monotonic()
    if tensors or "gguf" in kinds:
        report.tensors = tensor_files.compare(tensor_files.hf_tensors(a), tensor_files.hf_tensors(b), progress=progress)
        if not report.tensors.passed:
            report.failures.append(report.tensors.failure)
    if logits:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_ready())
            if processes is None and layout.processes > 1:
                processes = stack.enter_context(Processes(layout.processes))
            models = _Models(a, b, layout, processes, progress)
            if "gguf" in kinds:
                _finite(report, models, max_tokens)
            else:
                _compare_logits(report, models, prompts, max_tokens)
    report.seconds = time.monotonic() - started
    return report


class _Models:
    """The models of a comparison, run one at a time."""

    def __init__(
        self, a: Checkpoint, b: Checkpoint, layout: Layout, processes: Processes | None, progress: Progress | None
    ) -> None:
        from conversion.compare.megatron import Layout

        self.a, self.b = a, b
        self.layouts = {"a": Layout() if b.kind == "nemo" else layout, "b": layout}  # a and b may be one checkpoint
        self.processes, self.progress, self.runs = processes, progress, 0

    @functools.cached_property
    def tensors(self) -> tuple[Mapping[str, LazyTensor], Mapping[str, LazyTensor]]:
        """Both checkpoints' tensors, unread."""
        from conversion.compare.tensors import hf_tensors

        return hf_tensors(self.a), hf_tensors(self.b)

    @functools.cached_property
    def rounded(self) -> torch.dtype | None:
        """The narrower dtype that one side's weights were rounded to: the other side is rounded likewise before it runs."""
        from conversion.compare.tensors import only_dtype

        dtypes = [dtype for tensors in self.tensors if (dtype := only_dtype(tensors))]
        if len(dtypes) < 2 or dtypes[0].itemsize == dtypes[1].itemsize:
            return None
        return min(dtypes, key=lambda dtype: dtype.itemsize)

    def run(self, side: str, prompts: Sequence[Prompt], dtype: torch.dtype, expected: int, layers: bool = False) -> list[Trace]:
        """What the model of side "a" or "b" computes for each prompt; `expected` is how many runs there will be."""
        from conversion.compare import huggingface, megatron

        checkpoint: Checkpoint = getattr(self, side)

        ids, media = [prompt.ids for prompt in prompts], [prompt.media for prompt in prompts]
        options = dict(dtype=dtype, round_to=self.rounded, layers=layers, media=media)
        if checkpoint.kind == "hf":
            traces = huggingface.traces(checkpoint.path, ids, **options)
        else:
            layout = self.layouts[side]
            traces = megatron.traces(checkpoint.nemo, ids, layout=layout, processes=self.processes, **options)
        self.runs += 1
        if self.progress:
            self.progress(self.runs, max(expected, self.runs), "models")
        return traces


def _compare_logits(report: Report, models: _Models, prompts_file: str | Path | None, max_tokens: int) -> None:
    import torch

    from conversion.compare import prompts as prompt_choice
    from conversion.compare.activations import LOGITS, compare

    a, b, dtype = models.a, models.b, getattr(torch, report.dtype)
    chosen = prompt_choice.choose(a, b, Path(prompts_file) if prompts_file else None, max_tokens)
    report.tokenizers, prompts = chosen.tokenizers, chosen.prompts
    report.notes += chosen.notes
    if chosen.failure:
        report.failures.append(chosen.failure)
    if models.rounded:
        narrow = str(models.rounded).removeprefix("torch.")
        report.notes.append(f"one side stores {narrow}: the other's weights were rounded to it before they ran")
    total = 2 if dtype == torch.float32 else 3
    reference = [trace[LOGITS].value for trace in models.run("a", prompts, torch.float32, total)]
    own: list[LogitDifference | None] = [None] * len(prompts)
    if dtype != torch.float32:
        rounded = models.run("a", prompts, dtype, total)
        own = [compare(r, trace[LOGITS].value) for r, trace in zip(reference, rounded, strict=True)]
    other = [trace[LOGITS].value for trace in models.run("b", prompts, dtype, total)]
    for prompt, r, o, yardstick in zip(prompts, reference, other, own, strict=True):
        found = compare(r, o)
        if yardstick is None:
            allowed = (max(ABSOLUTE, RELATIVE * found.largest_logit), None)
        else:
            allowed = (BF16_LARGEST * yardstick.max_abs, BF16_MEAN * yardstick.mean_abs)
        report.prompts.append(PromptResult(prompt.label, len(prompt.ids), found, *allowed, yardstick))
    report.tolerance = (
        f"{ABSOLUTE:g}, or {RELATIVE:g} of the largest logit where that is more: what sums in another order differ by in fp32"
        if dtype == torch.float32
        else f"{BF16_MEAN:g} times the mean and {BF16_LARGEST:g} times the largest difference of a's own run in bf16 from fp32"
    )
    failed = [i for i, result in enumerate(report.prompts) if not result.passed]
    if failed:
        worst = max(failed, key=lambda i: _badness(report.prompts[i]))
        result = report.prompts[worst]
        text = " ".join(result.label.split())[:40]
        d, mean = result.difference, ""
        if result.allowed_mean is not None:
            mean = f" and by {d.mean_abs:.2g} on average (allowed {result.allowed_mean:.2g})"
        report.failures.append(
            f"logits differ by up to {d.max_abs:.2g} (allowed {result.allowed:.2g}){mean} on {text!r}; "
            + _locate(report, models, prompts[worst])
        )


def _badness(result: PromptResult) -> float:
    """How far beyond what is allowed; infinite for NaN."""
    d = result.difference
    ratios = [d.max_abs / max(result.allowed, 1e-30)]
    if result.allowed_mean is not None:
        ratios.append(d.mean_abs / max(result.allowed_mean, 1e-30))
    return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)


def _locate(report: Report, models: _Models, prompt: Prompt) -> str:
    """Run both models in fp32 with their hidden states and say where they part: modules, tensors, configuration."""
    import torch

    from conversion.compare import tensors
    from conversion.compare.activations import first_difference

    try:
        reference, other = (models.run(side, [prompt], torch.float32, 0, layers=True)[0] for side in "ab")
    except UserError as error:
        return f"where they part is not known ({error})"
    found = first_difference(reference, other)
    if found is None:
        return "in fp32 no layer's output differs: it is the computation in the lower precision"
    point, error = found
    modules = (reference[point].module, other[point].module)
    wrong = tensors.compare(*models.tensors, only=lambda name: _belongs(name, point)).differences
    configuration = _different_fields(models.a, models.b)
    report.first_difference = {
        "point": point,
        "a": modules[0],
        "b": modules[1],
        "relative_error": error,
        "tensors": [dataclasses.asdict(difference) for difference in wrong],
        "configuration": configuration,
    }
    named = modules[0] if modules[0] == modules[1] else f"{modules[0]} ({modules[1]} in b)"
    parts = [f"the first output that differs is {named}'s, by {error:.1e} of its size"]
    if wrong:
        parts.append(f"tensors that differ there: {', '.join(difference.name for difference in wrong[:4])}")
    if configuration:
        parts.append("the configurations differ: " + ", ".join(f"{k} {v[0]} and {v[1]}" for k, v in configuration.items()))
    if not wrong and not configuration:
        parts.append("tensors and configuration there are equal")
    return "; ".join(parts)


def _belongs(name: str, point: str) -> bool:
    """Whether a tensor has to do with a point of a trace: it is in its layer, or in the projector, or in no layer."""
    from conversion.compare.activations import LAYER

    in_sense = name.startswith(("vision_tower.", "audio_tower."))
    in_projector = name.startswith(("multi_modal_projector.", "image_newline"))
    if point == "projector":
        return in_projector
    if point.startswith("encoder."):
        embeds = point == "encoder.layers.0" and ".layers." not in f".{name}"  # what is before the first layer has no point
        return in_sense and (f".{point.removeprefix('encoder.')}." in name or embeds)
    layer = LAYER.search(point)
    return not (in_sense or in_projector) and (f".{layer[0]}." in name if layer else not LAYER.search(name))


def _different_fields(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Fields of the two architectures that differ; nothing where one has no family's table."""
    try:
        fields = [dataclasses.asdict(checkpoint.architecture) for checkpoint in (a, b)]
    except UserError:
        return {}
    return {name: (fields[0][name], fields[1][name]) for name in fields[0] if fields[0][name] != fields[1][name]}


def _finite(report: Report, models: _Models, max_tokens: int) -> None:
    """Run what is not GGUF and refuse logits that are not finite."""
    import torch

    from conversion.compare import prompts as prompt_choice
    from conversion.compare.activations import LOGITS

    for side, checkpoint in (("a", models.a), ("b", models.b)):
        if checkpoint.kind == "gguf":
            continue
        prompts = prompt_choice.choose(checkpoint, checkpoint, None, max_tokens).prompts
        traces = models.run(side, prompts, torch.float32, 1)
        finite = [bool(trace[LOGITS].value.isfinite().all()) for trace in traces]
        report.notes.append(
            f"a GGUF file has no model here: its dequantized tensors were compared, and {checkpoint} gives finite logits "
            f"for {sum(finite)} of {len(prompts)} prompts"
        )
        if not all(finite):
            report.failures.append(
                f"{checkpoint} gives logits that are not finite for {prompts[finite.index(False)].label[:40]!r}"
            )


@contextlib.contextmanager
def _ready() -> Iterator[None]:
    """The platform activated; fp32 products of fp32 numbers; none of the warnings and bars of libraries.

    Transformer Engine asks cuBLAS for TF32, which has 10 bits, unless the environment forbids it.
    """
    from nemo_ext import platform

    tf32, disabled = os.environ.get("NVIDIA_TF32_OVERRIDE"), logging.root.manager.disable
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            platform.activate()
            from transformers.utils import logging as hf_logging

            verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
            hf_logging.set_verbosity_error()
            hf_logging.disable_progress_bar()
            try:
                yield
            finally:
                hf_logging.set_verbosity(verbosity)
                if bars:
                    hf_logging.enable_progress_bar()
    finally:
        logging.disable(disabled)
        os.environ.pop("NVIDIA_TF32_OVERRIDE")
        if tf32 is not None:
            os.environ["NVIDIA_TF32_OVERRIDE"] = tf32


@dataclass
class Options:
    """The command's keys."""

    a: str = key(NO_DEFAULT, "the reference: hf:FOLDER, nemo:FOLDER (also a run or one of its checkpoints) or gguf:FILE")
    b: str = key(NO_DEFAULT, "what is compared with it")
    tensors: bool = key(True, "compare all tensors under Hugging Face's names")
    logits: bool = key(True, "run the same prompts through both models")
    prompts: str | None = key(None, "a file with one prompt a line", auto="a few texts, or random ids without a tokenizer")
    max_tokens: int = key(128, "longest prompt", unit="tokens")
    dtype: str = key("float32", "what b computes in", choices=DTYPES)
    tp: int = key(1, "tensor parallel size of the NeMo model")
    pp: int = key(1, "pipeline parallel size of the NeMo model")
    ep: int = key(1, "expert parallel size of the NeMo model")
    out: str | None = key(None, "write the report here as JSON", auto="only on the screen")


def command(options: Options) -> None:
    """Compare, print the report, write it; RunError where the two differ."""
    from rich.console import Console

    from nemo_ext import run_folder

    if not options.tensors and not options.logits:
        raise UserError("tensors=false and logits=false leave nothing to compare")
    with bar("comparing") as progress:
        report = check(
            options.a,
            options.b,
            prompts=options.prompts,
            dtype=options.dtype,
            tp=options.tp,
            pp=options.pp,
            ep=options.ep,
            tensors=options.tensors,
            logits=options.logits,
            max_tokens=options.max_tokens,
            progress=progress,
        )
    console = Console()
    report.show(console if console.is_terminal else Console(width=LOG_COLUMNS))
    if options.out:
        run_folder.write_json(options.out, report.to_dict())
    if not report.passed:
        raise RunError(f"{report.b} differs from {report.a}: {report.failure}")


if __name__ == "__main__":
    about = "Compares two checkpoints, by their tensors and by what the models compute. Exit code 0: equal, 1: they differ."
    sys.exit(main(Options, command, sys.argv[1:], about=about, example="python conversion/verify.py a=hf:FOLDER b=nemo:FOLDER"))
