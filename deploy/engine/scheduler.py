"""Who runs, in which row. Knows neither torch nor text.

Rows below `decoding` hold sequences that get a token at every step, without holes, so that their cache is read in place; rows
above hold sequences whose prompt is being read, or nothing. Requests are admitted in order of arrival when all rows that they
need (one for each answer or beam) are free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deploy.engine.request import Request

Copy = tuple[list[int], list[int], int]  # rows to copy from, rows to copy to, tokens


@dataclass(eq=False)
class Sequence:
    """One answer, or one beam, in the making."""

    group: Group
    index: int
    ids: list[int]  # prompt and generated
    row: int = -1
    cached: int = 0  # tokens of `ids` whose keys and values are in the row
    drafted: int = 0  # the same in the draft model's row
    ahead: int = 0  # tokens to guess in the next step
    state: Any = None  # what chooses and spells its tokens


@dataclass(eq=False)
class Group:
    """A request and its sequences. The first one reads the prompt for all."""

    request: Request
    id: int
    members: list[Sequence] = field(default_factory=list)
    deadline: float | None = None
    deliver: Any = None
    grammars: list = field(default_factory=list)  # one for each answer, if they follow a schema
    search: Any = None  # the beam search of its members, if that is what it is
    started: float = 0.0  # when it got rows
    seen: Any = None  # embeddings of its media [placeholders, h], while its prompt is read

    @property
    def rows(self) -> int:
        """Rows it needs."""
        return max(self.request.n, self.request.sampling.num_beams)


@dataclass(frozen=True)
class Chunk:
    """`count` more tokens of a prompt to read."""

    sequence: Sequence
    count: int


class Scheduler:
    """`rows` sequences at once; a step reads at most `prefill_tokens` tokens of prompts, padding counted, so that running answers
    wait no longer than that for their next token."""

    def __init__(self, rows: int, prefill_tokens: int) -> None:
        self.prefill_tokens = prefill_tokens
        self.rows: list[Sequence | None] = [None] * rows
        self.decoding = 0
        self.waiting: deque[Group] = deque()
        self.reading: list[Group] = []  # prompts, in order of arrival

    def admit(self) -> list[Group]:
        """Give rows to the requests at the head of the queue."""
        admitted = []
        while self.waiting and self.waiting[0].rows <= self.rows.count(None):
            group = self.waiting.popleft()
            free = [row for row in reversed(range(len(self.rows))) if self.rows[row] is None]
            for index in range(group.rows):
                sequence = Sequence(group, index, list(group.request.prompt), free[index])
                self.rows[sequence.row] = sequence
                group.members.append(sequence)
            self.reading.append(group)
            admitted.append(group)
        return admitted

    def chunks(self) -> list[Chunk]:
        """The prompts' tokens that the next step reads: together they are padded to the longest of them."""
        chosen: list[Chunk] = []
        for group in self.reading:
            first = group.members[0]
            count = min(len(first.ids) - first.cached, self.prefill_tokens)
            width = max([count, *(chunk.count for chunk in chosen)])
            if chosen and width * (len(chosen) + 1) > self.prefill_tokens:
                break
            chosen.append(Chunk(first, count))
        return chosen

    def start(self, group: Group) -> list[Copy]:
        """The group's prompt is read: its sequences decode from now on. Returns the copies that give each its row, in order."""
        self.reading.remove(group)
        copies: list[Copy] = []
        first = group.members[0]
        for sequence in group.members:
            target, length = self.decoding, first.cached
            other = self.rows[target]
            if other is None:
                self._put(None, sequence.row)
                if sequence is first:
                    copies.append(([sequence.row], [target], length))
            elif other is not sequence:
                copies.append(([sequence.row, target], [target, sequence.row], max(sequence.cached, other.cached)))
                self._put(other, sequence.row)
            self._put(sequence, target)
            self.decoding += 1
            if sequence is not first:
                copies.append(([first.row], [target], length))
                sequence.cached, sequence.drafted = length, first.drafted
        return copies

    def leave(self, sequence: Sequence) -> list[Copy]:
        """Free its row; the last decoding row fills the hole. A sequence that left before leaves no more."""
        if sequence.row < 0 or self.rows[sequence.row] is not sequence:
            return []
        copies: list[Copy] = []
        row = sequence.row
        self.rows[row] = None
        if row < self.decoding:
            self.decoding -= 1
            last = self.rows[self.decoding] if row != self.decoding else None
            if last is not None:
                self.rows[self.decoding] = None
                self._put(last, row)
                copies.append(([self.decoding], [row], last.cached))
        elif sequence.group in self.reading:
            self.reading.remove(sequence.group)
        sequence.row = -1
        return copies

    def groups(self) -> list[Group]:
        """Those that have rows, each once."""
        return list({id(s.group): s.group for s in self.rows if s is not None}.values())

    def running(self) -> Iterator[Sequence]:
        """Sequences that decode, by row."""
        return (sequence for sequence in self.rows[: self.decoding] if sequence is not None)

    def _put(self, sequence: Sequence | None, row: int) -> None:
        self.rows[row] = sequence
        if sequence is not None:
            sequence.row = row
