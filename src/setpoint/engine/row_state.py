"""What one sequence must remember between tokens to say how the next one is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial

from setpoint.engine.constraint import Constraint, Grammar, admissible
from setpoint.engine.late_masks import LateMasks
from setpoint.engine.plan import RowSampling
from setpoint.engine.sampling import SamplingParams
from setpoint.errors import RequestError


def sequence_seed(seed: int, index: int) -> int:
    """Unsigned 64-bit seed of sequence `index` of a request with a (signed 64-bit) seed.

    Hashed for every index, 0 included, so that neighbouring seeds and indices give unrelated streams.
    """
    message = b"setpoint sequence seed" + seed.to_bytes(8, "little", signed=True) + index.to_bytes(4, "little")
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little")


class RowState:
    """Penalty counts, kept up to date token by token, and what may not come next: by grammar, bans, or both."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        prompt: Sequence[int],
        stop_ids: Iterable[int],
        grammar: Grammar | None = None,
    ) -> None:
        self._params = params
        self._seed = seed
        stop_ids = tuple(sorted(stop_ids))
        self.constraint: Constraint | None = None if grammar is None else grammar.start(stop_ids)
        self._stop_ids = stop_ids if params.min_tokens > 0 else ()
        self._bad_words = tuple(map(tuple, params.bad_words_token_ids))
        self._longest_bad_word = max(map(len, self._bad_words), default=0)
        bias = params.logit_bias or {}
        self._bias_ids = tuple(bias)
        self._bias_values = tuple(bias.values())
        allowed = params.allowed_token_ids
        self._allowed_ids = None if allowed is None else tuple(allowed)
        self._allowed_bits = -1 if allowed is None or grammar is None else _bits(allowed)
        self._penalises = (
            params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        )
        self._slots: dict[int, int] = {}  # token id -> index into the two lists below
        self._ids: list[int] = []
        self._counts: list[int] = []
        if params.repetition_penalty != 1.0:
            for token in prompt:
                self._count(token, 0)

    def append(self, token: int) -> None:
        """The sequence generated `token`."""
        if self.constraint is not None:
            self.constraint.advance(token)
        if self._penalises:
            self._count(token, 1)

    def _count(self, token: int, amount: int) -> None:
        slot = self._slots.setdefault(token, len(self._ids))
        if slot == len(self._ids):
            self._ids.append(token)
            self._counts.append(amount)
        else:
            self._counts[slot] += amount

    def rows(self, token_ids: Sequence[int], num_prompt: int, drafts: Sequence[int]) -> list[RowSampling]:
        """How to draw the token after `token_ids`, and the one after each draft, as if those before it were accepted.

        Ends before the first draft that cannot come, or that nothing could follow.
        """
        rows = [self.row(token_ids, num_prompt)]
        constraint, num_taken = self.constraint, 0
        if constraint is not None and drafts:
            drafts = drafts[: admissible(constraint, drafts)]
        try:
            for count in range(1, len(drafts) + 1):
                if constraint is not None:
                    constraint.advance(drafts[count - 1])
                    num_taken += 1
                rows.append(self.row(token_ids, num_prompt, drafts[:count]))
        except RequestError:  # it concerns a text that may never be: the draft is not tried
            pass
        finally:
            if constraint is not None and num_taken:
                constraint.rollback(num_taken)
        return rows

    def late_rows(
        self, token_ids: Sequence[int], num_prompt: int, drafts: Sequence[int]
    ) -> tuple[list[RowSampling], LateMasks]:
        """As `rows` of a sequence with a constraint, with masks that are yet to be computed."""
        constraint = self.constraint
        assert constraint is not None
        if drafts:
            drafts = drafts[: admissible(constraint, drafts)]
        rows = [self.row(token_ids, num_prompt, is_late=True)]
        try:
            for count in range(1, len(drafts) + 1):
                rows.append(self.row(token_ids, num_prompt, drafts[:count], is_late=True))
        except RequestError:  # it concerns a text that may never be: the draft is not tried
            pass
        return rows, LateMasks(constraint, partial(self._mask, constraint), rows, drafts)

    def row(
        self, token_ids: Sequence[int], num_prompt: int, guesses: Sequence[int] = (), *, is_late: bool = False
    ) -> RowSampling:
        """How to draw the token after `token_ids` and then `guesses` (drafts taken as if they were accepted).

        A constraint must have taken all of them, but for a mask that comes late.
        """
        params = self._params
        num_output = len(token_ids) - num_prompt + len(guesses)
        bans = self._bad_words or num_output < params.min_tokens
        banned = self._banned(token_ids, num_prompt, guesses, num_output) if bans else ()
        mask = None if self.constraint is None or is_late else self._mask(self.constraint, banned)
        # Live lists, but with guesses: a plan is executed before the next append.
        ids, counts = self._penalties(guesses) if guesses else (self._ids, self._counts)
        return RowSampling(  # without the fields' names, which take twice as long as all the rest of it
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            self._seed,
            num_prompt + num_output,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            ids,
            counts,
            self._bias_ids,
            self._bias_values,
            banned,
            self._allowed_ids,
            mask,
        )

    def _mask(self, constraint: Constraint, banned: Sequence[int]) -> bytes:
        mask = constraint.mask()
        if (banned or self._allowed_bits != -1) and not int.from_bytes(mask, "little") & self._allowed_bits & ~_bits(
            banned
        ):
            raise RequestError(
                "min_tokens, bad_words and allowed_token_ids leave no token that the structured output allows",
                param="structured_outputs",
                reason="conflict",
            )
        return mask

    def is_finished(self, num_output: int) -> bool:
        """Whether the grammar leaves nothing to generate after `num_output` tokens."""
        if self.constraint is None or not self.constraint.is_finished:
            return False
        if num_output < self._params.min_tokens:
            message = f"the structured output is complete after {num_output} tokens, before min_tokens"
            raise RequestError(message, param="min_tokens", reason="conflict")
        return True

    def forced(self, num_output: int) -> int | None:
        """The token that follows `num_output` generated ones whatever the logits are; None where that is not known.

        Also None where bans may leave none at all, or its log-probability is wanted: then a row has to say.
        """
        if self.constraint is None or self._bad_words or self._allowed_ids is not None:
            return None
        if self._params.logprobs is not None:
            return None
        return None if num_output < self._params.min_tokens else self.constraint.forced()

    def _penalties(self, guesses: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        if not self._penalises:
            return (), ()
        ids, counts, slots = list(self._ids), list(self._counts), dict(self._slots)
        for token in guesses:
            slot = slots.setdefault(token, len(ids))
            if slot == len(ids):
                ids.append(token)
                counts.append(0)
            counts[slot] += 1
        return ids, counts

    def _banned(
        self, token_ids: Sequence[int], num_prompt: int, guesses: Sequence[int], num_output: int
    ) -> Sequence[int]:
        banned: Sequence[int] = self._stop_ids if num_output < self._params.min_tokens else ()
        if self._bad_words:
            start = max(num_prompt, len(token_ids) - self._longest_bad_word)
            banned = (*banned, *self._bad_endings((*token_ids[start:], *guesses)))
        if banned and self._allowed_ids is not None and set(banned).issuperset(self._allowed_ids):
            raise RequestError(
                "bad_words and min_tokens leave none of allowed_token_ids", param="allowed_token_ids", reason="conflict"
            )
        return banned

    def _bad_endings(self, tail: tuple[int, ...]) -> list[int]:
        """Last tokens of the bad words whose other tokens are the end of the output."""
        return [
            word[-1]
            for word in self._bad_words
            if len(word) == 1 or (len(tail) >= len(word) - 1 and tail[1 - len(word) :] == word[:-1])
        ]


def _bits(token_ids: Sequence[int]) -> int:
    bits = bytearray(max(token_ids, default=0) // 8 + 1)
    for token in token_ids:
        bits[token >> 3] |= 1 << (token & 7)
    return int.from_bytes(bits, "little")
