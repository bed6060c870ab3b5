"""Token ids as they come, spelled as text: no half characters, nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT = 6  # ids of the prompt that the first ones are spelled after: some tokenizers spell a word by what stands before it
HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character yet


class TextStream:
    """The text of one answer. `push` its ids one by one, `flush` at the end."""

    def __init__(self, tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT:])
        self._before = 0  # ids from here on are spelled together
        self._spelled = len(self._ids)  # ids up to here have been
        self._stop = [text for text in stop if text]
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop text was met (the text ends before it)."""
        self._ids.append(token)
        return self._release(self._new(final=False))

    def flush(self) -> str:
        """What was held back, when no more ids come."""
        text, stopped = self._release(self._new(final=True))
        return text if stopped else text + self._held

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _new(self, final: bool) -> str:
        known = self._decode(self._ids[self._before : self._spelled])
        text = self._decode(self._ids[self._before :])
        if not final and text.endswith(HALF):
            return ""
        self._before, self._spelled = self._spelled, len(self._ids)
        return text[len(known) :]

    def _release(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        cut = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            self._held = ""
            return text[:cut], True
        hold = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False
