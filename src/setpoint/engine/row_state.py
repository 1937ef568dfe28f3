"""What one sequence must remember between tokens to say how the next one is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

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
    """Penalty counts, kept up to date token by token, and the bans that depend on what was generated."""

    def __init__(self, params: SamplingParams, *, seed: int, prompt: Sequence[int], stop_ids: Iterable[int]) -> None:
        self._params = params
        self._seed = seed
        self._stop_ids = tuple(sorted(stop_ids)) if params.min_tokens > 0 else ()
        self._bad_words = tuple(map(tuple, params.bad_words_token_ids))
        self._longest_bad_word = max(map(len, self._bad_words), default=0)
        bias = params.logit_bias or {}
        self._bias_ids = tuple(bias)
        self._bias_values = tuple(bias.values())
        allowed = params.allowed_token_ids
        self._allowed_ids = None if allowed is None else tuple(allowed)
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
        if self._penalises:
            self._count(token, 1)

    def _count(self, token: int, amount: int) -> None:
        slot = self._slots.setdefault(token, len(self._ids))
        if slot == len(self._ids):
            self._ids.append(token)
            self._counts.append(amount)
        else:
            self._counts[slot] += amount

    def row(self, token_ids: Sequence[int], num_prompt: int, guesses: Sequence[int] = ()) -> RowSampling:
        """How to draw the token after `token_ids` and then `guesses` (drafts taken as if they were accepted)."""
        params = self._params
        num_output = len(token_ids) - num_prompt + len(guesses)
        bans = self._bad_words or num_output < params.min_tokens
        banned = self._banned(token_ids, num_prompt, guesses, num_output) if bans else ()
        # Live lists, but with guesses: a plan is executed before the next append.
        ids, counts = self._penalties(guesses) if guesses else (self._ids, self._counts)
        return RowSampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=self._seed,
            position=num_prompt + num_output,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            penalty_ids=ids,
            penalty_counts=counts,
            bias_ids=self._bias_ids,
            bias_values=self._bias_values,
            banned_ids=banned,
            allowed_ids=self._allowed_ids,
        )

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
