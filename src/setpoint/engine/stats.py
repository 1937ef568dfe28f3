"""Counters of the engine: kept by the scheduler, read by the metrics page."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

STEP_TOKEN_BOUNDS = (1, *(1 << power for power in range(3, 15)))  # 1 8 16 32 ... 16384


@dataclass(slots=True)
class StepTokens:
    """Histogram of tokens per step; `counts[i]` steps had at most `STEP_TOKEN_BOUNDS[i]`, the last one more."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKEN_BOUNDS) + 1))
    num_steps: int = 0
    num_tokens: int = 0

    def observe(self, num_tokens: int) -> None:
        self.counts[bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1
        self.num_steps += 1
        self.num_tokens += num_tokens

    def copy(self) -> StepTokens:
        return StepTokens(list(self.counts), self.num_steps, self.num_tokens)


@dataclass(slots=True)
class SpeculationCounters:
    """What drafts did; a list index is a draft's place behind the last known token, 0 for the first."""

    num_drafts: int = 0  # chains of tokens that were verified
    draft_tokens: int = 0
    accepted_tokens: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    methods: dict[str, list[int]] = field(default_factory=dict)  # drafter -> tokens drafted, accepted
    saved_seconds: float = 0.0  # against the same tokens without drafts, by the measured cost of steps

    def count(self, num_drafts: int, num_accepted: int) -> None:
        """One chain was verified."""
        self.num_drafts += 1
        self.draft_tokens += num_drafts
        self.accepted_tokens += num_accepted
        missing = num_drafts - len(self.drafted_at)
        self.drafted_at += [0] * missing
        self.accepted_at += [0] * missing
        for place in range(num_drafts):
            self.drafted_at[place] += 1
        for place in range(num_accepted):
            self.accepted_at[place] += 1


@dataclass(slots=True)
class Counters:
    """Totals since the start. Written by the thread that schedules only."""

    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache, at first admission
    prefix_hits: int = 0  # of these, found
    external_queries: int = 0  # of these, not in the pool and looked up in lower tiers
    external_hits: int = 0  # found there, and restored
    prompt_tokens: int = 0  # of admitted requests, each prompt once
    prompt_tokens_cached: int = 0  # of these, not computed
    prompt_tokens_restored: int = 0  # of the cached, read back from memory or disk
    generation_tokens: int = 0
    forced_tokens: int = 0  # of these, the only ones that a grammar allowed: no forward pass drew them
    output_violations: int = 0  # tokens drawn against a grammar; must be 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))
    aborted_by_state: dict[str, int] = field(  # requests
        default_factory=lambda: dict.fromkeys(("waiting", "preempted", "prefill", "decode"), 0)
    )
    divergences: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("text", "salt", "evicted"), 0))
    step_tokens: StepTokens = field(default_factory=StepTokens)
    speculation: SpeculationCounters = field(default_factory=SpeculationCounters)

    def count_output(self, num_tokens: int, num_drawn: int) -> None:
        """A sequence generated so many tokens, of which the runner drew some; the others were forced."""
        self.generation_tokens += num_tokens
        self.forced_tokens += num_tokens - num_drawn


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One reading. Sequences are counted, not requests; ages in seconds; `kv_usage` is 0..1 of the fullest group."""

    num_running: int
    num_waiting: int  # for room (capacity); includes preempted ones and requests not yet seen by the scheduler
    num_deferred: int  # for a sibling that computes their common prompt
    num_queued_requests: int  # in the bounded queue
    num_queued_tokens: int
    oldest_queue_age_s: float
    kv_usage: float
    kv_blocks_leaked: int  # used although no sequence exists; must be 0
    num_sessions: int
    num_sessions_expired: int
    num_sessions_over_budget: int  # that lost their protection to others of their tenant
    host_tier_bytes: int
    heartbeat_age_s: float
    is_alive: bool
    is_draining: bool
    num_engine_failures: int  # steps that failed with no request to blame
    rejected: dict[str, int]  # by reason: queue_full, invalid, draining
    counters: Counters
