"""What the engine tells the front end: one `Event` per sequence that moved in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from setpoint.engine.diagnosis import Divergence

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token from the raw logits, with the most likely alternatives beside it."""

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


@dataclass(slots=True)  # not frozen for the reason given in `engine.plan`
class Event:
    """New tokens of one sequence, its end, or both.

    Exactly one event per (request_id, index) has `finish_reason` set, and it is the last one. The token that ended
    the sequence (end-of-sequence or a stop id) is in `token_ids`; `stop_reason` names it only when it came from
    `stop_token_ids`. `prompt_logprobs` comes once, with the first tokens of index 0: one per prompt token, None for
    the first. Times are seconds of the engine's clock.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    is_complete: bool = False  # finish_reason is "stop" because a grammar left nothing to add: no token says the end
    error: Exception | None = None  # set if and only if finish_reason == "error"; safe to show to a client
    num_cached_tokens: int = 0  # of the prompt, at first admission; index 0 is what `usage` reports
    num_output_tokens: int = 0  # so far, this event included
    divergence: Divergence | None = None  # why the prompt found less than its session had
    num_preemptions: int = 0
    time: float = 0.0
    arrival_time: float = 0.0
    first_scheduled_time: float | None = None

    @property
    def queued_s(self) -> float:
        """Time in the queue before the first step; until now for a sequence that never ran."""
        end = self.time if self.first_scheduled_time is None else self.first_scheduled_time
        return end - self.arrival_time
