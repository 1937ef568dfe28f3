"""What holds an SLA while load changes, as pure functions: views in, choices out; no clock, no state.

*Every step*: how many prompt tokens to compute beside the running sequences, and which prompts first. Token i of an
answer is due at `first + i * TPOT`; the budget is the largest that lets every running sequence keep its next deadline.
Where that would miss first tokens, the budget with the fewest predicted misses of both kinds is taken. Prompts go by
deadline, and what can no longer be met goes behind what can: the rule of Moore (1968), which leaves the fewest late.
*Each arrival*: whether its first token can still be in time behind what waits.

Every view is kept with its choice (`decisions.py`), so that a run can be judged, and repeated, afterwards.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from dataclasses import dataclass

MAX_RETRY_AFTER_S = 600
STARTED = -(1 << 20)  # rank of who lost its place: it has answered already, and goes first
LATE_TURN = 16  # every so many steps the oldest prompt that is late goes first
MOST_STARVED = 4  # steps in a row without prompt tokens although prompts wait
_AT_STAKE = 32  # prompts that are looked at when misses are weighed


@dataclass(frozen=True, slots=True)
class Decode:
    """A running sequence: seconds until its next token is due, and tokens that it is thought to have left."""

    slack_s: float
    tokens_left: int
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """What waits for its first token. Lower ranks go first; slack in seconds, inf without a target."""

    rank: int
    slack_s: float
    tokens: int  # to compute until then


@dataclass(frozen=True, slots=True)
class StepView:
    """What a step's choice is made from. `sizes` are the prompt tokens it may take, ascending from 0, and what the step
    is then predicted to last; `rate` is the prompt tokens a second computed of late."""

    decodes: tuple[Decode, ...]
    prompts: tuple[Prompt, ...]  # by rank and arrival
    startable: int  # of these, how many may run now
    sizes: tuple[tuple[int, float], ...]
    rate: float
    turn: int
    starved: int


@dataclass(frozen=True, slots=True)
class StepChoice:
    tokens: int  # of prompts, at most
    order: tuple[int, ...]  # indices of the prompts
    late: int  # of them, that cannot be in time any more
    seconds: float  # that the step is predicted to last
    misses: int  # predicted by this choice, besides those: 0 while nothing is at stake
    binding: bool  # a deadline, not the engine's limit, set the tokens


def choose_step(view: StepView) -> StepChoice:
    """The prompt tokens of one step and the order in which prompts take them."""
    in_time, late = _in_time(view)
    order = in_time + late
    if late and view.turn % LATE_TURN == 0:
        order = [late[0], *in_time, *late[1:]]
    at, misses = _size(view, in_time)
    if at == 0 and len(view.sizes) > 1 and (not view.decodes or view.starved >= MOST_STARVED):
        at = 1
    tokens, seconds = view.sizes[at]
    return StepChoice(tokens, tuple(order), len(late), seconds, misses, at < len(view.sizes) - 1)


def _in_time(view: StepView) -> tuple[list[int], list[int]]:
    """Prompts by deadline within their rank, without the longest ones of those that cannot all be in time."""
    prompts, rate = view.prompts, max(view.rate, 1e-9)
    taken: list[int] = []
    late: set[int] = set()
    largest: list[tuple[int, int]] = []  # of the rank under way
    tokens, rank = 0, STARTED
    for index in sorted(range(len(prompts)), key=lambda i: (prompts[i].rank, prompts[i].slack_s)):
        prompt = prompts[index]
        if prompt.rank != rank:
            largest, rank = [], prompt.rank
        taken.append(index)
        tokens += prompt.tokens
        if rank == STARTED:
            continue
        heapq.heappush(largest, (-prompt.tokens, index))
        if tokens / rate > prompt.slack_s:
            size, dropped = heapq.heappop(largest)
            late.add(dropped)
            tokens += size
    return [index for index in taken if index not in late], sorted(late)


def _size(view: StepView, in_time: list[int]) -> tuple[int, int]:
    """Which of the sizes, and how many misses it is predicted to bring."""
    sizes = view.sizes
    plain_s = sizes[0][1]
    limit_s = math.inf
    for decode in view.decodes:
        allowed_s = decode.slack_s
        if allowed_s < plain_s:  # late, but a steady pace may bring it back
            allowed_s = (allowed_s + (decode.tokens_left - 1) * decode.tpot_s) / decode.tokens_left
        if plain_s <= allowed_s < limit_s:
            limit_s = allowed_s
    calm = 0
    while calm + 1 < len(sizes) and sizes[calm + 1][1] <= limit_s:
        calm += 1
    ends = _ends(view, in_time)
    if calm == len(sizes) - 1 or not ends:
        return calm, 0
    late_first = _late(ends, *sizes[calm], view.rate)
    if not late_first:
        return calm, 0
    bearable = sorted(
        bears_s
        for decode in view.decodes
        if (bears_s := decode.slack_s + (decode.tokens_left - 1) * (decode.tpot_s - plain_s)) >= plain_s
    )
    best, fewest = calm, bisect_left(bearable, sizes[calm][1]) + late_first
    for at in range(calm + 1, len(sizes)):
        misses = bisect_left(bearable, sizes[at][1]) + _late(ends, *sizes[at], view.rate)
        if misses < fewest:
            best, fewest = at, misses
    return best, fewest


def _ends(view: StepView, in_time: list[int]) -> list[tuple[int, float]]:
    """(tokens up to the end of a prompt, its slack) for those that may run now."""
    ends, tokens = [], 0
    for index in in_time[: min(view.startable, _AT_STAKE)]:
        prompt = view.prompts[index]
        tokens += prompt.tokens
        ends.append((tokens, prompt.slack_s))
    return ends


def _late(ends: list[tuple[int, float]], size: int, seconds: float, rate: float) -> int:
    """First tokens that a step of this size makes late, when the following ones go on at the rate."""
    rate = max(rate, 1e-9)
    return sum(seconds + max(tokens - size, 0) / rate > slack_s for tokens, slack_s in ends)


@dataclass(frozen=True, slots=True)
class ArrivalView:
    """A request at the door. Times in seconds; `ahead` is what is served before it."""

    ttft_s: float
    own_tokens: int
    ahead_tokens: int
    ahead_requests: int  # of these, that have no place yet
    free_places: int
    finish_rate: float  # answers a second, 0 where none ended yet
    rate: float  # prompt tokens a second
    step_s: float  # the step under way may last so long


@dataclass(frozen=True, slots=True)
class ArrivalChoice:
    predicted_s: float  # until its first token
    retry_after_s: int | None  # None: it may enter


def choose_arrival(view: ArrivalView) -> ArrivalChoice:
    """Refuse whoever would only miss its target and others'. An engine with nothing to do takes anyone, and what takes
    too long even alone is asked for no more than twice that."""
    alone_s = view.step_s + view.own_tokens / max(view.rate, 1e-9)
    predicted_s = alone_s + view.ahead_tokens / max(view.rate, 1e-9)
    in_line = view.ahead_requests + 1 - view.free_places
    if in_line > 0 and view.finish_rate > 0.0:
        predicted_s = max(predicted_s, alone_s + in_line / view.finish_rate)
    allowed_s = max(view.ttft_s, 2 * alone_s)
    if predicted_s <= allowed_s:
        return ArrivalChoice(predicted_s, None)
    wait_s = math.ceil(min(predicted_s - allowed_s, MAX_RETRY_AFTER_S))
    return ArrivalChoice(predicted_s, min(max(wait_s, 1), MAX_RETRY_AFTER_S))
