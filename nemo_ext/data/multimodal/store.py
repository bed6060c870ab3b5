"""Prepared conversations with media: those of `nemo_ext.data.chat.store`, with references to the media beside the ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from nemo_ext.data.chat import preview, store
from nemo_ext.data.chat.render import Settings
from nemo_ext.data.chat.store import ChatCorpus
from nemo_ext.data.corpus import Progress
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
    skip_bad: bool = False,
    heldout: float = 0.02,
    seed: int = 1234,
    workers: int = 1,
    progress: Progress | None = None,
) -> ChatCorpus:
    """`chat.store.prepare` for sources (`sources.parse(data, MEDIA)`) with images and sounds for the senses of `inputs`.

    `images` is the folder that paths in records are relative to, by default that of the records. Media are decoded once: a
    conversation with one that cannot be is bad, counted with `skip_bad` and otherwise an error. The source `glyphs` stands alone,
    with held-out pictures of its own if `heldout` is not 0.
    """
    reader, renderer = _reader_and_renderer(tokenizer_dir, settings, inputs, images, columns)
    options = {"skip_bad": skip_bad, "seed": seed, "workers": workers, "progress": progress}
    sides = list(_drawn(sources, cache_dir))
    if len(sides) == 1:
        return store.prepare_with(reader, renderer, sides[0], cache_dir, heldout=heldout, **options)
    corpora = [store.prepare_with(reader, renderer, side, cache_dir, heldout=0, **options) for side in sides[: 1 + (heldout > 0)]]
    return with_heldout(*corpora) if heldout else corpora[0]


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
) -> tuple[Reader, Renderer]:
    inputs = tuple(inputs)
    reader = Reader(dict(columns or {}), inputs, None if images is None else Path(images).expanduser())
    return reader, Renderer(tokenizer_dir, settings, {each.sense.modality: each.sense.token_id for each in inputs})


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
