"""A compiled grammar, and where a sequence stands in it: `engine.constraint` over llguidance."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from setpoint.errors import OutputViolationError, RequestError
from setpoint.grammar.vocabulary import GrammarVocabulary


class CompiledGrammar:
    """Of one request. `matcher` stands at the beginning and stays there: every sequence gets a copy.

    `param` is the field that errors name. A grammar that `may_name_tokens` could ask for special ones: it gets none.
    """

    def __init__(self, matcher: Any, vocabulary: GrammarVocabulary, param: str, *, may_name_tokens: bool) -> None:
        self._matcher = matcher
        self.vocabulary = vocabulary
        self.param = param
        self.may_name_tokens = may_name_tokens

    def start(self, stop_ids: Collection[int]) -> TokenConstraint:
        vocabulary = self.vocabulary
        ends = [token for token in stop_ids if 0 <= token < vocabulary.size and not vocabulary.is_text(token)]
        return TokenConstraint(self, ends)

    def matcher(self) -> Any:
        return self._matcher.deep_copy()


class TokenConstraint:
    """Walks a matcher. It is asked for text only, so whether the end may come is said here."""

    def __init__(self, grammar: CompiledGrammar, ends: Collection[int]) -> None:
        self._grammar = grammar
        self._matcher = grammar.matcher()
        self._ends = frozenset(ends)
        self._tokens: list[int] = []  # taken so far
        self._has_ended = False
        self._mask: bytes | None = None  # of this state, once asked for

    @property
    def is_finished(self) -> bool:
        return self._has_ended or bool(self._matcher.is_stopped())

    def mask(self) -> bytes:
        if self._mask is None:
            self._mask = self._compute_mask()
        return self._mask

    def _compute_mask(self) -> bytes:
        matcher, size = self._matcher, self._grammar.vocabulary.mask_bytes
        words = matcher.compute_bitmask()
        if matcher.is_error():
            raise self._failure()
        mask = bytearray(words[:size])
        if self._grammar.may_name_tokens:
            text = int.from_bytes(mask, "little") & self._grammar.vocabulary.text_bits
            mask = bytearray(text.to_bytes(size, "little"))
        if matcher.is_accepting():
            for token in self._ends:
                mask[token >> 3] |= 1 << (token & 7)
        if mask == self._grammar.vocabulary.no_tokens:
            message = f"{self._grammar.param} leaves no token of this model that could follow"
            raise RequestError(message, param=self._grammar.param, reason="bad_constraint")
        return bytes(mask)

    def forced(self) -> int | None:
        tokens = self._matcher.compute_ff_tokens()
        if self._matcher.is_error():
            raise self._failure()
        return tokens[0] if tokens and self._grammar.vocabulary.is_text(tokens[0]) else None

    def count_allowed(self, tokens: Sequence[int]) -> int:
        if self.is_finished:
            return 0
        is_text = self._grammar.vocabulary.is_text
        num_text = next((count for count, token in enumerate(tokens) if not is_text(token)), len(tokens))
        return int(self._matcher.validate_tokens(list(tokens[:num_text])))

    def advance(self, token: int) -> None:
        matcher = self._matcher
        self._mask = None
        if self._has_ended:
            raise OutputViolationError("the output goes on after its end")
        if token in self._ends:
            if not matcher.is_accepting():
                raise OutputViolationError("the output ends before it has the structure asked for")
            self._has_ended = True
        elif not self._grammar.vocabulary.is_text(token) or not matcher.consume_token(token):
            raise self._refused(token)
        self._tokens.append(token)

    def _refused(self, token: int) -> RequestError | OutputViolationError:
        """Why a token was not taken: it is not allowed, or allowed and beyond a limit."""
        self._start_over()
        if self._grammar.vocabulary.is_text(token) and self._matcher.validate_tokens([token]):
            return self._failure()
        return OutputViolationError("the output does not have the structure asked for")

    def rollback(self, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        self._mask = None
        taken_back = self._tokens[-num_tokens:]
        del self._tokens[-num_tokens:]
        if self._has_ended:
            self._has_ended = False
            taken_back.pop()
        if self._matcher.is_error() or not self._matcher.rollback(len(taken_back)):
            self._start_over()

    def _start_over(self) -> None:
        """After an error that what was taken back has caused: errors of a matcher are for good."""
        self._matcher = self._grammar.matcher()
        if self._tokens and not self._matcher.consume_tokens(self._tokens):
            raise self._failure()

    def _failure(self) -> RequestError:
        param = self._grammar.param
        return RequestError(
            f"{param} takes more work for the next token than a request may cause; simplify it",
            param=param,
            reason="compile_limit",
        )
