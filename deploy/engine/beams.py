"""Beam search over one request, as `transformers.generate` does it with early_stopping=False: the same answers."""

from __future__ import annotations

import torch

from deploy.engine.request import Request

NEVER = -1e9


class BeamSearch:
    """Keeps `num_beams` unfinished beams and the best `num_beams` finished answers."""

    def __init__(self, request: Request, end_ids: frozenset[int]) -> None:
        s = request.sampling
        self.beams, self.length_penalty = s.num_beams, s.length_penalty
        self.max_tokens, self.wanted = request.max_tokens, request.n
        self.end_ids = frozenset() if request.ignore_eos else end_ids
        self.finished: list[tuple[float, tuple[int, ...]]] = []  # (score, generated ids), the best first
        self.done = False
        self._scores = [0.0] + [NEVER] * (self.beams - 1)  # the beams start alike: only the first one counts
        self._generated: list[tuple[int, ...]] = [()] * self.beams

    def step(self, log_p: torch.Tensor) -> tuple[list[int], list[int]]:
        """Take ln p of the next tokens [beams, v]. Returns the beam that each new beam goes on from, and its token.

        Candidates enough that `num_beams` unfinished ones remain are ranked. An answer that ends counts only if it is among the
        first `num_beams`. The search is `done` when no unfinished beam scores above the worst of `num_beams` answers.
        """
        vocabulary = log_p.shape[-1]
        totals = (log_p + torch.tensor(self._scores, device=log_p.device)[:, None]).flatten()
        best = torch.topk(totals, max(2, 1 + len(self.end_ids)) * self.beams)
        running: list[tuple[float, int, int]] = []
        length = len(self._generated[0]) + 1
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(place, vocabulary)
            if token in self.end_ids or length == self.max_tokens:
                if rank < self.beams:
                    self.finished.append((total / length**self.length_penalty, (*self._generated[parent], token)))
            else:
                running.append((total, parent, token))
        self.finished = sorted(self.finished, key=lambda answer: -answer[0])[: self.beams]
        running = running[: self.beams]
        if not running:
            self.done = True
            return [], []
        self._scores = [total for total, _, _ in running]
        self._generated = [(*self._generated[parent], token) for _, parent, token in running]
        full = len(self.finished) == self.beams
        self.done = full and self._scores[0] / length**self.length_penalty <= self.finished[-1][0]
        return [parent for _, parent, _ in running], [token for _, _, token in running]

    def answers(self) -> list[tuple[int, ...]]:
        """Generated ids of the best answers, as many as the request wants."""
        return [ids for _, ids in self.finished[: self.wanted]]
