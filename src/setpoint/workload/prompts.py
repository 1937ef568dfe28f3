"""Token ids for the prompts of a trace without text: equal block ids give equal tokens, and nothing else does.

So the prefix cache of an engine hits what it would hit with the text. The tokens are drawn evenly from the vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from setpoint.workload.trace import Trace

_Words = NDArray[np.uint64]
_TAIL = 1 << 62  # ids of what belongs to one request alone lie above those of a trace


class PromptTokens:
    """Of one trace and vocabulary; the same seed gives the same tokens. A prompt is made when it is asked for."""

    def __init__(self, trace: Trace, vocab_size: int, seed: int = 0) -> None:
        self._trace, self._vocab_size = trace, vocab_size
        self._seed = np.uint64(_mixed(np.asarray([seed], np.uint64))[0])

    def __getitem__(self, index: int) -> list[int]:
        """The prompt of the request with this number."""
        request = self._trace.requests[index]
        size = self._trace.header.block_size
        ids = request.hash_ids[: -(-request.input_tokens // size)]
        blocks = self._tokens(np.asarray(ids, np.uint64), size)[: request.input_tokens]
        rest = request.input_tokens - len(blocks)
        if rest > 0:
            own = self._tokens(np.asarray([_TAIL + index], np.uint64), rest)
            blocks = np.concatenate((blocks, own))
        tokens: list[int] = blocks.tolist()
        return tokens

    def _tokens(self, ids: _Words, count: int) -> NDArray[np.int64]:
        """`count` tokens for each id, one after the other."""
        places = np.arange(count, dtype=np.uint64)
        words = _mixed(_mixed(ids ^ self._seed)[:, None] + places)
        return (words % np.uint64(self._vocab_size)).astype(np.int64).reshape(-1)


def _mixed(words: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit depends on every bit."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
