"""What a timeline says in a few sentences: the causes that cost most, in numbers, and the knob that would have helped.

Pure: a timeline and the limits of the engine in, words out. Every sentence holds the numbers it is made from.
"""

from __future__ import annotations

from dataclasses import dataclass

from setpoint.engine.timeline import Cause, Kind, Timeline

MAX_SENTENCES = 3
WORTH_SHARE = 0.05  # of a request's time: less is not worth a sentence
WORTH_S = 1e-3


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine may do at most, as it is now."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: int  # the KV cache holds so many


@dataclass(frozen=True, slots=True)
class Explanation:
    """All sequences of a request, up to `at` where they still run, under the limits of that moment."""

    timelines: tuple[Timeline, ...]
    limits: Limits
    at: float

    @property
    def critical(self) -> Timeline:
        """The sequence that ends last, or runs still: the request takes as long as this one."""
        return max(self.timelines, key=lambda timeline: (timeline.finished is None, timeline.finished or 0.0))


def totals(timeline: Timeline) -> dict[Cause, float]:
    """Seconds by cause, the longest first."""
    sums: dict[Cause, float] = {}
    for span in timeline.spans:
        for cause, seconds in span.parts:
            sums[cause] = sums.get(cause, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def advice(timeline: Timeline, limits: Limits) -> list[str]:
    """At most three sentences, on what took longest."""
    sums = totals(timeline)
    whole = sum(sums.values())
    if Cause.PREEMPTED in sums:
        sums[Cause.PREEMPTED] += sums.pop(Cause.RECOMPUTE, 0.0)
    worth = [(seconds, cause) for cause, seconds in sums.items() if seconds >= max(WORTH_S, WORTH_SHARE * whole)]
    worth.sort(key=lambda item: -item[0])
    return [_sentence(cause, seconds, whole, timeline, limits) for seconds, cause in worth[:MAX_SENTENCES]]


def _sentence(cause: Cause, seconds: float, whole: float, timeline: Timeline, limits: Limits) -> str:
    time = f"{seconds * 1e3:.0f} ms ({seconds / whole:.0%})"
    budget = f"--max-num-batched-tokens (now {limits.max_num_batched_tokens})"
    seats = f"--max-num-seqs (now {limits.max_num_seqs})"
    room = f"--kv-cache-memory-bytes (now {limits.kv_tokens} tokens)"
    match cause:
        case Cause.PLACES:
            return f"Waited {time} because all places were taken{_overtaken(timeline)}; a larger {seats} is the knob."
        case Cause.BUDGET:
            return f"Waited {time} while the tokens of each step went to others; a larger {budget} is the knob."
        case Cause.PACER:
            held = f"fewer than {seats}, or fewer prompt tokens a step than {budget}"
            return f"Waited {time} because the pacer let in {held}, to hold the SLO of the others."
        case Cause.KV_BLOCKS:
            return f"Waited {time} because the KV cache had no room{_overtaken(timeline)}; a larger {room} is the knob."
        case Cause.STEP_UNDER_WAY:
            return f"Waited {time} for the step under way when it came; a smaller {budget} makes steps shorter."
        case Cause.SIBLING:
            return (
                f"Waited {time} for another choice of its request to compute their {timeline.num_prompt} prompt tokens."
            )
        case Cause.DISK:
            return f"Waited {time} for {timeline.disk_tokens} tokens from disk; --kv-host-bytes keeps more in memory."
        case Cause.KV_MOVES:
            moved = timeline.memory_tokens + timeline.disk_tokens
            return f"{time} of its steps copied KV blocks ({moved} tokens of its own); a larger {room} moves fewer."
        case Cause.PREEMPTED | Cause.RECOMPUTE:
            again = sum(span.num_tokens for span in timeline.spans if span.kind is Kind.RECOMPUTE)
            times = f"Preempted {timeline.num_preemptions} times: {time} to wait and to compute {again} tokens again"
            return f"{times}; a larger {room} or a smaller {seats} is the knob."
        case Cause.PREFILL:
            return _prefill(time, timeline)
        case Cause.PREFILL_OTHERS:
            others = sum(span.others_tokens for span in timeline.spans if span.kind is not Kind.DECODE)
            return f"{others} tokens of others in the steps of its prompt took {time}; a smaller {seats} admits fewer."
        case Cause.DECODE_PREFILL:
            decodes = [span for span in timeline.spans if span.num_mixed_steps]
            mixed, steps = sum(s.num_mixed_steps for s in decodes), sum(s.num_steps for s in decodes)
            which = f"Prompts of others made {mixed} of its {steps} decode steps longer, by {time}"
            return f"{which}; a smaller {budget} is the knob."
        case Cause.DECODE:
            return _decode(time, timeline)
        case Cause.BETWEEN_STEPS:
            return f"{time} passed between steps: delivery, new requests, or steps that failed."


def _overtaken(timeline: Timeline) -> str:
    if timeline.overtaken_by:
        return f", and {timeline.overtaken_by} later ones went first by their priority"
    return f", {timeline.num_ahead} waiting ahead of it" if timeline.num_ahead else ""


def _prefill(time: str, timeline: Timeline) -> str:
    spans = [span for span in timeline.spans if span.kind is Kind.PREFILL]
    tokens, chunks = sum(span.num_tokens for span in spans), sum(span.num_steps for span in spans)
    cached = timeline.cached_tokens + timeline.memory_tokens + timeline.disk_tokens
    text = f"Computing {tokens} tokens of its prompt in {chunks} steps took {time}; {cached} came from the cache"
    paced = sum(span.paced_steps for span in spans)
    if paced:
        text += f"; the pacer made {paced} of these steps smaller, to hold the SLO of answers under way"
    found = timeline.divergence
    if found is None:
        return f"{text}."
    lost = f"{found.num_lost_tokens} that its session had did not"
    match found.cause:
        case "text":
            return f"{text}, {lost}: the prompt differs from token {found.token_index} on."
        case "salt":
            return f"{text}, {lost}: the cache_salt is another one."
        case "evicted":
            return f"{text}, {lost}: they were evicted; --kv-cache-memory-bytes or --kv-host-bytes is the knob."


def _decode(time: str, timeline: Timeline) -> str:
    spans = [span for span in timeline.spans if span.kind is Kind.DECODE]
    steps = sum(span.num_steps for span in spans)
    batch = sum(span.step_tokens - span.others_tokens for span in spans) / max(steps, 1)
    text = f"Decoding took {time} in {steps} steps of {batch:.1f} tokens on average"
    if timeline.num_drafted:
        text += f"; {timeline.num_accepted} of {timeline.num_drafted} drafted tokens were accepted"
    if timeline.num_forced:
        text += f"; its grammar forced {timeline.num_forced} tokens without a step"
    return f"{text}."
