"""What is asked of the engine and what it answers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.engine.media import Medium

MAX_LOGPROBS = 20


class Busy(Exception):
    """The queue is full. `retry_after`: seconds until a place is likely."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


class Refused(ValueError):
    """A request that this model or engine cannot serve: one line that says why. `code` is a word for programs."""

    def __init__(self, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults sample from the model's whole distribution.

    `presence_penalty` is subtracted from the logits of tokens generated before, `frequency_penalty` as often as they were;
    `repetition_penalty` divides (positive) or multiplies (negative) the logits of all tokens before (CTRL, arXiv:1909.05858).
    `min_p` drops what is less likely than that share of the likeliest token (arXiv:2407.01082).
    """

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    num_beams: int = 1  # above 1: beam search, without temperature
    beam_groups: int = 1  # above 1: diverse beam search; num_beams is a multiple of it
    diversity_penalty: float = 0.0  # subtracted from ln p of a token for each beam of an earlier group that took it
    length_penalty: float = 1.0  # a beam's score is its log probability / length ** length_penalty

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0 or self.num_beams > 1


@dataclass(frozen=True)
class Request:
    """One prompt and what is wanted of it."""

    prompt: tuple[int, ...]  # token ids
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1  # answers
    stop: tuple[str, ...] = ()  # texts that end an answer and are no part of it
    logprobs: int | None = None  # None: none; else ln p of each token and of so many likeliest ones
    schema: str | None = None  # a JSON schema that the answer follows
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that must not follow each other in an answer
    force_words: tuple[tuple[tuple[int, ...], ...], ...] = ()  # words that must appear, each in one of its spellings as ids
    adapter: str | None = None  # the name of a LoRA adapter; None: the model itself
    ignore_eos: bool = False
    timeout: float | None = None  # seconds from submission to the last token
    media: tuple[Medium, ...] = ()  # images or sounds whose placeholders stand in the prompt


@dataclass(frozen=True)
class Logprob:
    """A token with its ln p under the model's own distribution (before temperature and penalties), and the likeliest ones."""

    id: int
    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What a step added to answer number `index`: `ids`, and the `text` that is certain by now.

    `finish` ends the answer: stop (an end token, a stop text, a finished schema), length, timeout, cancelled or error.
    """

    index: int
    text: str = ""
    ids: tuple[int, ...] = ()  # an end token is among them
    logprobs: tuple[Logprob, ...] = ()
    finish: str | None = None
    message: str = ""


@dataclass(frozen=True)
class Stats:
    """The engine at one moment."""

    waiting: int  # requests in the queue
    running: int  # rows taken
    rows: int
    cached_tokens: int  # keys and values held for running sequences
    steps: int  # decoding steps so far
    prompt_tokens: int  # so far
    generated_tokens: int  # so far
    draft_tokens: int = 0  # guessed so far
    accepted_tokens: int = 0  # of those, answered
