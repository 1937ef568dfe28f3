"""Why a request computed what its session had computed before: where its prompt stopped being the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Cause = Literal["text", "salt", "evicted"]
EXCERPT_TOKENS = 16
_STRIDE = 512


@dataclass(frozen=True, slots=True)
class Divergence:
    """`text`: the prompt differs from token `token_index` on: `expected` is what the session had, `found` what came.
    `evicted`: the same text, but its keys and values were given up from there on. `salt`: another cache_salt.
    """

    cause: Cause
    token_index: int
    num_lost_tokens: int  # computed again
    expected: tuple[int, ...] = ()
    found: tuple[int, ...] = ()


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Of the longest common prefix."""
    end = min(len(left), len(right))
    for start in range(0, end, _STRIDE):
        stop = min(start + _STRIDE, end)
        if left[start:stop] != right[start:stop]:
            return next(index for index in range(start, stop) if left[index] != right[index])
    return end


def diagnose(earlier: Sequence[int], prompt: Sequence[int], num_cached: int, block_size: int) -> Divergence | None:
    """`earlier` is a sequence of the session, `num_cached` what the prompt found; both of the same type.

    None when it found all that it could: whole blocks, and never the prompt's last token.
    """
    could = min(len(earlier), len(prompt) - 1) // block_size * block_size
    if num_cached >= could:
        return None
    common = common_length(earlier, prompt)
    if num_cached < min(common, len(prompt) - 1) // block_size * block_size:
        return Divergence("evicted", num_cached, could - num_cached)
    excerpt = slice(common, common + EXCERPT_TOKENS)
    return Divergence("text", common, could - num_cached, tuple(earlier[excerpt]), tuple(prompt[excerpt]))
