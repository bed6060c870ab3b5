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


@dataclass(eq=False)
class State:
    """What one answer's choices depend on."""

    sampling: Sampling
    text: TextStream
    prompt_length: int
    generator: torch.Generator | None
    grammar: Grammar | None
    logprobs: int | None
    generated: int = 0


def new_state(request: Request, index: int, tokenizer, grammar: Grammar | None, device: str) -> State:
    """The state of answer `index` of a request; its seed is the request's plus the index."""
    generator = None
    if request.sampling.seed is not None:
        generator = torch.Generator(device).manual_seed((request.sampling.seed + index) % 2**63)
    text = TextStream(tokenizer, request.prompt, request.stop)
    return State(request.sampling, text, len(request.prompt), generator, grammar, request.logprobs)


def choose(logits: torch.Tensor, states: Rows[State], ids: Rows[list[int]]) -> list[int]:
    """The next token of each sequence from its logits [b, v] in fp32, which are changed; `ids`: its tokens so far.

    Sequences with the same temperature, top-k, top-p and min-p are filtered together; each draws from its own generator.
    """
    for row, (state, tokens) in enumerate(zip(states, ids, strict=True)):
        _penalise(logits[row], state, tokens)
        if state.grammar is not None:
            allowed = torch.from_numpy(state.grammar.allowed()).to(logits.device)
            logits[row].masked_fill_(~allowed, float("-inf"))
    chosen = logits.argmax(dim=-1).tolist()
    alike: dict[tuple, list[int]] = {}
    for row, state in enumerate(states):
        if not state.sampling.greedy:
            s = state.sampling
            alike.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(row)
    for settings, rows in alike.items():
        p = torch.softmax(_filters(*settings)(None, logits[rows]), dim=-1)
        for row, each in zip(rows, p, strict=True):
            chosen[row] = int(torch.multinomial(each, 1, generator=states[row].generator))
    return chosen


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
