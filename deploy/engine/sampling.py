"""The choice of the next token of each sequence, with transformers' logits processors."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deploy.engine.grammar import Grammar
from deploy.engine.request import Logprob, Request, Sampling
from deploy.engine.text import TextStream
from deploy.engine.words import Word, banned

Guess = tuple[int, torch.Tensor]  # a token, and the distribution q [v] that it was drawn from


@dataclass(eq=False)
class State:
    """What one answer's choices depend on."""

    sampling: Sampling
    text: TextStream
    prompt_length: int
    generator: torch.Generator | None
    grammar: Grammar | None
    logprobs: int | None
    bad_words: Rows[Word] = ()
    generated: int = 0


def new_state(request: Request, index: int, tokenizer, grammar: Grammar | None, device: str) -> State:
    """The state of answer `index` of a request; its seed is the request's plus the index."""
    generator = None
    if request.sampling.seed is not None:
        generator = torch.Generator(device).manual_seed((request.sampling.seed + index) % 2**63)
    text = TextStream(tokenizer, request.prompt, request.stop)
    return State(request.sampling, text, len(request.prompt), generator, grammar, request.logprobs, request.bad_words)


def choose(
    logits: torch.Tensor,
    states: Rows[State],
    ids: Rows[list[int]],
    guesses: Rows[Guess | None],
) -> list[int]:
    """The next token of each sequence from its logits [b, v] in fp32, which are changed; `ids`: its tokens so far.

    `guesses`: what was drawn for them before (see `accept`). Each draws from its own generator.
    """
    for row, (state, tokens) in enumerate(zip(states, ids, strict=True)):
        _penalise(logits[row], state, tokens)
        if state.grammar is not None:
            allowed = torch.from_numpy(state.grammar.allowed()).to(logits.device)
            logits[row].masked_fill_(~allowed, float("-inf"))
    chosen = logits.argmax(dim=-1).tolist()
    for row, p in probabilities(logits, states).items():
        guess, generator = guesses[row], states[row].generator
        chosen[row] = draw(p, generator) if guess is None else accept(p, *guess, generator)
    return chosen


def probabilities(logits: torch.Tensor, states: Rows[State]) -> dict[int, torch.Tensor]:
    """p [v] under temperature, top-k, top-p and min-p, by row of `logits` [b, v]; greedy rows have none. Rows with the same
    settings are filtered together."""
    alike: dict[tuple, list[int]] = {}
    for row, state in enumerate(states):
        if not state.sampling.greedy:
            s = state.sampling
            alike.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(row)
    found = {}
    for settings, rows in alike.items():
        found.update(zip(rows, torch.softmax(_filters(*settings)(None, logits[rows]), dim=-1), strict=True))
    return found


def draw(p: torch.Tensor, generator: torch.Generator | None) -> int:
    """A token of p [v], which need not sum to one."""
    return int(torch.multinomial(p, 1, generator=generator))


def accept(p: torch.Tensor, guess: int, q: torch.Tensor, generator: torch.Generator | None) -> int:
    """A token of p [v], given a `guess` that was drawn from q [v]: the guess with probability min(1, p/q), else one of what p
    has above q (speculative sampling, Leviathan et al. 2023, arXiv:2211.17192, algorithm 1)."""
    if float(torch.rand((), generator=generator, device=p.device) * q[guess]) < float(p[guess]):
        return guess
    left = (p - q).clamp(min=0)
    return draw(left if left.any() else p, generator)  # nothing is left where p is q but for rounding


def logprob(logits: torch.Tensor, token: int, top: int, tokenizer) -> Logprob:
    """ln p of `token` and of the `top` likeliest tokens under logits [v] as the model gave them."""
    log_p = torch.log_softmax(logits, dim=-1)
    best = torch.topk(log_p, top) if top else None
    likeliest = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Logprob(
        token, tokenizer.decode([token]), float(log_p[token]), tuple((tokenizer.decode([id]), value) for id, value in likeliest)
    )


def _penalise(logits: torch.Tensor, state: State, ids: list[int]) -> None:
    s = state.sampling
    if s.repetition_penalty != 1:
        before = torch.tensor([ids], device=logits.device)
        logits[:] = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(before, logits[None])[0]
    if (s.presence_penalty or s.frequency_penalty) and len(ids) > state.prompt_length:
        generated = torch.tensor(ids[state.prompt_length :], device=logits.device)
        tokens, counts = generated.unique(return_counts=True)
        logits[tokens] -= s.presence_penalty + s.frequency_penalty * counts
    if wrong := banned(ids, state.bad_words):
        logits[wrong] = float("-inf")


def _filters(temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    filters = LogitsProcessorList()
    if temperature != 1:
        filters.append(TemperatureLogitsWarper(temperature))
    if top_k:
        filters.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    if min_p:
        filters.append(MinPLogitsWarper(min_p))
    return filters
