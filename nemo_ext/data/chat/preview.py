"""One conversation as the model will see it, with the text that counts in the loss in colour."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_ext.data.chat.formats import Conversation
from nemo_ext.data.chat.records import Reader
from nemo_ext.data.chat.render import UNIT, Renderer, Sample, Settings
from nemo_ext.data.sources import Source
from nemo_ext.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

TRAINED, PARTLY = "green", "yellow"


@dataclass(frozen=True)
class Example:
    """A conversation of a source and the samples it becomes; `dropped` says why there are none."""

    source: str
    place: str
    conversation: Conversation
    samples: tuple[Sample, ...]
    dropped: str
    template: str

    def title(self) -> str:
        """The format found and the template, in one line."""
        messages = self.conversation.messages
        features = [
            name
            for name, there in (
                ("tools", self.conversation.tools or any(m.calls for m in messages)),
                ("reasoning", any(m.reasoning for m in messages)),
                ("system prompt", messages[0].role == "system"),
            )
            if there
        ]
        found = " with ".join(filter(None, [self.conversation.format, ", ".join(features)]))
        tokens = sum(len(sample.ids) for sample in self.samples)
        trained = sum(int(np.count_nonzero(sample.weights[1:])) for sample in self.samples)
        counts = f"dropped: {self.dropped}" if self.dropped else f"{tokens} tokens, {trained} trained"
        return f"{self.place}: format {found}; template {self.template}; {counts}"


def examples(
    sources: Iterable[Source],
    tokenizer_dir: str | Path,
    settings: Settings,
    columns: Mapping[str, str] | None = None,
    count: int = 1,
) -> Iterator[Example]:
    """The first `count` conversations of each source, rendered. Raises UserError as `store.prepare` does."""
    yield from examples_with(Reader(dict(columns or {})), Renderer(tokenizer_dir, settings), sources, count)


def examples_with(reader: Reader, renderer: Renderer, sources: Iterable[Source], count: int = 1) -> Iterator[Example]:
    """`examples` with another reader and renderer than those of texts."""
    for source in sources:
        found = 0
        with tempfile.TemporaryDirectory() as folder:
            inline = Path(folder) / "inline.bin"
            for place, parsed in (pair for block in reader.plan(source) for pair in reader.conversations(block, inline)):
                conversation = parsed()
                try:
                    result = renderer.render(conversation)
                except UserError as error:
                    raise UserError(f"{place}: {error}") from None
                yield Example(source.name, str(place), conversation, result.samples, result.dropped, renderer.name)
                found += 1
                if found == count:
                    break
        if not found:
            raise UserError(f"data={source.name}: no conversations in it")


def coloured(example: Example, renderer_tokenizer, once: Collection[int] = ()) -> Text:
    """The title and the text of all samples: trained tokens green, those of a weight below one yellow, the others plain.

    The pieces are the tokens themselves, decoded, so that what is coloured is what is trained. Repetitions of tokens in `once`
    (placeholders) are left out.
    """
    from rich.text import Text

    result = Text().append(example.title() + "\n", style="bold")
    for number, sample in enumerate(example.samples, 1):
        if len(example.samples) > 1:
            result.append(f"-- sample {number} of {len(example.samples)}\n", style="bold")
        for ids, weight in _runs(sample, once):
            style = "dim" if weight == 0 else TRAINED if weight >= UNIT else PARTLY
            result.append(renderer_tokenizer.decode(ids, skip_special_tokens=False), style=style)
        result.append("\n")
    return result


def show(
    sources: Iterable[Source],
    tokenizer_dir: str | Path,
    settings: Settings,
    columns: Mapping[str, str] | None = None,
    count: int = 1,
    console=None,
) -> None:
    """Print the first `count` conversations of each source to a rich console (standard output by default)."""
    show_with(Reader(dict(columns or {})), Renderer(tokenizer_dir, settings), sources, count, console)


def show_with(
    reader: Reader, renderer: Renderer, sources: Iterable[Source], count: int = 1, console=None, once: Collection[int] = ()
) -> None:
    """`show` with another reader and renderer than those of texts; `once` as in `coloured`."""
    from rich.console import Console

    console = console or Console()
    for example in examples_with(reader, renderer, sources, count):
        console.print(coloured(example, renderer.tokenizer, once))


def _runs(sample: Sample, once: Collection[int]) -> Iterator[tuple[list[int], int]]:
    """Neighbouring tokens of one weight."""
    again = np.isin(sample.ids, list(once)) & (sample.ids == np.roll(sample.ids, 1))
    ids, weights = sample.ids[~again], sample.weights[~again]
    edges = np.flatnonzero(np.diff(weights.astype(np.int64))) + 1
    for part in np.split(np.arange(len(ids)), edges):
        yield ids[part].tolist(), int(weights[part[0]])
