"""Speculative decoding: cheap guesses of the next few tokens, which the model checks in one pass (Leviathan et al. 2023,
arXiv:2211.17192). What is answered is what the model alone would answer: the same tokens when greedy, the same distribution else.

A drafter's `read`, `propose` and `caches` are those of `Nothing`. The engine checks what it proposes (`sampling.accept`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from deploy.engine.cache import RowCache
from deploy.engine.network import Network
from deploy.engine.prompts import load_tokenizer
from deploy.engine.sampling import Guess, draw, probabilities
from deploy.engine.scheduler import Sequence
from nemo_ext.errors import UserError

NGRAM = "ngram"
SIZES = (3, 2)  # tokens that must have stood together before, the longest first


@dataclass
class Draft:
    """Guessed tokens, and the distribution [v] that each was drawn from; None: it was not drawn."""

    tokens: list[int] = field(default_factory=list)
    q: list[torch.Tensor | None] = field(default_factory=list)

    def guess(self, place: int) -> Guess | None:
        """The token at `place`, if it was drawn."""
        drawn = place < len(self.q) and self.q[place] is not None
        return (self.tokens[place], self.q[place]) if drawn else None


def ahead(tried: int, guessed: int, held: int, most: int) -> int:
    """Tokens to guess in a sequence's next step, after `held` of `guessed` ones were right where `tried` were asked for: two
    more, at most `most`, if all were, else one less. So few are wasted where guesses seldom hold."""
    if not guessed:
        return tried
    return min(tried + 2, most) if held == guessed else max(tried - 1, 1)


class Nothing:
    """No drafts: one token a step."""

    caches: tuple[RowCache, ...] = ()

    def read(self, sequences: Rows[Sequence], tokens: Rows[Rows[int]]) -> None:
        """More `tokens` of prompts are read."""

    def propose(self, sequences: Rows[Sequence], counts: Rows[int]) -> list[Draft]:
        """At most `counts` tokens for each sequence."""
        return [Draft() for _ in sequences]


class NGrams(Nothing):
    """Prompt lookup: what followed when the last tokens stood in the same text before. Needs no model, and suits answers that
    repeat their prompt or themselves."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Sequence, _Followers] = WeakKeyDictionary()

    def propose(self, sequences: Rows[Sequence], counts: Rows[int]) -> list[Draft]:
        """Where nothing is found, none."""
        drafts = []
        for sequence, count in zip(sequences, counts, strict=True):
            followers = self._seen.setdefault(sequence, _Followers())
            tokens = followers.find(sequence.ids, count) if count else []
            drafts.append(Draft(tokens, [None] * len(tokens)))
        return drafts


class _Followers:
    """Where each n-gram of a growing text stood last."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # an n-gram: the place after it
        self._known = 0

    def find(self, ids: list[int], count: int) -> list[int]:
        """The `count` tokens that followed the text's last n-gram before; a text that repeats itself goes on doing so."""
        for end in range(self._known, len(ids) - 1):
            for size in SIZES:
                if end + 1 >= size:
                    self._after[tuple(ids[end + 1 - size : end + 1])] = end + 1
        self._known = max(self._known, len(ids) - 1)
        at = next((at for size in SIZES if (at := self._after.get(tuple(ids[-size:])))), None)
        return [] if at is None else [ids[at + place % (len(ids) - at)] for place in range(count)]


class DraftModel(Nothing):
    """A smaller model with the same tokens and a cache with the same rows."""

    def __init__(self, network: Network, vocabulary: int) -> None:
        """`vocabulary`: the number of the large model's logits."""
        self._network, self._vocabulary = network, vocabulary
        self.caches = (network.cache,)

    def read(self, sequences: Rows[Sequence], tokens: Rows[Rows[int]]) -> None:
        """Read more `tokens` of prompts."""
        mine = [(s, new) for s, new in zip(sequences, tokens, strict=True) if s.group.search is None]
        if mine:
            self._forward([s for s, _ in mine], [new for _, new in mine])

    def propose(self, sequences: Rows[Sequence], counts: Rows[int]) -> list[Draft]:
        """`counts` tokens for each sequence: the likeliest, or drawn with the sequence's own temperature and filters."""
        drafts = [Draft() for _ in sequences]
        for place in range(max(counts, default=0)):
            rows = [row for row, count in enumerate(counts) if count > place]
            chosen = [sequences[row] for row in rows]
            new = [(sequences[row].ids + drafts[row].tokens)[sequences[row].drafted :] for row in rows]
            logits, likeliest = self._forward(chosen, new)
            p = probabilities(logits, [s.state for s in chosen])
            for number, (row, sequence) in enumerate(zip(rows, chosen, strict=True)):
                q = p.get(number)
                drafts[row].tokens.append(likeliest[number] if q is None else draw(q, sequence.state.generator))
                drafts[row].q.append(q)
        return drafts

    def _forward(self, sequences: list[Sequence], tokens: Rows[Rows[int]]) -> tuple[torch.Tensor, list[int]]:
        """Logits [b, v] of the large model's v, and the likeliest tokens. Raises RuntimeError where they are no numbers."""
        starts = [s.drafted for s in sequences]
        logits = self._network.forward([s.row for s in sequences], tokens, starts, [None] * len(sequences))
        if missing := self._vocabulary - logits.shape[-1]:  # either may be padded beyond the tokens
            logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        largest, likeliest = logits.max(dim=-1)
        if any(map(math.isnan, largest.tolist())):  # the largest is NaN where any of them is
            for sequence in sequences:
                self._network.cache.clear(sequence.row)
            raise RuntimeError("the draft model computed no number")
        for sequence, new in zip(sequences, tokens, strict=True):
            sequence.drafted += len(new)
        return logits, likeliest.tolist()


def load(
    draft: str | Path | None, tokenizer, vocabulary: int, *, rows: int, prefill_tokens: int, context: int, dtype: str | None
) -> Nothing:
    """The drafter that `draft` names: None, "ngram", or the folder of a model with the same tokens. Raises UserError."""
    if draft is None:
        return Nothing()
    if draft == NGRAM:
        return NGrams()
    if load_tokenizer(Path(draft)).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"draft={draft} has other tokens than the model: guesses must be in the same ones")
    try:
        network = Network(Path(draft), rows=rows, prefill_tokens=prefill_tokens, context=context, dtype=dtype)
    except UserError as error:
        raise UserError(f"draft: {error}") from None
    return DraftModel(network, vocabulary)
