"""From sources of conversations to samples on disk: rendered and tokenised in parallel, split by conversation, cached by content.

    cache_dir/<key>/train.ids, train.weights, train.starts.npy, heldout.*, chat.json      one source, finished

`.ids`: the token ids of all samples one after another, uint16 or int32; `.weights`: for each of them what the loss on it counts,
uint16, in hundredths; `.starts.npy`: int64 [samples + 1]. All are mapped into memory, not read. What else belongs to samples
(`Sample.extra`) is in `.extra`, bytes, and `.extra.starts.npy`, int64 [samples + 1]. `unreadable.txt` names what was skipped.

The key is a hash of the files' bytes, the tokenizer, the chat template, and all settings. Locks, interruptions and the split are
those of `nemo_ext.data.corpus`: conversations with the same content land on the same side, whatever their format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nemo_ext.data import readers
from nemo_ext.data.cache import Prepared, built, content_of, durable, writing
from nemo_ext.data.chat.records import Reader
from nemo_ext.data.chat.render import UNIT, Renderer, Sample, Settings
from nemo_ext.data.corpus import Progress
from nemo_ext.data.encoder import Encoder
from nemo_ext.data.readers import Block
from nemo_ext.data.sources import Source
from nemo_ext.data.split import SMALLEST, Split, adjust
from nemo_ext.data.workers import spread
from nemo_ext.errors import UserError

FORMAT = 2  # part of the keys: raise it when the same input gives other files
SIDES = ("train", "heldout")
KINDS = ("ids", "weights", "extra")
NAMED = 3  # unreadable conversations that a report names
UNREADABLE = "unreadable.txt"
FEATURES = ("with tools", "with reasoning", "with images", "with sounds")


@dataclass(frozen=True)
class ChatSource:
    """One source, ready. Prefixes are paths without .ids, .weights and .starts.npy; `weight` is None where none was given.

    `counts`: conversations read, by format ("format messages"), by `Conversation.features`, "split", "truncated", "overlong" and
    "masked" (both dropped), "bad" (skipped; `unreadable` names the first of them). `documents` are samples.
    """

    name: str
    weight: float | None
    key: str
    train_prefix: str
    heldout_prefix: str | None
    train_tokens: int
    heldout_tokens: int
    train_documents: int
    heldout_documents: int
    trained_tokens: int
    counts: dict[str, int]
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ChatCorpus(Prepared):
    """All sources of a run. `template` is the chat template's text, to be saved beside the model; `unit` the greatest weight, in
    hundredths, that all weights are multiples of."""

    source_type: ClassVar[type] = ChatSource

    key: str
    sources: list[ChatSource]
    tokenizer_dir: str
    vocab_size: int
    eod: int
    dtype: str
    template_name: str
    template: str
    unit: int
    train_tokens: int = field(init=False)
    heldout_tokens: int = field(init=False)
    train_documents: int = field(init=False)
    heldout_documents: int = field(init=False)
    trained_tokens: int = field(init=False)

    def report(self) -> list[str]:
        """One line a source for people: what was found, and what was left out."""
        lines = []
        for source in self.sources:
            counts = source.counts
            formats = ", ".join(name.removeprefix("format ") for name in counts if name.startswith("format "))
            extra = [name for name in FEATURES if counts.get(name)]
            done = {
                "split": "split as the template rewrites history",
                "truncated": "truncated",
                "overlong": "dropped as too long",
                "masked": "dropped as no token of them counts",
                "bad": "skipped as unreadable",
            }
            notes = [f"{counts[name]:,} {words}" for name, words in done.items() if counts.get(name)]
            share = source.trained_tokens / max(1, source.train_tokens + source.heldout_tokens)
            line = (
                f"{source.name}: {counts['conversations']:,} conversations ({', '.join([formats, *extra])}), "
                f"{source.train_tokens + source.heldout_tokens:,} tokens, {share:.0%} of them trained"
            )
            lines.append("; ".join([line, *notes]))
            lines += [f"  skipped: {each}" for each in source.unreadable]
            if counts.get("bad", 0) > len(source.unreadable) > 0:
                lines.append(f"  all of them: {Path(source.train_prefix).with_name(UNREADABLE)}")
        return lines


class Samples:
    """The samples of one side of a source, mapped into memory."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.starts = np.load(f"{prefix}.starts.npy", mmap_mode="r")
        meta = json.loads(Path(prefix).with_name("chat.json").read_text())
        self.unit = int(meta["unit"])  # all weights of the source are multiples of it
        self.ids = np.memmap(f"{prefix}.ids", np.dtype(meta["dtype"]), "r")
        self.weights = np.memmap(f"{prefix}.weights", np.uint16, "r")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __reduce__(self) -> tuple:
        return Samples, (self.prefix,)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return np.diff(self.starts)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """ids int64 [tokens], weights uint16 [tokens] in hundredths."""
        part = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.ids[part].astype(np.int64), np.asarray(self.weights[part])


@dataclass(frozen=True)
class _Job:
    """What a worker needs to know."""

    renderer: Renderer
    reader: Reader
    dtype: np.dtype
    skip_bad: bool
    split: Split
    partial: Path


@dataclass(frozen=True)
class Options:
    """How sources are prepared. `skip_bad` counts conversations that cannot be read instead of stopping at the first; `heldout`
    is the share of conversations kept out of training. The result does not depend on `workers`. `progress(done, total)` is called
    with bytes read. Raises UserError for a share that is none."""

    skip_bad: bool = False
    heldout: float = 0.02
    seed: int = 1234
    workers: int = 1
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.heldout < 1:
            raise UserError(f"heldout={self.heldout}: a share of the conversations from 0 to below 1")


def prepare(
    sources: Iterable[Source],
    tokenizer_dir: str | Path,
    cache_dir: str | Path,
    settings: Settings,
    *,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> ChatCorpus:
    """Render and tokenise sources (`sources.parse(data, RECORDS)`), or find them in the cache.

    `columns` names fields of unusual records (see `formats.parse`), `options` are those of `Options`. Raises UserError for what
    cannot be read, rendered, held out or stored, and where no conversation of a source is left to train on.
    """
    reader, renderer = Reader(dict(columns or {})), Renderer(tokenizer_dir, settings)
    return prepare_with(reader, renderer, sources, cache_dir, Options(**options))


def prepare_with(
    reader: Reader, renderer: Renderer, sources: Iterable[Source], cache_dir: str | Path, options: Options
) -> ChatCorpus:
    """`prepare` with another reader and renderer than those of texts."""
    sources = list(sources)
    cache = Path(cache_dir).expanduser().absolute()
    encoder = Encoder(renderer.folder)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        contents = [content_of(source, cache) for source in sources]
        total, progress = sum(readers.size_of(source)[0] for source in sources), options.progress

        def build(split: Split) -> list[dict]:
            metas, done = [], 0
            job = _Job(renderer, reader, encoder.dtype, options.skip_bad, split, cache)
            for source, content in zip(sources, contents, strict=True):
                report = None if progress is None else lambda now, before=done: progress(min(before + now, total), total)
                metas.append(_build(source, content, job, cache, options.workers, report))
                done += readers.size_of(source)[0]
            return metas

        split = Split(options.seed, int(options.heldout * 2**64))
        metas = build(split)
        if (adjusted := adjust(split, metas)) != split:
            metas = build(adjusted)
    return _result(sources, metas, encoder, renderer, cache)


def _build(source: Source, content: str, job: _Job, cache: Path, workers: int, progress) -> dict:
    """The metadata of one source, from the cache or built into it."""
    settings = [FORMAT, content, job.renderer.fingerprint, str(job.dtype), *job.reader.key(source), job.skip_bad]
    meta = built(
        cache,
        [*settings, *job.split.settings],
        "chat.json",
        lambda partial: _write(source, dataclasses.replace(job, partial=partial), workers, progress),
    )
    if progress is not None:
        progress(readers.size_of(source)[0])
    return meta


def _write(source: Source, job: _Job, workers: int, progress) -> dict:
    """Render all blocks into parts, join them, and return the metadata."""
    done = parts = 0
    blocks = enumerate(job.reader.plan(source))
    small = readers.size_of(source)[1] < job.reader.in_process
    for size in spread(_render_block, job, blocks, 1 if small else workers, source.name):
        done, parts = done + size, parts + 1
        if progress is not None:
            progress(done)
    read = [_part(job.partial, number) for number in range(parts)]
    counts: Counter[str] = Counter()
    for part in read:
        counts.update(json.loads(str(part["counts"])))
    hashes = np.unique(np.concatenate([part["hashes"] for part in read] or [np.empty(0, np.uint64)]))
    if not len(hashes):
        raise UserError(f"data={source.name}: {_why_nothing(counts, job.renderer.settings)}")
    meta: dict = {"source": source.name, "dtype": str(job.dtype), "counts": dict(sorted(counts.items()))}
    meta["smallest"], meta["largest"] = [int(h) for h in hashes[:SMALLEST]], int(hashes[-1])
    meta["unit"] = math.gcd(*(int(part["unit"]) for part in read))
    meta["trained_tokens"] = sum(int(part["trained"]) for part in read)
    for side in SIDES:
        lengths = np.concatenate([part[side] for part in read])
        meta[f"{side}_documents"], meta[f"{side}_tokens"] = len(lengths), int(lengths.sum())
        if not len(lengths):
            continue
        for kind in _kinds(job):
            with durable(job.partial / f"{side}.{kind}") as file:
                for number in range(parts):
                    with open(_stem(job.partial, number) + f".{side}.{kind}", "rb") as part:
                        shutil.copyfileobj(part, file, 1 << 24)
        _save_starts(job.partial / f"{side}.starts.npy", lengths)
        if job.renderer.extras:
            _save_starts(job.partial / f"{side}.extra.starts.npy", np.concatenate([part[f"{side}_extra"] for part in read]))
    unreadable = [line for part in read for line in json.loads(str(part["unreadable"]))]
    meta["unreadable"] = unreadable[:NAMED]
    if unreadable:
        (job.partial / UNREADABLE).write_text("\n".join(unreadable) + "\n", encoding="utf-8")
    for path in job.partial.glob("part-*"):
        path.unlink()
    return meta


def _kinds(job: _Job) -> tuple[str, ...]:
    """Files of a side."""
    return KINDS if job.renderer.extras else KINDS[:2]


def _save_starts(path: Path, lengths: np.ndarray) -> None:
    with durable(path) as file:
        np.save(file, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _why_nothing(counts: Counter[str], settings: Settings) -> str:
    if not counts["conversations"]:
        return "no conversations in it"
    if counts["overlong"]:
        return (
            f"nothing to train on: {counts['overlong']} of {counts['conversations']} conversations do not fit into seq="
            f"{settings.seq_length} tokens with a turn of the assistant: choose a larger seq="
        )
    if counts["masked"]:
        return (
            f"nothing to train on: in all {counts['masked']} conversations no token counts in the loss: their weights are 0 with "
            f"train_on={settings.train_on}"
        )
    return f"nothing to train on: all {counts['bad']} conversations are unreadable"


def _render_block(job: _Job, task: tuple[int, Block]) -> int:
    """Write one part: ids and weights by side, then, as the sign that it is complete, lengths, hashes and counts."""
    number, block = task
    stem = _stem(job.partial, number)
    if Path(f"{stem}.npz").is_file():
        return block.size
    lengths: dict[str, list[int]] = {name: [] for side in SIDES for name in (side, f"{side}_extra")}
    hashes: list[int] = []
    unreadable: list[str] = []
    counts: Counter[str] = Counter()
    unit = trained = 0
    files = {(side, kind): open(f"{stem}.{side}.{kind}", "wb") for side in SIDES for kind in _kinds(job)}
    try:
        for digest, samples in _rendered(job, task, counts, unreadable):
            hashes.append(digest)
            side = SIDES[int(job.split.holds_out(np.array([digest], np.uint64))[0])]
            for sample in samples:
                files[side, "ids"].write(sample.ids.astype(job.dtype).data)
                files[side, "weights"].write(sample.weights.data)
                lengths[side].append(len(sample.ids))
                if job.renderer.extras:
                    files[side, "extra"].write(sample.extra)
                    lengths[f"{side}_extra"].append(len(sample.extra))
                unit = math.gcd(unit, *np.unique(sample.weights).tolist())
                trained += int(np.count_nonzero(sample.weights[1:]))
    finally:
        for file in files.values():
            file.close()
    with open(f"{stem}.tmp", "wb") as file:
        arrays = {side: np.array(values, np.int64) for side, values in lengths.items()}
        facts = {"counts": json.dumps(counts), "unreadable": json.dumps(unreadable), "unit": unit, "trained": trained}
        np.savez(file, hashes=np.array(hashes, np.uint64), **facts, **arrays)
    os.replace(f"{stem}.tmp", f"{stem}.npz")
    return block.size


def _rendered(
    job: _Job, task: tuple[int, Block], counts: Counter[str], unreadable: list[str]
) -> Iterator[tuple[int, tuple[Sample, ...]]]:
    """The hash and the samples of each conversation of a block that is not dropped."""
    number, block = task
    for place, parsed in job.reader.conversations(block, job.partial / f"inline-{number:06d}.bin"):
        counts["conversations"] += 1
        try:
            conversation = parsed()
            digest = job.split.hash(conversation.canonical())
            result = job.renderer.render(conversation)
        except UserError as error:
            named = str(error) if str(error).startswith(str(place)) else f"{place}: {error}"
            if not job.skip_bad:
                raise UserError(named) from None
            counts["bad"] += 1
            unreadable.append(named)
            continue
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise UserError(f"{place}: half of a surrogate pair, {half}: the file was not written as Unicode") from None
        counts[f"format {conversation.format}"] += 1
        counts.update(conversation.features())
        counts["split"] += result.split
        counts["truncated"] += result.truncated
        if result.dropped:
            counts[result.dropped] += 1
        else:
            yield digest, result.samples


def _stem(partial: Path, number: int) -> str:
    return str(partial / f"part-{number:06d}")


def _part(partial: Path, number: int) -> dict[str, np.ndarray]:
    with np.load(_stem(partial, number) + ".npz") as part:
        return dict(part)


def _result(sources: list[Source], metas: list[dict], encoder: Encoder, renderer: Renderer, cache: Path) -> ChatCorpus:
    results = []
    for source, meta in zip(sources, metas, strict=True):
        folder = cache / meta["key"]
        same = ("key", "train_tokens", "heldout_tokens", "train_documents", "heldout_documents", "trained_tokens", "counts")
        results.append(
            ChatSource(
                name=source.name,
                weight=source.weight,
                train_prefix=str(folder / "train"),
                heldout_prefix=str(folder / "heldout") if meta["heldout_documents"] else None,
                unreadable=meta.get("unreadable", []),
                **{name: meta[name] for name in same},
            )
        )
    key = hashlib.blake2b(json.dumps([[r.key, r.weight] for r in results]).encode(), digest_size=16).hexdigest()
    return ChatCorpus(
        key=key,
        sources=results,
        tokenizer_dir=str(encoder.folder),
        vocab_size=encoder.vocab_size,
        eod=encoder.eod,
        dtype=str(encoder.dtype),
        template_name=renderer.name,
        template=renderer.template.get("default") or next(iter(renderer.template.values())),
        unit=math.gcd(*(meta["unit"] for meta in metas)) or UNIT,
    )
