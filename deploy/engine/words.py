"""Words that an answer must hold or must not: sequences of token ids, found among the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Word = tuple[int, ...]  # ids


def banned(ids: Sequence[int], words: Sequence[Word]) -> list[int]:
    """Tokens that would complete one of `words` after `ids`, as transformers' bad_words_ids has it: the prompt counts too."""
    return [word[-1] for word in words if len(word) == 1 or tuple(ids[1 - len(word) :]) == word[:-1]]


@dataclass(frozen=True)
class Progress:
    """What an answer has of the words that it must hold. Each word is given in several spellings, one of which is enough."""

    left: tuple[tuple[Word, ...], ...] = ()  # words that are still to come
    begun: Word = ()  # the answer's end, as far as it begins one of them
    finished: int = 0  # tokens of the words that have come, each counted by its longest spelling

    @property
    def met(self) -> int:
        """Tokens of the words so far: the number of the bank (Post and Vilar 2018)."""
        return self.finished + len(self.begun)

    def after(self, token: int) -> Progress:
        """With one more token."""
        if not self.left:
            return self
        tail = (*self.begun, token)
        for number, word in enumerate(self.left):
            if any(tail[-len(spelling) :] == spelling for spelling in word):
                rest = self.left[:number] + self.left[number + 1 :]
                return Progress(rest, (), self.finished + max(map(len, word)))
        starts = (tail[at:] for at in range(len(tail)))
        begun = next((start for start in starts if any(spelling[: len(start)] == start for spelling in self._spellings())), ())
        return Progress(self.left, begun, self.finished)

    def wanted(self) -> set[int]:
        """Tokens that begin a word or go on with the one that is begun."""
        size = len(self.begun)
        going_on = {spelling[size] for spelling in self._spellings() if len(spelling) > size and spelling[:size] == self.begun}
        return going_on | {spelling[0] for spelling in self._spellings()}

    def _spellings(self) -> list[Word]:
        return [spelling for word in self.left for spelling in word]
