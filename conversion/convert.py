"""Converts checkpoints between Hugging Face, NeMo 2 and GGUF, and LoRA adapters between PEFT and NeMo.

python conversion/convert.py from=hf:FOLDER to=nemo:FOLDER
python conversion/convert.py from=nemo:RUN to=hf:FOLDER dtype=bfloat16 max_shard=2GB
python conversion/convert.py from=lora:FOLDER base=hf:FOLDER to=hf:FOLDER

A conversion that was killed goes on when the same command is given again. Exit codes: 0 converted (and verified), 1 it is not
what it should be, 2 bad input.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder, whose gguf.py would stand before the package

from conversion import atomic
from nemo_ext import run_folder
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.errors import RunError, UserError
from nemo_ext.progress import bar
from nemo_ext.report import duration

if TYPE_CHECKING:
    from conversion.hf_to_nemo import Check
    from conversion.workers import Progress
    from nemo_ext.architecture import Architecture

KINDS = ("hf", "nemo", "gguf", "lora")
BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MAX_WORKERS = 8


@dataclass
class Options:
    """The command's keys."""

    from_: str = key(
        NO_DEFAULT,
        "hf:FOLDER, hf:NAME (in Hugging Face's local cache), nemo:FOLDER (a run, a checkpoint), gguf:FILE, lora:FOLDER",
    )
    to: str = key(NO_DEFAULT, "hf:FOLDER, nemo:FOLDER, gguf:FILE or lora:FOLDER; must not exist")
    base: str | None = key(None, "the model that an adapter is for: hf:FOLDER or nemo:FOLDER", auto="none")
    dtype: str | None = key(
        None, "float32, bfloat16 or float16; of a GGUF file f32, f16, bf16, q8_0, q4_0 or q4_k", auto="as it was; GGUF f16"
    )
    max_shard: str | None = key(None, "largest safetensors file, such as 2GB or 500MiB", auto="the files of the import, else 5GB")
    workers: int | None = key(None, "threads", auto=f"one a core, at most {MAX_WORKERS}")
    verify: bool = key(True, "compare what both models compute", group="verification")
    prompts: str | None = key(None, "a file with one prompt a line", auto="a few texts, or random ids without a tokenizer")
    tp: int = key(1, "tensor parallel size of the NeMo model")
    pp: int = key(1, "pipeline parallel size of the NeMo model")
    ep: int = key(1, "expert parallel size of the NeMo model")


def command(options: Options) -> None:
    """Convert, verify, and say what was written."""
    (kind, source), (target_kind, target) = _parse("from", options.from_), _parse("to", options.to)
    route = ROUTES.get((kind, target_kind))
    if route is None:
        possible = ", ".join(f"{a}: to {b}:" for a, b in ROUTES)
        raise UserError(f"from={kind}: to={target_kind}: is no conversion; there are {possible}")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"workers={options.workers} must be 1 or more")
    if options.base and kind != "lora":
        raise UserError("base= is the model of an adapter: it goes with from=lora:")
    if options.max_shard and (target_kind != "hf" or kind == "lora"):
        raise UserError("max_shard= is the size of new safetensors files: it goes with to=hf:, and not with from=lora:")
    started = time.monotonic()
    job = Job(options, source, Path(target).expanduser().absolute())
    atomic.refuse_taken(job.target)
    route(job)
    print(f"{options.to} is complete after {duration(time.monotonic() - started)}")


@dataclass
class Job:
    """One conversion: its options, and where from and where to."""

    options: Options
    source: str  # without its kind
    target: Path

    @property
    def workers(self) -> int:
        return self.options.workers or min(os.cpu_count() or 1, MAX_WORKERS)

    @property
    def max_shard_bytes(self) -> int | None:
        return _bytes(self.options.max_shard) if self.options.max_shard else None

    @property
    def name(self) -> str:
        """What to call the model: its run's or folder's name."""
        folder = Path(self.source).expanduser().absolute()
        return folder.parents[1].name if run_folder.STEP_FOLDER.match(folder.name) else folder.name

    def staged(self) -> Path:
        """Where an intermediate Hugging Face folder lies: hidden beside the target, found again by the same command."""
        file = Path(self.source).expanduser()
        sources = [path for path in sorted(file.rglob("*")) if path.is_file()] if file.is_dir() else [file]
        if not file.exists():
            raise UserError(f"{file} is not there")
        content = atomic.fingerprint(sources, self.options.dtype, self.options.max_shard)
        return self.target.parent / f".{self.target.name}.hf-{content[:12]}"

    def run(self, convert: Callable[[Progress, Check], Any], pair: Callable[[Path], tuple[str, str]], final: Path) -> None:
        """Call `convert(progress, check)`, where the check compares the `pair` of checkpoints for the finished folder."""
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(bar(f"converting {Path(self.source).name}", unit="B"))

            def check(folder: Path) -> dict[str, Any] | bool:
                stack.close()
                _say_written(folder)
                return self.verify(*pair(folder), {str(folder): str(final)})

            convert(progress, check)

    def verify(self, a: str, b: str, names: dict[str, str]) -> dict[str, Any] | bool:
        """What is to be recorded of the comparison; `names` says what to call the folders in it. Raises RunError if it fails."""
        if not self.options.verify:
            print("not verified (verify=false)")
            return False
        from rich.console import Console

        from conversion import verify

        kept = "what was converted is kept: the same command goes on from there, verify=false takes it as it is"
        o = self.options
        try:
            with bar("verifying") as progress:
                report = verify.check(a, b, prompts=o.prompts, tp=o.tp, pp=o.pp, ep=o.ep, progress=progress)
        except (UserError, RunError) as error:
            raise type(error)(f"{error}; {kept}") from error
        for folder, name in names.items():
            report.a, report.b = report.a.replace(folder, name), report.b.replace(folder, name)
        if not report.passed:
            report.show(Console())
            raise RunError(f"{report.failure}; {kept}")
        print(f"verified: {report.summary}")
        return {"summary": report.summary, "dtype": report.dtype, "layout": report.layout, "seconds": round(report.seconds, 1)}

    def check_layout(self, architecture: Architecture) -> None:
        """Refuse a verification that the model's shape does not allow before anything is converted."""
        if self.options.verify:
            from conversion.compare.megatron import Layout

            Layout(self.options.tp, self.options.pp, self.options.ep).check(architecture)


def _hf_to_nemo(job: Job) -> None:
    _to_nemo(job, _hf_folder("from", job.source), None)


def _to_nemo(job: Job, hf: Path, source: str | None) -> None:
    from conversion import families, hf_to_nemo

    job.check_layout(families.architecture(hf_to_nemo.read_config(hf)))
    dtype = job.options.dtype
    job.run(
        lambda progress, check: hf_to_nemo.convert(
            hf, job.target, dtype=dtype, progress=progress, workers=job.workers, check=check, source=source
        ),
        lambda folder: (f"hf:{hf}", f"nemo:{folder}"),
        job.target,
    )


def _nemo_to_hf(job: Job) -> None:
    _export(job, job.target, job.options.dtype)


def _export(job: Job, target: Path, dtype: str | None) -> None:
    from conversion import nemo_folder, nemo_to_hf
    from conversion.hf_to_nemo import read_config
    from conversion.multimodal import OWN_TYPE

    nemo = nemo_folder.find(Path(job.source).expanduser())
    job.check_layout(nemo.architecture)
    job.run(
        lambda progress, check: nemo_to_hf.export(
            nemo, target, dtype=dtype, max_shard_bytes=job.max_shard_bytes, progress=progress, workers=job.workers, check=check
        ),
        lambda folder: (f"nemo:{nemo.folder}", f"hf:{folder}"),
        target,
    )
    if nemo.senses and read_config(target).get("model_type") == OWN_TYPE:
        print(f"note: transformers has no class with this encoder and projector: model_type={OWN_TYPE} is a form of our own")


def _from_gguf(job: Job) -> tuple[Path, dict[str, Any] | bool]:
    """The GGUF file as an intermediate Hugging Face folder, verified, and what the verification found."""
    from conversion import gguf

    staged, file = job.staged(), Path(job.source).expanduser()
    if not staged.is_dir():
        with bar(f"reading {file.name}", unit="B") as progress:
            gguf.to_hf(file, staged, job.options.dtype or "float32", progress, job.max_shard_bytes or gguf.MAX_SHARD_BYTES)
    _say_written(staged)
    return staged, job.verify(f"gguf:{file}", f"hf:{staged}", {str(staged): str(job.target)})


def _gguf_to_hf(job: Job) -> None:
    from nemo_ext.run_folder import write_json

    staged, verified = _from_gguf(job)
    record = {"source": f"gguf:{Path(job.source).expanduser().absolute()}", "dtype": job.options.dtype, "verified": verified}
    write_json(staged / "conversion.json", record)
    os.rename(staged, job.target)


def _gguf_to_nemo(job: Job) -> None:
    staged, _ = _from_gguf(job)
    _to_nemo(job, staged, f"gguf:{Path(job.source).expanduser().absolute()}")
    shutil.rmtree(staged)


def _hf_to_gguf(job: Job) -> None:
    _to_gguf(job, _hf_folder("from", job.source))


def _nemo_to_gguf(job: Job) -> None:
    from conversion import nemo_folder

    nemo_folder.find(Path(job.source).expanduser())
    staged = job.staged()
    if not staged.is_dir():
        _export(job, staged, None)
    _to_gguf(job, staged, job.name)
    shutil.rmtree(staged)


def _to_gguf(job: Job, hf: Path, name: str | None = None) -> None:
    from conversion.gguf import writer as gguf_writer

    with bar(f"writing {job.target.name}") as progress:
        written = gguf_writer.from_hf(hf, job.target, job.options.dtype or "f16", progress, name=name)
    _say_written(job.target)
    print(f"read back: the weights are the source's up to {written.largest_error:.2g}")
    for note in written.notes:
        print(f"note: {note}")


def _lora_to_hf(job: Job) -> None:
    from conversion.lora import merge as lora_merge

    base = _base(job, "hf")
    with bar(f"merging {Path(job.source).name}") as progress:
        merged = lora_merge.merge(
            base, Path(job.source).expanduser(), job.target, job.options.dtype, progress, measure=job.options.verify
        )
    _say_written(job.target)
    print(f"{merged.tensors} tensors changed; storing them lost {merged.rounding:.2g} of the change at most")
    if merged.difference is None:
        print("not verified (verify=false)")
    else:
        print(
            f"verified: logits differ from PEFT's by {merged.difference.max_abs:.2g}, the adapter's effect is "
            f"{merged.effect.max_abs:.2g}"
        )


def _lora_to_nemo(job: Job) -> None:
    from conversion.lora import to_nemo as lora_to_nemo

    base = _base(job, "hf", "nemo")
    with bar(f"converting {Path(job.source).name}", unit="B") as progress:
        lora_to_nemo.convert(Path(job.source).expanduser(), base, job.target, progress=progress, workers=job.workers)
    _say_written(job.target)


def _nemo_to_lora(job: Job) -> None:
    from conversion.lora import from_nemo as lora_from_nemo

    with bar(f"converting {Path(job.source).name}", unit="B") as progress:
        lora_from_nemo.convert(Path(job.source).expanduser(), job.target, progress=progress)
    _say_written(job.target)


ROUTES = {
    ("hf", "nemo"): _hf_to_nemo,
    ("nemo", "hf"): _nemo_to_hf,
    ("gguf", "hf"): _gguf_to_hf,
    ("gguf", "nemo"): _gguf_to_nemo,
    ("hf", "gguf"): _hf_to_gguf,
    ("nemo", "gguf"): _nemo_to_gguf,
    ("lora", "hf"): _lora_to_hf,
    ("lora", "nemo"): _lora_to_nemo,
    ("nemo", "lora"): _nemo_to_lora,
}


def _parse(name: str, value: str) -> tuple[str, str]:
    kind, separator, rest = value.partition(":")
    if not separator or kind not in KINDS or not rest:
        raise UserError(f"{name}={value}: give {', '.join(f'{kind}:PATH' for kind in KINDS)}")
    return kind, rest


def _hf_folder(name: str, text: str) -> Path:
    """A Hugging Face folder by its path, or by its model's name in the local cache."""
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    from conversion import hub_cache

    cached = hub_cache.find(text)
    if cached is None:
        raise UserError(f"{name}=hf:{text}: neither a folder nor a model in Hugging Face's local cache")
    return cached


def _base(job: Job, *kinds: str) -> Path:
    """The folder of the model that an adapter is for."""
    wanted = " or ".join(f"base={kind}:FOLDER" for kind in kinds)
    if not job.options.base:
        raise UserError(f"from=lora: needs the model that the adapter is for: {wanted}")
    kind, rest = _parse("base", job.options.base)
    if kind not in kinds:
        raise UserError(f"base={job.options.base}: give {wanted}")
    return _hf_folder("base", rest) if kind == "hf" else Path(rest).expanduser()


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.lower())
    if not match or match[2] not in BYTES or float(match[1]) <= 0:
        raise UserError(f"max_shard={text} is no size: 5GB, 500MB, 2GiB")
    return max(1, int(float(match[1]) * BYTES[match[2]]))


def _say_written(path: Path) -> None:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"written: {size / 1e6:,.1f} MB in {len(files)} files, peak resident memory {peak / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    example = "python conversion/convert.py from=hf:FOLDER to=nemo:FOLDER"
    sys.exit(
        main(Options, command, sys.argv[1:], about="Converts checkpoints, and compares what the models compute.", example=example)
    )
