"""Answers that follow a JSON schema: before each token, those that cannot lead to a valid text are ruled out (llguidance)."""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np

from deploy.engine.request import Refused


class Grammar:
    """The state of one answer."""

    def __init__(self, matcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> np.ndarray:
        """Whether each token of the vocabulary may come next: bool [vocabulary]. End tokens may, where the text is valid."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        mask = np.zeros(self._vocabulary, dtype=bool)
        mask[: min(len(bits), self._vocabulary)] = bits[: self._vocabulary]
        return mask

    def advance(self, token: int) -> bool:
        """`token` was chosen. Returns whether the text is complete and nothing can follow."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar does not take token {token}: {self._matcher.get_error()}")
        return self._matcher.is_stopped()

    def after(self, token: int) -> Grammar:
        """The state after `token`; this one stays as it is."""
        copy = Grammar(self._matcher.deep_copy(), self._vocabulary)
        copy.advance(token)
        return copy


class Grammars:
    """Makes grammars for one tokenizer."""

    def __init__(self, tokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        """`vocabulary`: the number of logits, which may be more than the tokenizer's tokens."""
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, vocabulary, sorted(end_ids)
        self._llguidance = None

    def start(self, schema: str) -> Grammar:
        """The grammar of a JSON schema. Raises Refused for what is no schema or has parts that cannot be followed."""
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.loads(schema))
            if error := LLMatcher.validate_grammar(grammar, self._tokens()):
                raise ValueError(error)
            matcher = LLMatcher(self._tokens(), grammar)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
        except (ValueError, TypeError) as error:
            raise Refused(f"the JSON schema cannot be followed: {' '.join(str(error).split())[:300]}") from None
        return Grammar(matcher, self._vocabulary)

    def _tokens(self):
        if self._llguidance is None:
            from llguidance.hf import from_tokenizer

            try:
                self._llguidance = from_tokenizer(
                    self._tokenizer, n_vocab=max(self._vocabulary, len(self._tokenizer)), eos_token=self._end_ids or None
                )
            except ValueError as error:
                raise Refused(f"JSON schemas need a fast tokenizer: {error}") from None
        return self._llguidance
