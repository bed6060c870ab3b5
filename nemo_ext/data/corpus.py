"""From sources to Megatron's indexed datasets: tokenised in parallel, split by document, cached by content.

    cache_dir/<key>/train.bin, train.idx, heldout.bin, heldout.idx, corpus.json     one source, finished
    cache_dir/<key>.partial/                                                        one source, being built
    cache_dir/fingerprints.json                                                     digests of files already read

The key of a source is a hash of its files' bytes, the tokenizer, and the split. A builder holds a lock on the key, so that of
two the second waits and finds the work done; it writes finished blocks beside each other, joins them, and renames the folder:
killed at any moment, it leaves nothing under the final name, and the next one continues behind the last finished block.

Documents are never split between training and held-out data: a document is held out if a hash of its text and the seed falls
below `heldout`. The same text therefore lands on the same side wherever it stands, in every source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from nemo_ext.data import readers
from nemo_ext.data.cache import Prepared, built, content_of, durable, writing
from nemo_ext.data.encoder import Encoder, IdsDiffer
from nemo_ext.data.indexed import write_index
from nemo_ext.data.readers import Block
from nemo_ext.data.sources import Source
from nemo_ext.data.split import SMALLEST, Split, adjust
from nemo_ext.data.workers import spread
from nemo_ext.disk import write_atomic
from nemo_ext.errors import UserError

FORMAT = 1  # part of the keys: raise it when the same input gives other files
IN_PROCESS_BYTES = 32 << 20  # below this, starting processes costs more than it saves
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SourceCorpus:
    """One source, tokenised. Prefixes are paths without .bin and .idx; `heldout_prefix` is None without held-out documents."""

    name: str
    weight: float
    key: str
    train_prefix: str
    heldout_prefix: str | None
    train_tokens: int
    heldout_tokens: int
    train_documents: int
    heldout_documents: int


@dataclass(frozen=True)
class Corpus(Prepared):
    """All sources of a run, tokenised. Token counts include one end-of-document token a document."""

    source_type: ClassVar[type] = SourceCorpus

    key: str
    sources: list[SourceCorpus]
    tokenizer_dir: str
    vocab_size: int
    eod: int
    dtype: str
    encoder: str
    train_tokens: int = field(init=False)
    heldout_tokens: int = field(init=False)
    train_documents: int = field(init=False)
    heldout_documents: int = field(init=False)


def prepare(
    sources: Iterable[Source],
    tokenizer_dir: str | Path,
    cache_dir: str | Path,
    *,
    heldout: float = 0.02,
    seed: int = 1234,
    seq_length: int,
    workers: int,
    text_key: str = "text",
    progress: Progress | None = None,
    engine: str | None = None,
) -> Corpus:
    """Tokenise sources into Megatron's indexed datasets, or find them in the cache.

    `heldout` is the share of documents kept out of training (0 for none). `workers` processes encode; the result does not
    depend on their number. `progress(done, total)` is called with bytes read. `engine` "tokenizers" asks for the reference.
    Raises UserError for unreadable sources, for text shorter than one sequence of `seq_length` tokens, where no document can
    be held out, and for a cache that cannot be written.
    """
    sources = list(sources)
    if not 0 <= heldout < 1:
        raise UserError(f"heldout={heldout}: a share of the documents from 0 to below 1")
    cache = Path(cache_dir).expanduser().absolute()
    encoder = Encoder(tokenizer_dir, engine)
    encoder.eod  # noqa: B018  (refused before the work, not after)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        named = [_on_disk(source, cache) for source in sources]
        contents = [content_of(source, cache) for source in named]
        split = Split(seed, int(heldout * 2**64))
        try:
            metas, split = _build_all(named, contents, encoder, cache, split, workers, text_key, progress)
        except IdsDiffer as difference:
            encoder.use_reference(str(difference))
            metas, split = _build_all(named, contents, encoder, cache, split, workers, text_key, progress)
    _check_lengths(sources, metas, heldout, seq_length)
    return _corpus(sources, metas, encoder, cache)


def _build_all(
    sources: list[Source],
    contents: list[str],
    encoder: Encoder,
    cache: Path,
    split: Split,
    workers: int,
    text_key: str,
    progress: Progress | None,
) -> tuple[list[dict], Split]:
    """The metadata of all sources under a split that leaves no source without training documents nor the whole without held-out
    ones. Only corpora of few documents need another split than the one asked for."""
    total = sum(readers.size_of(source)[0] for source in sources)

    def build(split: Split) -> list[dict]:
        metas, done = [], 0
        for source, content in zip(sources, contents, strict=True):
            report = None if progress is None else lambda now, before=done: progress(min(before + now, total), total)
            metas.append(_build(source, content, encoder, cache, split, workers, text_key, report))
            done += readers.size_of(source)[0]
        return metas

    metas = build(split)
    adjusted = adjust(split, metas)
    return (metas, split) if adjusted == split else (build(adjusted), adjusted)


def _build(
    source: Source,
    content: str,
    encoder: Encoder,
    cache: Path,
    split: Split,
    workers: int,
    text_key: str,
    progress: Progress | None,
) -> dict:
    """The metadata of one source, from the cache or built into it."""

    def build(partial: Path) -> dict:
        _check_space(source, encoder, cache)
        return _write(source, encoder, split, workers, text_key, partial, progress)

    settings = [FORMAT, content, encoder.fingerprint, str(encoder.dtype), *split.settings, text_key]
    meta = built(cache, settings, "corpus.json", build, gives_up_on=(UserError, IdsDiffer))
    if progress is not None:
        progress(readers.size_of(source)[0], readers.size_of(source)[0])
    return meta


def _write(
    source: Source, encoder: Encoder, split: Split, workers: int, text_key: str, partial: Path, progress: Progress | None
) -> dict:
    """Encode all blocks into parts, join them into .bin and .idx, and return the metadata."""
    done, parts = 0, 0
    for size in _encode_parts(source, encoder, split, workers, text_key, partial):
        done, parts = done + size, parts + 1
        if progress is not None:
            progress(done, readers.size_of(source)[0])
    meta: dict = {"source": source.name, "encoder": encoder.engine, "dtype": str(encoder.dtype), "eod": encoder.eod}
    hashes = np.unique(np.concatenate([_part(partial, i)["hashes"] for i in range(parts)] or [np.empty(0, np.uint64)]))
    if not len(hashes):
        raise UserError(f"data={source.name}: no text in it: all documents are empty")
    meta["smallest"], meta["largest"] = [int(h) for h in hashes[:SMALLEST]], int(hashes[-1])
    for side in ("train", "heldout"):
        lengths = np.concatenate([_part(partial, i)[side] for i in range(parts)] or [np.empty(0, np.int64)])
        meta[f"{side}_documents"], meta[f"{side}_tokens"] = len(lengths), int(lengths.sum())
        if len(lengths):
            with durable(partial / f"{side}.bin") as file:
                for i in range(parts):
                    with open(partial / f"part-{i:06d}.{side}", "rb") as part:
                        shutil.copyfileobj(part, file, 1 << 24)
            with durable(partial / f"{side}.idx") as file:
                write_index(file, lengths, encoder.dtype)
    for path in partial.glob("part-*"):
        path.unlink()
    return meta


# Blocks, encoded in processes


def _encode_parts(source: Source, encoder: Encoder, split: Split, workers: int, text_key: str, partial: Path) -> Iterator[int]:
    """Encode the blocks that have no part yet. Yields the size of each block as it is done, in any order."""
    small = readers.size_of(source)[1] < IN_PROCESS_BYTES
    job = (encoder, split, text_key, partial)
    yield from spread(_encode_block, job, enumerate(readers.plan(source, text_key)), 1 if small else workers, source.name)


def _encode_block(job: tuple[Encoder, Split, str, Path], task: tuple[int, Block]) -> int:
    """Write one part: its tokens by side, then, as the sign that it is complete, its lengths and hashes."""
    (encoder, split, text_key, partial), (number, block) = job, task
    if _has_part(partial, number):
        return block.size
    lengths: dict[str, list[np.ndarray]] = {"train": [np.empty(0, np.int64)], "heldout": [np.empty(0, np.int64)]}
    hashes = [np.empty(0, np.uint64)]
    stem = str(partial / f"part-{number:06d}")
    with open(f"{stem}.train", "wb") as train, open(f"{stem}.heldout", "wb") as heldout:
        for texts in readers.batches(block, text_key):
            hashes.append(_hashes(texts, split, block))
            held = split.holds_out(hashes[-1])
            tokens, counts = _with_eod(*encoder.encode(texts), encoder.eod, encoder.dtype)
            if not held.any():
                train.write(tokens.data)
            else:
                of_held = np.repeat(held, counts)
                train.write(tokens[~of_held].data)
                heldout.write(tokens[of_held].data)
            lengths["train"].append(counts[~held])
            lengths["heldout"].append(counts[held])
    with open(f"{stem}.tmp", "wb") as file:
        np.savez(file, hashes=np.concatenate(hashes), **{side: np.concatenate(parts) for side, parts in lengths.items()})
    os.replace(f"{stem}.tmp", f"{stem}.npz")
    return block.size


def _with_eod(ids: np.ndarray, counts: np.ndarray, eod: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with one end-of-document token after each document, and the lengths with it."""
    tokens = np.empty(len(ids) + len(counts), dtype)
    ends = np.cumsum(counts + 1) - 1
    is_text = np.ones(len(tokens), bool)
    is_text[ends] = False
    tokens[is_text] = ids
    tokens[ends] = eod
    return tokens, counts + 1


def _hashes(texts: list[str], split: Split, block: Block) -> np.ndarray:
    try:
        return np.array([split.hash(text) for text in texts], np.uint64)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{block.files[0]}: half of a surrogate pair, \\u{ord(error.object[error.start]):04x}, in a document that begins "
            f"{error.object[:30]!r}: the file was not written as Unicode"
        ) from None


def _has_part(partial: Path, number: int) -> bool:
    return (partial / f"part-{number:06d}.npz").is_file()


def _part(partial: Path, number: int) -> dict[str, np.ndarray]:
    with np.load(partial / f"part-{number:06d}.npz") as part:
        return dict(part)


# What the key is made of


def _on_disk(source: Source, cache: Path) -> Source:
    """`python-docs` as a JSONL file in the cache, written once for a version of Python; other sources as they are."""
    if source.kind != "python-docs":
        return source
    import sys

    from nemo_ext.data import stdlib_docs

    version = hashlib.blake2b(f"{FORMAT} {sys.version}".encode(), digest_size=8).hexdigest()
    path = cache / f"python-docs-{version}.jsonl"
    if not path.is_file():
        lines = [json.dumps({"title": title, "text": text}, ensure_ascii=False) for title, text in stdlib_docs.documents()]
        write_atomic(path, "\n".join(lines) + "\n")
    return dataclasses.replace(source, kind="files", files=(path,), chosen=True)


# Results and refusals


def _check_lengths(sources: list[Source], metas: list[dict], heldout: float, seq_length: int) -> None:
    for source, meta in zip(sources, metas, strict=True):
        if meta["train_tokens"] < seq_length + 1:
            raise UserError(
                f"data={source.name}: {meta['train_tokens']} tokens for training are less than one sequence of {seq_length} (and "
                "one token to predict): give more text or a smaller seq="
            )
    tokens = sum(meta["heldout_tokens"] for meta in metas)
    if heldout and tokens < seq_length + 1:
        raise UserError(
            f"data=: {tokens} held-out tokens are less than one sequence of {seq_length} (and one token to predict): give more "
            f"text, a larger heldout= (now {heldout:g}), a smaller seq=, or heldout=0 for no held-out loss"
        )


def _corpus(sources: list[Source], metas: list[dict], encoder: Encoder, cache: Path) -> Corpus:
    results = []
    for source, meta in zip(sources, metas, strict=True):
        folder = cache / meta["key"]
        results.append(
            SourceCorpus(
                name=source.name,
                weight=meta["train_tokens"] if source.weight is None else source.weight,
                key=meta["key"],
                train_prefix=str(folder / "train"),
                heldout_prefix=str(folder / "heldout") if meta["heldout_documents"] else None,
                **{name: meta[name] for name in ("train_tokens", "heldout_tokens", "train_documents", "heldout_documents")},
            )
        )
    key = hashlib.blake2b(json.dumps([[r.key, r.weight] for r in results]).encode(), digest_size=16).hexdigest()
    return Corpus(
        key=key,
        sources=results,
        tokenizer_dir=str(encoder.folder),
        vocab_size=encoder.vocab_size,
        eod=encoder.eod,
        dtype=str(encoder.dtype),
        encoder=metas[0]["encoder"],
    )


def _check_space(source: Source, encoder: Encoder, cache: Path) -> None:
    """Refuse before the work what cannot be stored: tokens of two bytes of text on average, twice, as blocks are joined."""
    text = readers.size_of(source)[1]
    needed = text // 2 * encoder.dtype.itemsize * 2
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise UserError(
            f"{cache}: {free / 1e9:.1f} GB free, and up to {needed / 1e9:.1f} GB are needed to tokenise {text / 1e9:.1f} GB of "
            f"{source.name}: make room or choose another folder for the cache"
        )
