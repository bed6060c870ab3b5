"""Continuous batching: one thread that steps the model, and a queue before it.

A step reads some tokens of waiting prompts, then gives every running sequence its next token. Sequences join when their prompt is
read and leave when they end, between two steps. Greedy answers do not depend on who else runs, but for rounding.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from deploy.engine import speculation
from deploy.engine.beams import GroupedSearch
from deploy.engine.grammar import Grammars
from deploy.engine.images import MOST_PIXELS
from deploy.engine.media import MOST
from deploy.engine.network import Network
from deploy.engine.prompts import Prompts, load_tokenizer
from deploy.engine.request import Busy, Output, Refused, Request, Stats
from deploy.engine.sampling import Guess, choose, logprob, new_state
from deploy.engine.scheduler import Copy, Group, Scheduler, Sequence
from deploy.engine.senses import of_model
from deploy.engine.speculation import Draft

log = logging.getLogger("llm_builder.engine")
Deliver = Callable[[Output], None]
FIRST_ESTIMATE = 1.0  # seconds a request takes, before one has ended


class Engine:
    """Serves requests until `close`. `submit`, `cancel` and `stats` may be called by any thread."""

    def __init__(
        self,
        folder: Path,
        *,
        rows: int = 16,
        prefill_tokens: int = 512,
        max_waiting: int = 64,
        context: int | None = None,
        dtype: str | None = None,
        adapters: dict[str, Path] | None = None,
        draft: str | Path | None = None,
        draft_tokens: int = 4,
        images: int = MOST,
        image_pixels: int = MOST_PIXELS,
    ) -> None:
        """Load the model of a Hugging Face folder. Raises UserError (see Network).

        `rows` sequences run at once, and `max_waiting` requests wait. A step reads at most `prefill_tokens` of prompts. With a
        `draft` (see speculation.load) at most `draft_tokens` are guessed for each sequence and step, fewer where guesses fail. A
        model that sees takes at most so many `images` in a request, of `image_pixels` each, one that hears so many sounds.
        """
        tokenizer = load_tokenizer(folder)
        sizes = dict(rows=rows, prefill_tokens=max(prefill_tokens, draft_tokens + 1), dtype=dtype)
        self.network = Network(folder, context=context, adapters=adapters, **sizes)
        self._drafter = speculation.load(draft, tokenizer, self.network.vocabulary, context=self.network.context, **sizes)
        self._draft_tokens = draft_tokens
        self._caches = (self.network.cache, *self._drafter.caches)
        self.adapters = tuple(adapters or ())
        self.context, self.rows, self.max_waiting = self.network.context, rows, max_waiting
        self.prompts = Prompts(copy.deepcopy(tokenizer), self.network.vocabulary, of_model(folder, images, image_pixels))
        self._tokenizer = tokenizer
        self._end_ids = self.network.end_ids(tokenizer)
        self._grammars = Grammars(copy.deepcopy(tokenizer), self.network.vocabulary, self._end_ids)
        self._grammar_lock = threading.Lock()
        self._scheduler = Scheduler(rows, prefill_tokens)
        self._cancelled: set[int] = set()
        self._numbers = itertools.count()
        self._wake = threading.Condition()  # over a lock that its holder may take again
        self._closing = False
        self._steps = self._prompt_tokens = self._generated_tokens = self._guessed = self._accepted = 0
        self._seconds = FIRST_ESTIMATE  # that a request takes once it has rows, a moving mean
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raises Refused for a request that could never be served here."""
        length, s = len(request.prompt), request.sampling
        if length >= self.context:
            raise Refused(f"the prompt has {length:,} tokens, the context {self.context:,}", "context_length_exceeded")
        if length + request.max_tokens > self.context:
            raise Refused(
                f"{length:,} tokens of prompt and {request.max_tokens:,} new ones are more than the context of {self.context:,}",
                "context_length_exceeded",
            )
        if max(request.n, s.num_beams) > self.rows:
            raise Refused(f"n={request.n} and num_beams={s.num_beams} can be at most {self.rows} here")
        if request.adapter is not None and request.adapter not in self.adapters:
            raise Refused(f"there is no adapter {request.adapter}", "model_not_found")
        if request.schema and (request.bad_words or request.force_words):
            raise Refused("words and a schema do not go together", "unsupported_value")
        if s.num_beams > 1:
            self._check_beams(request)
        elif request.force_words or s.beam_groups > 1 or s.diversity_penalty:
            raise Refused("words that must appear, and groups of beams, need num_beams above 1", "unsupported_value")

    @staticmethod
    def _check_beams(request: Request) -> None:
        s = request.sampling
        if request.n > s.num_beams:
            raise Refused(f"n={request.n} is more than num_beams={s.num_beams}")
        penalised = s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
        if request.stop or request.logprobs is not None or penalised:
            raise Refused("beam search goes without stop, logprobs and penalties", "unsupported_value")
        if s.num_beams % s.beam_groups or (s.beam_groups > 1) != (s.diversity_penalty > 0):
            raise Refused("num_beam_groups must divide num_beams, and goes with a diversity_penalty above 0")
        if s.beam_groups > 1 and request.force_words:
            raise Refused("words that must appear do not go with groups of beams", "unsupported_value")
        if request.schema and request.ignore_eos:
            raise Refused("beam search ends an answer that follows a schema by an end token: not with ignore_eos")
        if sum(min(map(len, word)) for word in request.force_words) > request.max_tokens:
            raise Refused(f"the words that must appear are more than max_tokens={request.max_tokens}")

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a request; `deliver` is called with each output, by the engine's thread, and must not block.

        Returns a number for `cancel`. Raises Refused, or Busy if `max_waiting` requests wait or the engine is closing.
        """
        self.check(request)
        grammars = []
        if request.schema is not None:
            with self._grammar_lock:  # building them takes a while: not under the engine's lock
                grammars = [self._grammars.start(request.schema) for _ in range(request.n)]
        group = Group(request, next(self._numbers), deliver=deliver, grammars=grammars)
        if request.timeout is not None:
            group.deadline = time.monotonic() + request.timeout
        with self._wake:
            if self._closing:
                raise Busy(1)
            if len(self._scheduler.waiting) >= self.max_waiting:
                raise Busy(self._wait())
            self._scheduler.waiting.append(group)
            self._wake.notify()
        return group.id

    def cancel(self, number: int) -> None:
        """End a request, if it has not ended: its outputs stop, its rows are free at the next step."""
        with self._wake:
            self._cancelled.add(number)
            self._wake.notify()

    def stats(self) -> Stats:
        """How full the engine is and what it has done."""
        with self._wake:
            rows = [s for s in self._scheduler.rows if s is not None]
            return Stats(
                waiting=len(self._scheduler.waiting),
                running=len(rows),
                rows=self.rows,
                cached_tokens=sum(s.cached for s in rows),
                steps=self._steps,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                draft_tokens=self._guessed,
                accepted_tokens=self._accepted,
            )

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():  # ending a request moves rows of the cache, too
                while self._turn():
                    pass
        except Exception:
            log.exception("the engine has ended")
            self._give_up()

    def _turn(self) -> bool:
        """One step, once there is something to do; False when the engine has closed."""
        with self._wake:
            while not (self._closing or self._scheduler.waiting or any(self._scheduler.rows)):
                self._cancelled.clear()  # of requests that have ended
                self._wake.wait()
            closing = self._closing
            self._sweep()
            if closing:
                return False
            for group in self._scheduler.admit():
                self._admitted(group)
        self._step()
        return True

    def _give_up(self) -> None:
        """Tell every request that it will not be answered, and take no more."""
        with self._wake:
            self._closing = True
            left = [*self._scheduler.waiting, *self._scheduler.groups()]
            self._scheduler.waiting.clear()
        for group in left:
            for index in range(group.request.n):
                self._deliver(group, Output(index, finish="error", message="the engine has failed"))

    def _sweep(self) -> None:
        """End what was cancelled, is late, or is here when the engine closes."""
        now = time.monotonic()
        for group in [*self._scheduler.waiting, *self._scheduler.groups()]:
            if self._closing or group.id in self._cancelled:
                self._end(group, "cancelled")
            elif group.deadline is not None and now > group.deadline:
                self._end(group, "timeout", f"not finished within {group.request.timeout:g} s")
        self._cancelled.clear()

    def _admitted(self, group: Group) -> None:
        request = group.request
        group.started = time.monotonic()
        if request.sampling.num_beams > 1:
            group.search = GroupedSearch(request, self._end_ids, group.grammars[0] if group.grammars else None)
        for sequence in group.members:
            grammar = group.grammars[sequence.index] if group.grammars and not group.search else None
            sequence.ahead = self._draft_tokens
            sequence.state = new_state(request, sequence.index, self._tokenizer, grammar, self.network.device)

    def _step(self) -> None:
        if chunks := self._scheduler.chunks():
            self._read([chunk.sequence for chunk in chunks], [chunk.count for chunk in chunks])
        if running := list(self._scheduler.running()):
            self._decode(running)
            self._steps += 1

    def _read(self, sequences: list[Sequence], counts: list[int]) -> None:
        """Read more of some prompts; those that are read whole get their first tokens."""
        tokens = [s.ids[s.cached : s.cached + count] for s, count in zip(sequences, counts, strict=True)]

        def work() -> torch.Tensor:
            self._drafter.read(sequences, tokens)
            return self._forward(sequences, tokens)

        if (logits := self._tried(sequences, work)) is None:
            return
        for sequence, new in zip(sequences, tokens, strict=True):
            sequence.cached += len(new)  # all of them before any row is moved
            self._prompt_tokens += len(new)
        self._drop_spoilt(sequences, logits)
        for row, sequence in enumerate(sequences):
            if sequence.row >= 0 and sequence.cached == len(sequence.ids):
                members, sequence.group.seen = sequence.group.members, None
                self._copy(self._scheduler.start(sequence.group))
                self._advance(members, logits[row].repeat(len(members), 1))

    def _decode(self, running: list[Sequence]) -> None:
        """Give running sequences a token, and further ones as far as their drafts hold."""

        def work() -> tuple[list[Draft], list[list[int]], torch.Tensor]:
            counts = [0 if s.group.search else min(s.ahead, s.group.request.max_tokens - s.state.generated - 1) for s in running]
            drafts = self._drafter.propose(running, counts)
            tokens = [[s.ids[-1], *draft.tokens] for s, draft in zip(running, drafts, strict=True)]
            return drafts, tokens, self._forward(running, tokens, every=True)

        if (worked := self._tried(running, work)) is None:
            return
        drafts, tokens, logits = worked
        held = [0] * len(running)  # guesses, by row
        for sequence, new in zip(running, tokens, strict=True):
            sequence.cached += len(new)  # rows that move before the end take all of them along
        self._drop_spoilt(running, logits.flatten(1))
        going = [row for row, sequence in enumerate(running) if sequence.row >= 0]
        for place in range(logits.shape[1]):
            if not going:
                break
            here = logits[:, place] if len(going) == len(running) else logits[going, place]
            self._advance([running[row] for row in going], here, [drafts[row].guess(place) for row in going])
            going = [row for row in going if running[row].ids[-1:] == tokens[row][place + 1 : place + 2]]
            for row in going:
                held[row] += 1
            going = [row for row in going if running[row].row >= 0]
        self._accepted += sum(held)
        for sequence, draft, right in zip(running, drafts, held, strict=True):
            self._guessed += len(draft.tokens)
            sequence.ahead = speculation.ahead(sequence.ahead, len(draft.tokens), right, self._draft_tokens)
            sequence.cached = len(sequence.ids) - 1  # what was guessed wrong is written over
            sequence.drafted = min(sequence.drafted, sequence.cached)

    def _drop_spoilt(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """End requests whose logits [b, v] hold a NaN, and clear their rows before any row is moved."""
        wrong = logits.isnan().any(dim=-1).tolist()
        groups = {id(s.group): s.group for s, is_wrong in zip(sequences, wrong, strict=True) if is_wrong}.values()
        for group in groups:
            for member in group.members:
                for cache in self._caches if member.row >= 0 else ():
                    cache.clear(member.row)
        for group in groups:
            self._end(group, "error", "the model computed no number")

    def _forward(self, sequences: list[Sequence], tokens: list[list[int]], every: bool = False) -> torch.Tensor:
        """Logits after `tokens` (see Network.forward)."""
        adapters = [s.group.request.adapter for s in sequences]
        seen = [self._seen(s, new) for s, new in zip(sequences, tokens, strict=True)]
        return self.network.forward([s.row for s in sequences], tokens, [s.cached for s in sequences], adapters, every, seen)

    def _seen(self, sequence: Sequence, tokens: list[int]) -> tuple[list[int], torch.Tensor] | None:
        """Where placeholders of media stand among a prompt's next tokens, and their embeddings; None where there are none."""
        group = sequence.group
        if not group.request.media or sequence.cached >= len(group.request.prompt):
            return None
        media = self.prompts.media
        sense = media.sense
        if group.seen is None:
            group.seen = media.embeddings(self.network.base, group.request.media)
        places = [place for place, token in enumerate(tokens) if token == sense.token_id]
        before = sequence.ids[: sequence.cached].count(sense.token_id)
        return places, group.seen[before : before + len(places)]

    def _tried(self, sequences: list[Sequence], work: Callable[[], Any]) -> Any:
        """What `work` returns; None after a failure, which ends these sequences' requests and leaves the others."""
        try:
            return work()
        except Exception as error:
            log.exception("a step failed")
            for group in {id(s.group): s.group for s in sequences}.values():
                self._end(group, "error", f"the model failed: {type(error).__name__}")
            return None

    def _advance(self, sequences: list[Sequence], logits: torch.Tensor, guesses: list[Guess | None] | None = None) -> None:
        """Give sequences that decode their next token, from logits [b, v] and what was guessed (see sampling.choose)."""
        self._tried(sequences, lambda: self._choose(sequences, logits, guesses or [None] * len(sequences)))

    def _choose(self, sequences: list[Sequence], logits: torch.Tensor, guesses: list[Guess | None]) -> None:
        plain = [row for row, s in enumerate(sequences) if s.group.search is None]
        if plain:
            chosen = [sequences[row] for row in plain]
            wanted = [row for row in plain if sequences[row].state.logprobs is not None]
            originals = {id(sequences[row]): logits[row].clone() for row in wanted}
            theirs = logits if len(plain) == len(sequences) else logits[plain]
            tokens = choose(theirs, [s.state for s in chosen], [s.ids for s in chosen], [guesses[row] for row in plain])
            for sequence, token in zip(chosen, tokens, strict=True):
                self._grow(sequence, token, originals.get(id(sequence)))
        beams: dict[int, list[int]] = {}
        for row, sequence in enumerate(sequences):
            if sequence.group.search is not None:
                beams.setdefault(id(sequence.group), []).append(row)
        for rows in beams.values():
            rows.sort(key=lambda row: sequences[row].index)
            self._search([sequences[row] for row in rows], logits[rows])

    def _grow(self, sequence: Sequence, token: int, logits: torch.Tensor | None) -> None:
        state, request = sequence.state, sequence.group.request
        sequence.ids.append(token)
        state.generated += 1
        self._generated_tokens += 1
        finish, text, logprobs = None, "", ()
        if token in self._end_ids and not request.ignore_eos:
            finish = "stop"
        else:
            complete = state.grammar.advance(token) if state.grammar is not None else False
            text, stopped = state.text.push(token)
            if logits is not None:
                logprobs = (logprob(logits, token, state.logprobs, self._tokenizer),)
            if stopped or complete:
                finish = "stop"
            elif state.generated == request.max_tokens:
                finish = "length"
        if finish is not None:
            text += state.text.flush()
            self._copy(self._leave(sequence))
        self._deliver(sequence.group, Output(sequence.index, text, (token,), logprobs, finish))

    def _search(self, beams: list[Sequence], logits: torch.Tensor) -> None:
        """One step of a request's beam search."""
        group, search = beams[0].group, beams[0].group.search
        parents, tokens = search.step(torch.log_softmax(logits, dim=-1))
        self._generated_tokens += len(tokens)
        if not search.done:
            ids = [list(beam.ids) for beam in beams]
            self._copy([([beams[parent].row for parent in parents], [beam.row for beam in beams], beams[0].cached)])
            for beam, parent, token in zip(beams, parents, tokens, strict=True):
                beam.ids = [*ids[parent], token]
            return
        answers = search.answers()
        if not answers:
            raise RuntimeError("no token is allowed in any beam")
        for beam in beams:
            self._copy(self._leave(beam))
        for index in range(group.request.n):
            answer = answers[min(index, len(answers) - 1)]  # a schema may have fewer answers than are wanted
            ended = answer[-1] in search.end_ids
            text = group.members[index].state.text
            spelled = "".join([text.push(token)[0] for token in (answer[:-1] if ended else answer)]) + text.flush()
            self._deliver(group, Output(index, spelled, answer, finish="stop" if ended else "length"))

    def _leave(self, sequence: Sequence) -> list[Copy]:
        group = sequence.group
        with self._wake:
            copies = self._scheduler.leave(sequence)
            if all(member.row < 0 for member in group.members):
                self._seconds += 0.1 * (time.monotonic() - group.started - self._seconds)
        return copies

    def _end(self, group: Group, finish: str, message: str = "") -> None:
        """End a request for another reason than its answers: waiting, reading or running."""
        with self._wake:
            if group in self._scheduler.waiting:
                self._scheduler.waiting.remove(group)
                open_ = range(group.request.n)
            else:
                left = [member for member in group.members if member.row >= 0]
                open_ = [member.index for member in left if member.index < group.request.n]
                for member in left:
                    self._copy(self._scheduler.leave(member))
        for index in open_:
            self._deliver(group, Output(index, finish=finish, message=message))

    def _deliver(self, group: Group, output: Output) -> None:
        try:
            group.deliver(output)
        except Exception:  # the listener is gone
            log.exception("an output was not taken")
            self.cancel(group.id)

    def _copy(self, copies: Iterable[Copy]) -> None:
        for sources, targets, length in copies:
            for cache in self._caches if sources != targets and length else ():
                cache.copy(sources, targets, length)

    def _wait(self) -> int:
        """Seconds until a place in the queue is free, as requests ended so far; at least 1."""
        return max(1, math.ceil(self._seconds * max(1, len(self._scheduler.waiting)) / self.rows))
