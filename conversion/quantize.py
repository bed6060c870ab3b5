"""Quantizes a Hugging Face model for a runtime, and reports what was lost.

python conversion/quantize.py model=hf:FOLDER method=int4_awq calibration=data.jsonl out=FOLDER
python conversion/quantize.py model=hf:FOLDER method=fp8 kv_cache=fp8 format=modelopt out=FOLDER max_ppl_increase=1
python conversion/quantize.py model=hf:FOLDER method=int4_gptq auto=bits:4.8 out=FOLDER

Exit codes: 0 written and verified, 1 it lost more than max_ppl_increase= (it lies under OUT.rejected) or is not what was
measured, 2 bad input.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder, whose gguf.py would stand before the package

from conversion import atomic
from conversion.quantization.formats import GGUF, GROUPS, METHODS, Format, Method, format_of
from nemo_ext import platform
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.errors import RunError, UserError
from nemo_ext.progress import bar
from nemo_ext.report import duration

if TYPE_CHECKING:
    import torch
    from torch import nn

    from conversion.quantization.stored import Quantized
    from conversion.quantization.texts import Texts

FORMATS = ("compressed_tensors", "modelopt", "tensorrt_llm", "onnx", "gguf")
CHECKED_WINDOWS = 2  # that the artifact's logits are compared on
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}  # of the largest logit: sums in another order
SHAKE = 1e-6
COPIES = 3  # of the model in memory: it, its parent or the one that scales are sought with, and what is computed


@dataclass
class Options:
    """The command's keys."""

    model: str = key(NO_DEFAULT, "hf:FOLDER, or hf:NAME in Hugging Face's local cache")
    method: str = key(NO_DEFAULT, "how the weights are quantized", choices=(*METHODS, *GGUF))
    out: str = key(NO_DEFAULT, "the folder to write; must not exist")
    format: str = key(
        "compressed_tensors",
        "for vLLM and transformers; trtllm-serve, vLLM; trtllm-build; onnxruntime; llama.cpp",
        choices=FORMATS,
    )
    tp: int = key(1, "tensor parallel size of a TensorRT-LLM checkpoint", least=1)
    pp: int = key(1, "pipeline parallel size of a TensorRT-LLM checkpoint", least=1)
    calibration: str = key("python-docs", "text or conversations like yours: JSONL, text files, python-docs", group="calibration")
    samples: int = key(32, "windows of it that calibrate", least=1)
    seq: int = key(512, "length of a window", unit="tokens", least=2)
    batch: int = key(4, "windows at a time", least=1)
    exclude: str = key("lm_head", "layers left as they are: names or patterns, with commas", group="what is quantized")
    group: int | None = key(
        None, "INT4 weights that share a scale", auto=f"the largest of {', '.join(map(str, GROUPS))} that fits"
    )
    kv_cache: str | None = key(
        None, "keys and values in FP8, in INT8 by TensorRT-LLM", choices=("fp8", "int8"), auto="as they are"
    )
    auto: str | None = key(None, "bits:4.8 gives the most sensitive layers FP8 as far as the budget goes", auto="one format")
    dtype: str | None = key(None, "float16 or bfloat16, of everything else", auto="the model's; bfloat16 for float32")
    heldout: str | None = key(None, "text to measure on", auto="a quarter of calibration='s documents", group="what was lost")
    heldout_samples: int = key(16, "windows of it", least=1)
    max_ppl_increase: float | None = key(None, "fail if the perplexity grows by more", unit="%", auto="no limit", above=-100)


def command(options: Options) -> None:
    """Quantize, measure, write, verify and report."""
    started = time.monotonic()
    job = Job(options)
    job.check()
    model, texts = job.load()
    if options.format == "gguf":
        job.write_gguf(model, texts, started)
        return
    plan = job.plan(model, texts)
    quantized = job.quantize(model, plan, texts)
    loss = job.measure(quantized.model, texts)
    job.write(quantized, loss, texts, started)


@dataclass
class Job:
    """One quantization. The methods are its steps, in their order."""

    options: Options

    def __post_init__(self) -> None:
        self.source = _folder(self.options.model)
        self.out = Path(self.options.out).expanduser().absolute()
        gguf = self.options.format == "gguf"
        if gguf != (self.options.method in GGUF):
            methods = GGUF if gguf else METHODS
            raise UserError(f"method={self.options.method} is not for format={self.options.format}: {', '.join(methods)} are")
        self.method = Method(self.options.method) if gguf else METHODS[self.options.method]

    @property
    def excluded(self) -> list[str]:
        return [pattern for pattern in self.options.exclude.split(",") if pattern]

    def check(self) -> None:
        """Refuse what can be seen without loading anything."""
        from conversion.hf_to_nemo import read_config
        from conversion.multimodal import senses_of

        o = self.options
        if o.group is not None and o.group not in GROUPS:
            raise UserError(f"group={o.group}: the runtimes have kernels for {', '.join(map(str, GROUPS))}")
        if o.samples < o.batch:
            raise UserError(f"samples={o.samples} is less than batch={o.batch}: a batch has to be filled")
        self.config = read_config(self.source)
        quantization = self.config.pop("quantization_config", None) or {}
        # what ModelOpt leaves where it exports a model that it has not quantized says no algorithm
        if quantization and (quantization.get("quant_method") != "modelopt" or quantization.get("quant_algo")):
            raise UserError(
                f"{self.source} is quantized already ({quantization.get('quant_method', '?')}): quantize the original"
            )
        if senses_of(self.config):
            raise UserError(f"{self.source} sees or hears: only text models are quantized")
        if o.format == "gguf":
            if o.auto or o.kv_cache or o.group or o.exclude != "lm_head":
                raise UserError(
                    "auto=, kv_cache=, group= and exclude= are not for format=gguf, which rounds every matrix in blocks of 32"
                )
        else:
            for name in [self.method.format] + (["fp8"] if o.auto else []):
                self.writer.check(format_of(name, GROUPS[0]), o.kv_cache)
        if o.auto:
            from conversion.quantization import search

            search.budget(o.auto)
            if "4" not in self.method.format:
                raise UserError(f"auto= mixes a method of 4 bits with FP8: method={o.method} has more")
        if o.format == "tensorrt_llm":
            self.layout.check(self.config, format_of(self.method.format, o.group or 0))
        elif o.tp != 1 or o.pp != 1:
            raise UserError(f"tp= and pp= split a TensorRT-LLM checkpoint; format={o.format} is split when it is served")
        atomic.refuse_taken(self.out)
        if o.max_ppl_increase is not None:
            atomic.refuse_taken(self.rejected)

    @property
    def writer(self) -> Any:
        """The module that writes `format=`."""
        from conversion.quantization import compressed_tensors, modelopt_folder, onnx_file, tensorrt_llm

        return {
            "compressed_tensors": compressed_tensors,
            "modelopt": modelopt_folder,
            "tensorrt_llm": tensorrt_llm,
            "onnx": onnx_file,
        }[self.options.format]

    @property
    def layout(self) -> Any:
        """How a TensorRT-LLM checkpoint is split."""
        from conversion.quantization.tensorrt_llm import Layout

        return Layout(self.options.tp, self.options.pp)

    @property
    def rejected(self) -> Path:
        return self.out.with_name(f"{self.out.name}.rejected")

    def load(self) -> tuple[nn.Module, Texts]:
        """The model as `computed` says, and the windows of token ids."""
        from transformers import AutoTokenizer

        from conversion.quantization import layers, texts

        o = self.options
        longest = self.config.get("max_position_embeddings", o.seq)
        if o.seq > longest:
            raise UserError(f"seq={o.seq} is more than the model's {longest} positions")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.source)
        except Exception as error:  # whatever a missing or broken file makes of it
            raise UserError(f"{self.source}: the tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        found = texts.windows(
            tokenizer, o.calibration, o.heldout, samples=o.samples, heldout_samples=o.heldout_samples, seq=o.seq, batch=o.batch
        )
        model = self._load()
        if self.method.smoothing:
            layers.check_smoothable(model)
        return model, found

    def _load(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(self.source, dtype=self.computed)
        except (ValueError, KeyError, OSError) as error:  # an unknown architecture, missing weights
            raise UserError(f"{self.source} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        return model.eval().cuda()

    @property
    def dtype(self) -> torch.dtype:
        from conversion.dtypes import DTYPES

        asked = self.options.dtype or self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        if self.options.dtype == "float32" or asked not in DTYPES:
            raise UserError(f"dtype={asked}: float16 or bfloat16")
        return DTYPES["bfloat16" if asked == "float32" else asked]

    @functools.cached_property
    def computed(self) -> torch.dtype:
        """What everything is computed in: fp32, or on a GPU whose memory has no room for that `dtype`.

        Always fp32 for w4a8, whose weights are rounded twice: between the two nothing else may round them.
        """
        import torch

        from conversion import safetensors_io

        without_gpu = platform.activate()
        if without_gpu or self.method.format == "w4a8":
            return torch.float32
        size = 4 * sum(math.prod(info.shape) for info in safetensors_io.open_folder(self.source).values())
        return torch.float32 if COPIES * size < torch.cuda.mem_get_info()[0] else self.dtype

    def plan(self, model: nn.Module, texts: Texts) -> dict[str, Format]:
        """The format of every layer."""
        from conversion.quantization import layers, search
        from conversion.quantization.calibrate import Batches

        linears = layers.linears(model, self.excluded)
        form = format_of(self.method.format, self._group({name: linear.in_features for name, linear in linears.items()}))
        if self.options.format == "tensorrt_llm":
            self.layout.check(self.config, form)
        if not self.options.auto:
            return dict.fromkeys(linears, form)
        limit, total = search.budget(self.options.auto), search.PASSES * len(texts.calibration)
        with bar("finding sensitive layers", total, "windows") as progress:
            batches = Batches(texts.calibration, self.options.batch, progress)
            plan = search.choose(model, list(linears), form, format_of("fp8", 0), limit, batches)
        large = sum(each.name == "fp8" for each in plan.values())
        print(f"auto: {large} of {len(plan)} layers in fp8, {search.bits(plan, model):.3f} bits a weight")
        return plan

    def _group(self, columns: dict[str, int]) -> int:
        """The group that divides the input of every layer."""
        if self.method.format == "nvfp4":
            sizes: tuple[int, ...] = (16,)
        elif self.method.format not in ("int4", "w4a8"):
            return 0
        else:
            sizes = (self.options.group,) if self.options.group else GROUPS
        for size in sizes:
            if all(width % size == 0 for width in columns.values()):
                return size
        name, width = next((name, width) for name, width in columns.items() if width % sizes[-1])
        raise UserError(
            f"{name} has {width} inputs, not a multiple of the group of {sizes[-1]}: exclude it or choose another group="
        )

    def quantize(self, model: nn.Module, plan: dict[str, Format], texts: Texts) -> Quantized:
        """Calibrate and quantize `model`, in place."""
        from conversion.quantization import calibrate, gptq
        from conversion.quantization.calibrate import Batches
        from conversion.quantization.stored import Quantized

        o, ids, scales = self.options, texts.calibration, None
        small = {name: form for name, form in plan.items() if form.name == self.method.format}
        if self.method.smoothing:
            passes = calibrate.PASSES[self.method.smoothing]
            with bar(f"calibrating ({o.method})", passes * len(ids), "windows") as progress:
                calibrate.smooth(model, small, self.method.smoothing, Batches(ids, o.batch, progress), self.dtype)
        if self.method.gptq:
            with bar(f"calibrating ({o.method})", model.config.num_hidden_layers, "layers") as progress:
                scales = gptq.quantize(model, small, ids, o.batch, self.dtype, progress)
        with bar("quantizing", len(ids), "windows") as progress:
            calibrate.quantize(model, plan, Batches(ids, o.batch, progress), self.dtype, o.kv_cache, scales)
            progress(len(ids))
        return Quantized(model, plan, self.dtype, self.source, self.config, o.kv_cache)

    def measure(self, model: nn.Module, texts: Texts) -> Any:
        """What the quantized model lost against its parent."""
        from conversion.quantization import measure

        parent = self._load()
        with bar("measuring", len(texts.heldout), "windows") as progress:
            loss = measure.compare(parent, model, texts.heldout, progress)
        if not loss.kl < float("inf"):
            raise RunError("the quantized model's logits are not finite: calibrate on more text or exclude layers")
        return loss

    def write(self, quantized: Quantized, loss: Any, texts: Texts, started: float) -> None:
        """The artifact with its report under its name, or under another one if it lost too much."""
        from conversion.quantization import search

        o, model = self.options, quantized.model
        final = self.rejected if self.fails(loss) else self.out
        with atomic.new_folder(final) as folder:
            with bar(f"writing {o.format}", len(quantized.plan), "layers") as progress:
                split = {"layout": self.layout} if o.format == "tensorrt_llm" else {}
                self.writer.write(folder, quantized, progress, **split)
            checked = check(folder, quantized, texts.heldout[:CHECKED_WINDOWS])
            linears = [name for name, module in model.named_modules() if _is_linear(module)]
            left = [name for name in linears if name not in quantized.plan]
            self.report(folder, model, quantized.plan, left, loss, search.bits(quantized.plan, model), checked, started)
        self.end(final, loss, started)

    def write_gguf(self, parent: nn.Module, texts: Texts, started: float) -> None:
        """The same for a GGUF file, which is quantized as it is written, and measured by what it holds."""
        from conversion.quantization import gguf_file, measure

        o, form = self.options, GGUF[self.options.method]
        with atomic.new_folder(self.out) as folder:
            with bar("writing gguf", unit="tensors") as progress:
                file = gguf_file.write(self.source, folder, o.method, progress)
            model, names = gguf_file.load_into(self._load(), file)
            with bar("measuring", len(texts.heldout), "windows") as progress:
                loss = measure.compare(parent, model, texts.heldout, progress)
            checked = gguf_file.check(file)
            self.report(folder, model, dict.fromkeys(names, form), [], loss, form.bits, checked, started)
            if self.fails(loss):
                shutil.copytree(folder, self.rejected, ignore=shutil.ignore_patterns(atomic.JOURNAL))
                self.end(self.rejected, loss, started)
        self.end(self.out, loss, started)

    def fails(self, loss: Any) -> bool:
        """Whether more was lost than max_ppl_increase= allows."""
        return self.options.max_ppl_increase is not None and loss.increase > self.options.max_ppl_increase

    def report(
        self,
        folder: Path,
        model: nn.Module,
        plan: Mapping[str, Format],
        left: list[str],
        loss: Any,
        layer_bits: float,
        checked: str,
        started: float,
    ) -> None:
        """Write the report beside the artifact in `folder`, and show it."""
        from conversion.quantization.report import Report

        o = self.options
        report = Report(
            model=str(self.source),
            method=o.method,
            format=o.format,
            settings={name: value for name, value in vars(o).items() if name not in ("model", "method", "format", "out")},
            plan=plan,
            left=left,
            loss=loss,
            parent_bytes=_weight_bytes(self.source),
            artifact_bytes=_weight_bytes(folder),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layer_bits=layer_bits,
            checked=checked,
            limit=o.max_ppl_increase,
            seconds=time.monotonic() - started,
        )
        report.write(folder)
        print(report.markdown())

    def end(self, final: Path, loss: Any, started: float) -> None:
        """Say what has become of it. Raises RunError if it lost too much."""
        if self.fails(loss):
            raise RunError(
                f"the perplexity grew by {loss.increase:.2f} %, max_ppl_increase= allows {self.options.max_ppl_increase:g} %: "
                f"the model is set aside as {final}"
            )
        print(f"{final} is complete after {duration(time.monotonic() - started)}")


def check(folder: Path, quantized: Quantized, ids: torch.Tensor) -> str:
    """Read the artifact back by its format's rules and compare what it computes with what was measured; what was found, in words.

    The weights, what every module gives for the same input, and the logits; these not on a GPU where inputs are rounded, because
    products whose sums have another order there make as much of a difference as the quantization. Raises RunError if any differ
    by more than the order of sums explains.
    """
    import torch

    from conversion.dtypes import NAMES
    from conversion.quantization import onnx_file, reader, reader_tensorrt_llm, verify

    like = next(parameter for parameter in quantized.model.parameters() if parameter.is_floating_point())
    agreement, noise = AGREEMENT[NAMES[like.dtype]], 0.0
    rounds = bool(quantized.kv_cache) or any(form.activation for form in quantized.plan.values())
    with bar("reading back", len(ids), "windows") as progress, torch.no_grad():
        if (folder / onnx_file.NAME).is_file():
            who, theirs = "computed by onnxruntime", onnx_file.logits(folder, ids)
            ours = reader.logits(quantized.model, ids)
            if rounds:
                noise = 2 * float((ours - _shaken(quantized.model, ids)).abs().max())
        else:
            same = {"dtype": like.dtype, "device": like.device}
            if (folder / "rank0.safetensors").is_file():
                found, model = reader_tensorrt_llm.load(folder, quantized.config, **same)
            else:
                found, model = reader.load(folder, **same)
            verify.weights(quantized, model)
            ours, worst = verify.outputs(quantized, found, model, ids, agreement)
            who = f"read back by the format's rules, modules differ for the same input by at most {worst:.2g} of their output"
            theirs = reader.logits(model, ids)
            if rounds and like.is_cuda:
                noise = math.inf
        progress(len(ids))
    difference = float((ours - theirs).abs().max())
    allowed = max(agreement * float(ours.abs().max()), noise)
    if not difference <= allowed:
        raise RunError(
            f"{who}, the artifact's logits differ by {difference:.3g} from the measured ones, {allowed:.3g} is allowed"
        )
    return f"{who}, the logits of {ids.numel()} tokens differ by at most {difference:.2g}"


def _shaken(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits with the embedding off by its fp32 rounding: where inputs are rounded too, sums in another order carry some of
    them to the next code, and a deep model makes much of that, whoever computes it."""
    import torch

    weight = model.get_input_embeddings().weight
    kept = weight.detach().clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    weight.mul_(1 + SHAKE * noise)
    found = model(ids.to(weight.device), use_cache=False).logits.float().cpu()
    weight.copy_(kept)
    return found


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.onnx*", "*.gguf") for file in folder.glob(pattern))


def _folder(text: str) -> Path:
    """The Hugging Face folder that model= names."""
    kind, _, rest = text.partition(":")
    if kind != "hf" or not rest:
        raise UserError(f"model={text}: give hf:FOLDER; conversion/convert.py makes one of nemo: and gguf:")
    folder = Path(rest).expanduser()
    if folder.is_dir():
        return folder.absolute()
    from conversion import hub_cache

    cached = hub_cache.find(rest)
    if cached is None:
        raise UserError(f"model={text}: neither a folder nor a model in Hugging Face's local cache")
    return cached


def _quietly(function: Callable[[Options], None]) -> Callable[[Options], None]:
    """`function` with the platform activated, and without the warnings and bars of libraries."""

    def run(options: Options) -> None:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        platform.activate()
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        function(options)

    return run


if __name__ == "__main__":
    example = "python conversion/quantize.py model=hf:FOLDER method=int4_awq calibration=data.jsonl out=FOLDER"
    about = "Quantizes a model for vLLM, transformers, TensorRT-LLM, onnxruntime or llama.cpp, and reports what was lost."
    sys.exit(main(Options, _quietly(command), sys.argv[1:], about=about, example=example))
