"""Perplexity on a text, over windows that slide by a stride.

Each document is scored whole, alone, after the tokenizer's bos (eos where it has none). The model sees windows of at most
`window` tokens that begin `stride` tokens apart; each scores the tokens that the one before it did not reach. With stride =
window the windows are fixed and the first token after a cut is predicted from a single one; a smaller stride leaves every token
more than window - stride tokens of context, as far as there are so many before it.
Nats per token depend on the tokenizer; bits per byte (of UTF-8) do not, and compare any two models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from nemo_ext.data import readers
from nemo_ext.data.sources import Source
from nemo_ext.errors import UserError
from nemo_ext.evaluation.model import Model, Progress, Request
from nemo_ext.evaluation.results import Metric, Result, ratio

LONGEST_WINDOW = 2048  # where nothing else is asked for
ENOUGH_DOCUMENTS = 10  # with fewer the interval is over windows
REQUESTS = 256  # windows scored at a time


def documents(source: Source, text_key: str, limit: int | None = None) -> list[str]:
    """The texts of a source. Raises UserError if there are none, and what the readers raise."""
    found: list[str] = []
    for block in readers.plan(source, text_key):
        for batch in readers.batches(block, text_key):
            found += batch
            if limit is not None and len(found) >= limit:
                return found[:limit]
    if not found:
        raise UserError(f"ppl:{source.name}: there is no text in it")
    return found


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored) of the windows over `length` tokens: the model sees [begin, end - 1), all but the last.

    Position 0 is not scored, every other exactly once.
    """
    scored = 1
    for begin in range(0, length - 1, stride):
        end = min(begin + window + 1, length)
        yield begin, end, scored
        scored = end
        if end == length:
            return


def choose_window(model: Model, window: int | None, stride: int | None) -> tuple[int, int]:
    """The window and stride in tokens for a model, checked. Half the window is the stride where none is given."""
    window = min(model.context, LONGEST_WINDOW) if window is None else window
    if window < 1:
        raise UserError(f"window={window} must be 1 or more")
    if window > model.context:
        raise UserError(f"window={window} is more than the {model.context} positions of {model.name}")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"stride={stride}: from 1 to window={window}")
    return window, stride


def evaluate(
    model: Model, texts: list[str], *, window: int | None = None, stride: int | None = None, progress: Progress | None = None
) -> Result:
    """Perplexity, nats per token and bits per byte of `model` on documents. `progress` counts bytes of text."""
    window, stride = choose_window(model, window, stride)
    per_window: list[tuple[int, float, int]] = []  # document, -ln p, tokens
    sizes: list[int] = []  # bytes of each document
    counts: list[int] = []  # and tokens
    pending: list[tuple[int, Request]] = []
    scored = 0  # bytes

    def score(done: int) -> None:
        """Score what is pending; with it, `done` bytes are."""
        nonlocal scored
        requests = [request for _, request in pending]
        advance = (lambda n: progress(scored + (done - scored) * n // len(requests))) if progress else None
        for (document, request), log_p in zip(pending, model.log_likelihoods(requests, advance), strict=True):
            per_window.append((document, -float(log_p.sum()), len(request.ids) - request.start))
        pending.clear()
        scored = done

    for number, text in enumerate(texts):
        ids = [model.start_id, *model.encode(text)]
        sizes.append(len(text.encode()))
        counts.append(len(ids) - 1)
        for begin, end, first in windows(len(ids), window, stride):
            pending.append((number, Request(tuple(ids[begin:end]), first - begin)))
            if len(pending) >= REQUESTS:
                score(sum(sizes[:-1]) + sizes[-1] * end // len(ids))
    score(sum(sizes))
    return _result(model, per_window, sizes, counts, window, stride)


def _result(
    model: Model, per_window: list[tuple[int, float, int]], sizes: list[int], counts: list[int], window: int, stride: int
) -> Result:
    if len(sizes) >= ENOUGH_DOCUMENTS:
        what, units = "documents", [[0.0, counts[i], sizes[i]] for i in range(len(sizes))]
        for document, nats, _ in per_window:
            units[document][0] += nats
    else:  # a window takes the share of its document's bytes that it has of its tokens
        what = "windows"
        units = [[nats, tokens, sizes[document] * tokens / counts[document]] for document, nats, tokens in per_window]
    nats = ratio("nats per token", [[n, t] for n, t, _ in units], what, better="lower")
    bits = ratio("bits per byte", [[n / math.log(2), b] for n, _, b in units], what, better="lower")
    perplexity = Metric(
        "perplexity", *(None if x is None else _exp(x) for x in (nats.value, nats.low, nats.high)),
        better="lower", count=nats.count, interval=nats.interval,
    )  # fmt: skip
    context = "no overlap" if stride == window else f"{window - stride + 1} tokens of context or more where there are as many"
    start = model.tokenizer.convert_ids_to_tokens(model.start_id)
    about = [
        f"{len(sizes):,} document{'s' if len(sizes) > 1 else ''}, {sum(sizes):,} bytes, {sum(counts):,} tokens",
        f"windows of {window} tokens, {stride} apart ({context}); every document begins after {start}",
    ]
    return Result([perplexity, nats, bits], about)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def size_of(texts: list[str]) -> int:
    """Bytes of the documents: what `progress` counts to."""
    return sum(len(text.encode()) for text in texts)
