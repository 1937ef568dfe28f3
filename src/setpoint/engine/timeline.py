"""Where the time of one sequence went: phases one after the other, each with what it was made of.

A phase ends where the next one begins, so phases cover the time from a request's submission to its end without gap or
overlap. What happens to many sequences at once (a step, a queue that does not move) is counted once, in `Clocks`; a
phase notes where they stood when it began. That makes a decoding or waiting sequence free between two changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from setpoint.engine.diagnosis import Divergence

NOTHING_S = 1e-9  # what rounding leaves
MAX_SPANS = 48  # of a sequence; later ones are joined to the last


class Kind(Enum):
    INBOX = "inbox"  # submitted while a step was under way
    QUEUE = "queue"  # behind the limits of a step
    SIBLING = "sibling"  # lets another sequence of its request compute their prompt
    FETCH = "fetch"  # blocks are read from disk
    RESTORE = "restore"  # blocks are written into the KV cache
    PREFILL = "prefill"  # tokens are computed for the first time, up to the first one drawn
    RECOMPUTE = "recompute"  # tokens are computed again after a preemption
    DECODE = "decode"
    PREEMPTED = "preempted"  # waits again


COMPUTING = frozenset({Kind.RESTORE, Kind.PREFILL, Kind.RECOMPUTE})


class Cause(Enum):
    """What a second was spent on."""

    STEP_UNDER_WAY = "step_under_way"
    PLACES = "places"  # max_num_seqs sequences were running
    BUDGET = "budget"  # the step's tokens were spent on others
    PACER = "pacer"  # fewer were let run, or fewer prompt tokens into a step, than the limits allow, to hold the SLO
    KV_BLOCKS = "kv_blocks"  # the KV cache had no room
    SIBLING = "sibling"
    DISK = "disk"
    PREEMPTED = "preempted"
    KV_MOVES = "kv_moves"  # steps that copied blocks between tiers
    PREFILL = "prefill"  # own tokens of a prompt, by their share of a step's tokens
    PREFILL_OTHERS = "prefill_others"  # the other tokens of these steps
    RECOMPUTE = "recompute"
    DECODE = "decode"
    DECODE_PREFILL = "decode_prefill"  # what steps with prompts of others took longer than steps without
    BETWEEN_STEPS = "between_steps"  # delivery, the inbox, and steps that failed


# Indices of `Clocks`: seconds, but where they say otherwise. The first three say why the queue did not move.
PLACES, TOKEN_BUDGET, KV_BLOCKS, NO_QUEUE, OUTSIDE, MOVING, PURE, MIXED = range(8)
PURE_STEPS, MIXED_STEPS, PREFILL_TOKENS, STEP_TOKENS = range(8, 12)  # counts
PACER = 12  # another reason of the queue
Clocks = list[float]
QUEUE_CAUSES = {PLACES: Cause.PLACES, TOKEN_BUDGET: Cause.BUDGET, KV_BLOCKS: Cause.KV_BLOCKS, PACER: Cause.PACER}
MAIN_CAUSE = {  # of what nothing else explains in a phase
    Kind.INBOX: Cause.STEP_UNDER_WAY,
    Kind.QUEUE: Cause.STEP_UNDER_WAY,
    Kind.SIBLING: Cause.SIBLING,
    Kind.FETCH: Cause.DISK,
    Kind.RESTORE: Cause.KV_MOVES,
    Kind.PREFILL: Cause.PREFILL,
    Kind.RECOMPUTE: Cause.RECOMPUTE,
    Kind.DECODE: Cause.DECODE,
    Kind.PREEMPTED: Cause.PREEMPTED,
}


def new_clocks() -> Clocks:
    return [0.0] * 13


@dataclass(slots=True)
class Phase:
    """What a sequence is in. The counters are those of a prompt that is computed."""

    kind: Kind
    since: float
    marks: Clocks  # when it began
    num_steps: int = 0
    num_tokens: int = 0
    others_tokens: int = 0  # in the same steps
    starved_steps: int = 0  # without a token of this sequence
    paced_steps: int = 0  # that took fewer prompt tokens than the limits allow
    others_s: float = 0.0
    starved_s: float = 0.0
    starved_by_pacer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """A phase that is over. The seconds of `parts` add up to its length, to some nanoseconds."""

    kind: Kind
    start: float
    end: float
    parts: tuple[tuple[Cause, float], ...]
    num_steps: int = 0  # of a prompt: its chunks
    num_tokens: int = 0  # of a prompt: computed
    num_mixed_steps: int = 0  # of a decode: that had tokens of prompts in them
    others_tokens: int = 0  # of a decode: of prompts in its steps; of a prompt: all others in its steps
    step_tokens: int = 0  # in all steps of a decode
    starved_steps: int = 0
    paced_steps: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def join(self, later: Span) -> Span:
        """Both as one, of the longer one's kind."""
        parts: dict[Cause, float] = dict(self.parts)
        for cause, seconds in later.parts:
            parts[cause] = parts.get(cause, 0.0) + seconds
        return Span(
            self.kind if self.seconds >= later.seconds else later.kind,
            self.start,
            later.end,
            tuple(parts.items()),
            self.num_steps + later.num_steps,
            self.num_tokens + later.num_tokens,
            self.num_mixed_steps + later.num_mixed_steps,
            self.others_tokens + later.others_tokens,
            self.step_tokens + later.step_tokens,
            self.starved_steps + later.starved_steps,
            self.paced_steps + later.paced_steps,
        )


@dataclass(slots=True, eq=False)
class Timeline:
    """One sequence. Written by the thread that schedules; others read it through `Timelines.read`."""

    index: int = 0
    tenant: str = ""
    num_prompt: int = 0
    submitted: float = 0.0
    phase: Phase | None = None  # None before it is known and after its end
    spans: list[Span] = field(default_factory=list)
    finished: float | None = None
    finish_reason: str | None = None
    first_token: float | None = None
    num_output: int = 0
    num_ahead: int = 0  # that waited and came first when it arrived
    overtaken_by: int = 0  # that arrived later and started earlier, with a smaller priority number
    cached_tokens: int = 0  # of the prompt, found in the pool
    memory_tokens: int = 0  # copied back from host memory
    disk_tokens: int = 0
    divergence: Divergence | None = None
    num_preemptions: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_forced: int = 0
    is_started: bool = False
    chunk: int = 0  # tokens of the step under way
    high_water: int = 0  # most tokens that were ever computed
    start_length: int = 0  # tokens known when it last started
    seen_priority: int = 0  # arrivals with a smaller priority number, when it arrived

    def close(self, now: float, clocks: Clocks, queue_cause: int) -> None:
        """The phase is over."""
        phase = self.phase
        if phase is not None and now > phase.since:
            span = ended(phase, now, clocks, queue_cause)
            if len(self.spans) < MAX_SPANS:
                self.spans.append(span)
            else:
                self.spans[-1] = self.spans[-1].join(span)

    def count_drafts(self, num_drafted: int, num_accepted: int) -> None:
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted

    def begin(self, kind: Kind, now: float, clocks: Clocks) -> None:
        self.phase = Phase(kind, now, clocks.copy())


def ended(phase: Phase, now: float, clocks: Clocks, queue_cause: int) -> Span:
    """What a phase was made of, if it ended now."""
    diff = [after - before for after, before in zip(clocks, phase.marks, strict=True)]
    kind, length = phase.kind, now - phase.since
    if kind is Kind.QUEUE:
        main = QUEUE_CAUSES.get(queue_cause, Cause.STEP_UNDER_WAY)
        others = [(cause, diff[index]) for index, cause in QUEUE_CAUSES.items() if cause is not main]
        return Span(kind, phase.since, now, fill(main, others, length))
    main = MAIN_CAUSE[kind]
    if kind in COMPUTING:
        others = [
            (Cause.BETWEEN_STEPS, diff[OUTSIDE]),
            (Cause.KV_MOVES, diff[MOVING]),
            (Cause.BUDGET, phase.starved_s),
            (Cause.PACER, phase.starved_by_pacer_s),
            (Cause.PREFILL_OTHERS, phase.others_s),
        ]
        others = [part for part in others if part[0] is not main]
        counts = (phase.num_steps, phase.num_tokens, 0, phase.others_tokens, 0, phase.starved_steps, phase.paced_steps)
        return Span(kind, phase.since, now, fill(main, others, length), *counts)
    if kind is not Kind.DECODE:
        return Span(kind, phase.since, now, ((main, length),))
    others = [
        (Cause.BETWEEN_STEPS, diff[OUTSIDE]),
        (Cause.KV_MOVES, diff[MOVING]),
        (Cause.DECODE_PREFILL, lengthened(diff, clocks)),
    ]
    mixed = round(diff[MIXED_STEPS])
    steps = round(diff[PURE_STEPS]) + mixed
    tokens = round(diff[PREFILL_TOKENS]), round(diff[STEP_TOKENS])
    return Span(kind, phase.since, now, fill(main, others, length), steps, 0, mixed, *tokens)


def lengthened(diff: Clocks, clocks: Clocks) -> float:
    """How much longer the steps with prompts in them took than the same number without.

    By the mean of the steps without, in this phase or, if it had none, since the start; 0 while there were none at all.
    """
    pure = diff if diff[PURE_STEPS] else clocks
    if not pure[PURE_STEPS]:
        return 0.0
    return max(0.0, diff[MIXED] - diff[MIXED_STEPS] * pure[PURE] / pure[PURE_STEPS])


def fill(main: Cause, others: list[tuple[Cause, float]], length: float) -> tuple[tuple[Cause, float], ...]:
    """The parts that are not nothing; `main` is what the others leave, who never get more than there is."""
    parts, left = [], length
    for cause, seconds in others:
        taken = min(seconds, left)
        if taken > NOTHING_S:
            parts.append((cause, taken))
            left -= taken
    return ((main, left), *parts) if left > NOTHING_S or not parts else tuple(parts)
