"""Beam search over one request, as `transformers.generate` does it with early_stopping=False: the same answers.

With groups, diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424): later groups pay for what earlier ones chose.
With words that must appear, dynamic beam allocation (Post and Vilar 2018, arXiv:1804.06609): beams are shared among the answers
that have as much of the words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from deploy.engine.grammar import Grammar
from deploy.engine.request import Request
from deploy.engine.words import Progress, banned

NEVER = -1e9
Candidate = tuple[float, int, int]  # ln p of the answer so far, the beam that it goes on from, its new token


class GroupedSearch:
    """The search of a request: one group of beams, or several that differ."""

    def __init__(self, request: Request, end_ids: frozenset[int], grammar: Grammar | None = None) -> None:
        s = request.sampling
        self.end_ids = frozenset() if request.ignore_eos else end_ids
        self._size, self._penalty, self._wanted = s.num_beams // s.beam_groups, s.diversity_penalty, request.n
        self._groups = [BeamSearch(request, self._size, self.end_ids, grammar) for _ in range(s.beam_groups)]

    @property
    def done(self) -> bool:
        """Whether no group goes on."""
        return all(group.done for group in self._groups)

    def step(self, log_p: torch.Tensor) -> tuple[list[int], list[int]]:
        """Take ln p of the next tokens [beams, v]. Returns the beam that each new beam goes on from, and its token; a group that
        has ended goes on with nothing that counts."""
        parents, tokens, taken = [], [], Counter()
        for number, group in enumerate(self._groups):
            first = number * self._size
            chosen = ([], [])
            if not group.done:
                mine = log_p[first : first + self._size].clone()
                for token, count in taken.items():
                    mine[:, token] -= self._penalty * count
                chosen = group.step(mine)
                taken.update(chosen[1])
            parents += [first + parent for parent in chosen[0] or range(self._size)]
            tokens += chosen[1] or [0] * self._size
        return parents, tokens

    def answers(self) -> list[tuple[int, ...]]:
        """Generated ids of the best answers of all groups, as many as the request wants or there are; those that lack words only
        if no other was found."""
        found = [answer for group in self._groups for answer in group.finished]
        found = found or [answer for group in self._groups for answer in group.lacking]
        return [ids for _, ids in sorted(found, key=lambda answer: -answer[0])[: self._wanted]]


class BeamSearch:
    """Keeps `beams` unfinished answers and the best `beams` finished ones."""

    def __init__(self, request: Request, beams: int, end_ids: frozenset[int], grammar: Grammar | None) -> None:
        self.beams, self.length_penalty = beams, request.sampling.length_penalty
        self.max_tokens, self.end_ids = request.max_tokens, end_ids
        self.finished: list[tuple[float, tuple[int, ...]]] = []  # (score, generated ids), the best first
        self.lacking: list[tuple[float, tuple[int, ...]]] = []  # that lack words at the last token
        self.done = False
        self._prompt, self._bad_words = request.prompt, request.bad_words
        self._scores = [0.0] + [NEVER] * (beams - 1)  # the beams start alike: only the first one counts
        self._generated: list[tuple[int, ...]] = [()] * beams
        self._progress = [Progress(request.force_words)] * beams
        self._grammars = [grammar] * beams

    def step(self, log_p: torch.Tensor) -> tuple[list[int], list[int]]:
        """Take ln p of the next tokens [beams, v], which is changed. Returns the beam that each new beam goes on from, and its
        token; nothing if no answer can go on.

        Candidates enough that `beams` unfinished ones remain are ranked, within each bank. An answer that ends counts only if it
        is among the first `beams`. The search is `done` when no unfinished answer scores above the worst of `beams` others.
        """
        self._constrain(log_p)
        totals = log_p + torch.tensor(self._scores, device=log_p.device)[:, None]
        ranked, seen, length = [], Counter(), len(self._generated[0]) + 1
        for total, parent, token in self._candidates(totals):
            progress = self._progress[parent].after(token)
            ranked.append((seen[progress.met], -progress.met, total, parent, token, progress))
            seen[progress.met] += 1
        running = []
        for rank, _, total, parent, token, progress in sorted(ranked, key=lambda each: each[:2]):
            if token in self.end_ids or length == self.max_tokens:
                if rank < self.beams:
                    answers = self.lacking if progress.left else self.finished
                    answers.append((total / length**self.length_penalty, (*self._generated[parent], token)))
            else:
                running.append((total, parent, token, progress))
        self.finished = sorted(self.finished, key=lambda answer: -answer[0])[: self.beams]
        running = running[: self.beams]
        if not running:
            self.done = True
            return [], []
        running += [(NEVER, *running[0][1:])] * (self.beams - len(running))
        self._scores = [total for total, *_ in running]
        self._generated = [(*self._generated[parent], token) for _, parent, token, _ in running]
        self._progress = [progress for *_, progress in running]
        self._grammars = [
            grammar and grammar.after(token) for grammar, token in ((self._grammars[p], t) for _, p, t, _ in running)
        ]
        full = len(self.finished) == self.beams
        self.done = full and max(self._scores) / length**self.length_penalty <= self.finished[-1][0]
        return [parent for _, parent, _, _ in running], [token for _, _, token, _ in running]

    def _constrain(self, log_p: torch.Tensor) -> None:
        """Rule out what the grammar, words that must not come, or those that are still to come do not allow."""
        for beam, (grammar, progress) in enumerate(zip(self._grammars, self._progress, strict=True)):
            if grammar is not None:
                log_p[beam].masked_fill_(~torch.from_numpy(grammar.allowed()).to(log_p.device), float("-inf"))
            wrong = banned((*self._prompt, *self._generated[beam]), self._bad_words)
            wrong += self.end_ids if progress.left else ()
            if wrong:
                log_p[beam, wrong] = float("-inf")

    def _candidates(self, totals: torch.Tensor) -> Sequence[Candidate]:
        """The best continuations, the best first; with words, also those that go on with one, and each beam's best."""
        vocabulary = totals.shape[-1]
        flat = totals.flatten()
        places = torch.topk(flat, min(max(2, 1 + len(self.end_ids)) * self.beams, len(flat))).indices.tolist()
        least = float("-inf")
        if any(progress.left or progress.finished for progress in self._progress):
            least = NEVER / 2  # copies of a beam would fill the banks
            known, likeliest = set(places), totals.argmax(dim=-1).tolist()
            for beam, progress in enumerate(self._progress):
                for token in sorted(progress.wanted() | {likeliest[beam]}):
                    if (place := beam * vocabulary + token) not in known:
                        known.add(place)
                        places.append(place)
        found = [(float(total), *divmod(place, vocabulary)) for total, place in zip(flat[places].tolist(), places, strict=True)]
        return sorted((each for each in found if each[0] > least), key=lambda each: -each[0])
