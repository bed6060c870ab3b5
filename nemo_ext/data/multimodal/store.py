"""Prepared conversations with media: those of `nemo_ext.data.chat.store`, with references to the media beside the ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_ext.data.chat import preview, store
from nemo_ext.data.chat.render import Settings
from nemo_ext.data.chat.store import ChatCorpus, Options
from nemo_ext.data.multimodal import glyphs
from nemo_ext.data.multimodal.inputs import Input
from nemo_ext.data.multimodal.media import Media, from_json
from nemo_ext.data.multimodal.records import Reader
from nemo_ext.data.multimodal.render import Renderer
from nemo_ext.data.sources import Source
from nemo_ext.errors import UserError


class Samples(store.Samples):
    """The samples of one side of a source, and their media."""

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix)
        self.extra_starts = np.load(f"{prefix}.extra.starts.npy", mmap_mode="r")
        path = Path(f"{prefix}.extra")
        self.extra = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        self.folder = path.parent

    def __reduce__(self) -> tuple:
        return Samples, (self.prefix,)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, list[Media]]:  # type: ignore[override]
        """ids int64 [tokens], weights uint16 [tokens] in hundredths, and media in the order of their placeholders."""
        part = slice(int(self.extra_starts[number]), int(self.extra_starts[number + 1]))
        return *super().__getitem__(number), from_json(self.extra[part].tobytes(), self.folder)


def prepare(
    sources: Iterable[Source],
    tokenizer_dir: str | Path,
    cache_dir: str | Path,
    settings: Settings,
    inputs: Iterable[Input],
    *,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    reader: type[Reader] = Reader,
    renderer: type[Renderer] = Renderer,
    **options: Any,
) -> ChatCorpus:
    """`chat.store.prepare` for sources (`sources.parse(data, MEDIA)`) with images and sounds for the senses of `inputs`.

    `images` is the folder that paths in records are relative to, by default that of the records; `reader` and `renderer` are
    classes, `options` those of `chat.store.Options`. Media are decoded once: a conversation with one that cannot be is bad,
    counted with `skip_bad` and otherwise an error. The source `glyphs` stands alone, with held-out pictures of its own if
    `heldout` is not 0.
    """
    both = _reader_and_renderer(tokenizer_dir, settings, inputs, images, columns, reader, renderer)
    chosen, (train, *heldout) = Options(**options), _drawn(sources, cache_dir)
    if not heldout:
        return store.prepare_with(*both, train, cache_dir, chosen)
    sides = [train, *(heldout if chosen.heldout else [])]
    corpora = [store.prepare_with(*both, side, cache_dir, replace(chosen, heldout=0)) for side in sides]
    return with_heldout(*corpora) if chosen.heldout else corpora[0]


def show(
    sources: Iterable[Source],
    tokenizer_dir: str | Path,
    cache_dir: str | Path,
    settings: Settings,
    inputs: Iterable[Input],
    *,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    count: int = 1,
    console=None,
) -> None:
    """Print the first `count` conversations of each source as `chat.preview.show` does; a placeholder is shown once."""
    reader, renderer = _reader_and_renderer(tokenizer_dir, settings, inputs, images, columns)
    drawn = next(_drawn(sources, cache_dir))
    preview.show_with(reader, renderer, drawn, count, console, once=tuple(renderer.placeholders.values()))


def _reader_and_renderer(
    tokenizer_dir: str | Path,
    settings: Settings,
    inputs: Iterable[Input],
    images: str | Path | None,
    columns: Mapping[str, str] | None,
    reader: type[Reader] = Reader,
    renderer: type[Renderer] = Renderer,
) -> tuple[Reader, Renderer]:
    inputs = tuple(inputs)
    folder = None if images is None else Path(images).expanduser()
    placeholders = {each.sense.modality: each.sense.token_id for each in inputs}
    return reader(dict(columns or {}), inputs, folder), renderer(tokenizer_dir, settings, placeholders)


def _drawn(sources: Iterable[Source], cache_dir: str | Path) -> Iterator[list[Source]]:
    """The sources; of `glyphs` those to train on, then those held out. Raises UserError where it is not alone."""
    sources = list(sources)
    if not any(source.kind == "glyphs" for source in sources):
        yield sources
        return
    if len(sources) > 1:
        raise UserError("data=glyphs stands alone: it has held-out pictures of its own")
    classes = sources[0].name.partition(":")[2]
    made = glyphs.make(Path(cache_dir).expanduser(), **({"classes": int(classes)} if classes else {}))
    for side in glyphs.SIDES:
        yield [replace(sources[0], kind="files", files=(made[side],))]


def with_heldout(corpus: ChatCorpus, heldout: ChatCorpus) -> ChatCorpus:
    """A corpus of one source with all samples of another as its held-out ones; both were prepared with heldout=0."""
    (source,), (other,) = corpus.sources, heldout.sources
    together = replace(
        source,
        heldout_prefix=other.train_prefix,
        heldout_tokens=other.train_tokens,
        heldout_documents=other.train_documents,
        trained_tokens=source.trained_tokens + other.trained_tokens,
    )
    return replace(corpus, key=f"{corpus.key}-{heldout.key}", sources=[together])
