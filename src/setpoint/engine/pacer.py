"""Holding an SLA: what the scheduler asks before a step, and tells of steps, arrivals and answers.

The choices are those of `pacing.py`; here their views are gathered. It changes when tokens are computed, never which:
budgets, orders, how many run, and who is refused at the door.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from setpoint.engine.decisions import Decisions
from setpoint.engine.envelope import Envelope, choose_row
from setpoint.engine.limits import SchedulerLimits
from setpoint.engine.pace_cost import LearnedCost, PaceCost, ProbedCost
from setpoint.engine.pacing import (
    STARTED,
    ArrivalView,
    Decode,
    Prompt,
    StepView,
    choose_arrival,
    choose_step,
)
from setpoint.engine.pacing_counters import Attainment, PacingCounters
from setpoint.engine.plan import KVGroup, StepPlan
from setpoint.engine.request import Request
from setpoint.engine.sequence import Sequence
from setpoint.engine.slo import HeldSla
from setpoint.engine.step_cost import ShapeOf, StepCost, StepShape
from setpoint.errors import ShedError

MARGIN = 0.9  # of a target is aimed at: what is predicted is a mean
TICK_S = 1.0
_SIZES = (*range(16, 129, 16), 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
_FIRST_SIZE = 32  # prompt tokens of a step while nothing is known of steps
_MOST_SIZES = 12
_MOST_PROMPTS = 256  # that are put in order; what comes after them waits for a later look
_MEMORY = 0.9  # of the rate at which prompts are computed, for each step
_NO_TOKENS = 64.0  # thought to be in an answer before any ended


@dataclass(slots=True)
class Pace:
    """The deadlines of a sequence."""

    due_s: float  # of the first token; inf without a target
    tpot_s: float  # inf without a target
    first_s: float | None = None  # when the first token came


@dataclass(frozen=True, slots=True)
class Paced:
    """What a step may do. `waiting` holds those that may start, in order."""

    budget: int
    prefills: AbstractSequence[Sequence]
    waiting: AbstractSequence[Sequence]
    max_running: int
    draft_room: int | None  # tokens for drafts; None: what the budget leaves


@dataclass(frozen=True, slots=True)
class _Door:
    """What arrivals are judged by, as of the last step. Replaced whole, so that other threads may read it."""

    prompts: tuple[tuple[int, float, float], ...] = ()  # rank, due, tokens to compute
    waiting: int = 0
    max_running: int = 1 << 20
    rate: float = 0.0  # 0: nothing is known
    step_s: float = 0.0


class Pacer:
    """`admit` may be called from any thread, everything else from the one that schedules."""

    def __init__(self, held: HeldSla, cost: StepCost | None, groups: AbstractSequence[KVGroup]) -> None:
        self.held = held
        self.counters = PacingCounters()
        self.decisions = Decisions()
        self._cost: PaceCost = LearnedCost() if cost is None else ProbedCost(cost)
        self._shape_of = ShapeOf(groups)
        self._lock = threading.Lock()
        self._inside: dict[str, tuple[int, float, float]] = {}  # admitted, and not seen by the scheduler yet
        self._door = _Door()
        self._envelope = Envelope(held.rows, held.level, held.traffic) if held.rows else None
        self._row_s = -math.inf
        self._committed_s = 0.0
        self._tick_s: float | None = None
        self._turn = self._starved = 0
        self._computed, self._computing_s = 0.0, 0.0  # prompt tokens of late, and the time of those steps
        self._fresh_share = 1.0  # of prompts, that no cache had
        self._output = _NO_TOKENS
        self._service_s = 0.0  # that an answer holds its place
        self._cap = 1 << 20

    # --- arrivals ------------------------------------------------------------------------------------------------

    def admit(self, request: Request, num_running: int, num_waiting: int, now: float) -> None:
        """Raises ShedError for a request whose first token would be late behind what waits. Thread-safe."""
        slo = request.slo or self.held.slo
        due_s = now + (math.inf if slo.ttft_s is None else slo.ttft_s)
        with self._lock:
            if self._envelope is not None:
                self._envelope.arrived()
            door = self._door
            if num_running + num_waiting == 0:  # no step has told since: nothing is ahead
                door = _Door(rate=door.rate)
            tokens = len(request.prompt_token_ids) * self._fresh_share
            if slo.ttft_s is not None and door.rate > 0.0:
                self._judge(request, slo.ttft_s, tokens, door, num_running, now)
            self._inside[request.request_id] = (request.priority, due_s, tokens)

    def _judge(self, request: Request, ttft_s: float, tokens: float, door: _Door, num_running: int, now: float) -> None:
        key = (request.priority, now + ttft_s)
        inside = self._inside.values()
        ahead = sum(cost for rank, due_s, cost in (*door.prompts, *inside) if (rank, due_s) <= key)
        step_s = door.step_s if door.prompts or inside else 0.0
        view = ArrivalView(
            ttft_s=ttft_s,
            own_tokens=round(tokens),
            ahead_tokens=round(ahead),
            ahead_requests=door.waiting + len(inside),
            free_places=max(door.max_running - num_running, 0),
            finish_rate=self._finish_rate(num_running),
            rate=door.rate,
            step_s=step_s,
        )
        choice = choose_arrival(view)
        self.decisions.add(now, view, choice)
        if choice.retry_after_s is not None:
            shed = self.counters.shed
            shed[request.priority] = shed.get(request.priority, 0) + 1
            if self._envelope is not None:
                self._envelope.refused()
            raise ShedError(
                f"the server cannot answer within the request's target now: its first token would take "
                f"{choice.predicted_s:.1f} s; retry in {choice.retry_after_s} s",
                retry_after_s=choice.retry_after_s,
            )

    def _finish_rate(self, num_running: int) -> float:
        """From how long an answer holds its place: a count of ends would fall with every refusal."""
        return num_running / self._service_s if self._service_s > 0.0 else 0.0

    def forget(self, request: Request) -> None:
        """The request waits in the scheduler from now on, or was refused elsewhere. Thread-safe."""
        with self._lock:
            self._inside.pop(request.request_id, None)

    # --- steps ---------------------------------------------------------------------------------------------------

    def choose(
        self,
        decodes: list[Sequence],
        prefills: list[Sequence],
        waiting: list[Sequence],
        limits: SchedulerLimits,
        now: float,
    ) -> Paced:
        """What the step that begins now may do. Decodes always have a token of the budget each."""
        for seq in decodes:
            if seq.pace is None or seq.pace.first_s is None:
                self._note_first(seq)
        if self._tick_s is None or now - self._tick_s >= TICK_S:
            self._tick_s = now
            if decodes:
                context = sum(len(seq.token_ids) for seq in decodes) / len(decodes)
                self._cap = self._largest_batch(context, limits.max_num_seqs)
        if not prefills and not waiting:
            self._starved = 0
            self._door = _Door((), 0, self._max_running(limits), self._rate(0), 0.0)
            return Paced(limits.max_num_batched_tokens, prefills, waiting, limits.max_num_seqs, None)
        return self._choose(decodes, prefills, waiting[:_MOST_PROMPTS], limits, now)

    def _choose(
        self,
        decodes: list[Sequence],
        prefills: list[Sequence],
        waiting: list[Sequence],
        limits: SchedulerLimits,
        now: float,
    ) -> Paced:
        num_running, max_running = len(decodes) + len(prefills), self._max_running(limits)
        places = max(max_running - num_running, 0)
        pending = [*prefills, *waiting]
        prompts = tuple(self._prompt(seq, now) for seq in pending)
        most = limits.max_num_batched_tokens - len(decodes)
        sizes = self._sizes(decodes, pending[0], min(most, sum(prompt.tokens for prompt in prompts)))
        view = StepView(
            decodes=tuple(self._decode(seq, now) for seq in decodes),
            prompts=prompts,
            startable=len(prefills) + places,
            sizes=sizes,
            rate=self._rate(sizes[-1][0] / sizes[-1][1]),
            turn=self._turn,
            starved=self._starved,
        )
        choice = choose_step(view)
        self.decisions.add(now, view, choice)
        self._turn += 1
        self._starved = 0 if choice.tokens else self._starved + 1
        if choice.tokens:
            self._computed = _MEMORY * self._computed + choice.tokens
            self._computing_s = _MEMORY * self._computing_s + choice.seconds
        self._publish(view, choice.order, choice.late, pending, max_running, choice.seconds, now)
        self.counters.budget = len(decodes) + choice.tokens
        self.counters.num_bound_steps += choice.binding
        self.counters.num_late = choice.late
        self.counters.max_running = max_running
        slacks = [decode.slack_s for decode in view.decodes] + [prompt.slack_s for prompt in prompts]
        least = min(slacks)
        self.counters.least_slack_s = least if math.isfinite(least) else 0.0
        budget = limits.max_num_batched_tokens
        if choice.binding or not self._cost.is_known:
            budget = len(decodes) + choice.tokens
        return Paced(
            budget,
            [pending[index] for index in choice.order if index < len(prefills)],
            [pending[index] for index in choice.order if index >= len(prefills)],
            max_running,
            0 if choice.binding else None,
        )

    def _note_first(self, seq: Sequence) -> Pace:
        pace = self._pace(seq)
        if pace.first_s is None and seq.num_output:
            pace.first_s = self._committed_s
        return pace

    def _pace(self, seq: Sequence) -> Pace:
        pace = seq.pace
        if pace is None:
            request = seq.owner.request
            slo = request.slo or self.held.slo
            arrived_s = seq.arrival_time if request.submitted_time is None else request.submitted_time
            pace = seq.pace = Pace(
                math.inf if slo.ttft_s is None else arrived_s + MARGIN * slo.ttft_s,
                math.inf if slo.tpot_s is None else MARGIN * slo.tpot_s,
            )
        return pace

    def _decode(self, seq: Sequence, now: float) -> Decode:
        pace, num_output = self._pace(seq), seq.num_output
        if pace.first_s is None:  # all of its prompt but a token was cached
            return Decode(pace.due_s - now, 1, math.inf)
        if pace.tpot_s == math.inf:
            return Decode(math.inf, 1, math.inf)
        left = min(max((self._output - num_output) / 2, 4.0), seq.max_tokens - num_output)  # half: it may end early
        return Decode(pace.first_s + num_output * pace.tpot_s - now, max(int(left), 1), pace.tpot_s)

    def _prompt(self, seq: Sequence, now: float) -> Prompt:
        pace, tokens = self._note_first(seq), seq.num_tokens - seq.num_computed
        if pace.first_s is not None:
            return Prompt(STARTED, pace.first_s + seq.num_output * pace.tpot_s - now, tokens)
        if not seq.num_computed:
            tokens = max(1, round(tokens * self._fresh_share))
        return Prompt(seq.order[0], pace.due_s - now, tokens)

    def _sizes(self, decodes: list[Sequence], first: Sequence, most: int) -> tuple[tuple[int, float], ...]:
        """Prompt tokens that a step may take, and what it would last."""
        num, context = len(decodes), sum(len(seq.token_ids) for seq in decodes)
        if not self._cost.is_known:
            return ((0, 1e-3), (max(1, min(most, _FIRST_SIZE)), 1e-3))
        counts = [size for size in _SIZES if size < most]
        counts = [*counts[:: -(-len(counts) // _MOST_SIZES) or 1], max(most, 1)]
        sizes = [(0, self._cost.seconds(StepShape(num, num, num, context, context)) if num else 1e-6)]
        start = first.num_computed
        for count in counts:
            pairs = context + count * start + count * (count + 1) // 2
            seconds = self._cost.seconds(StepShape(num + 1, num + count, num + 1, context + start + count, pairs))
            sizes.append((count, max(seconds, sizes[-1][1])))
        return tuple(sizes)

    def _rate(self, otherwise: float) -> float:
        return self._computed / self._computing_s if self._computing_s > 0.0 else otherwise

    def _publish(
        self,
        view: StepView,
        order: tuple[int, ...],
        num_late: int,
        pending: list[Sequence],
        max_running: int,
        step_s: float,
        now: float,
    ) -> None:
        """What is late anyway does not stand before newcomers."""
        in_time = order[: len(order) - num_late]
        prompts = view.prompts
        self._door = _Door(
            tuple((prompts[i].rank, now + prompts[i].slack_s, float(prompts[i].tokens)) for i in in_time),
            sum(not pending[i].num_computed for i in in_time),
            max_running,
            view.rate,
            step_s,
        )

    def observe(self, plan: StepPlan, seconds: float, now: float) -> None:
        """A step took so long; its tokens came now."""
        self._committed_s = now
        if plan.entries and seconds > 0.0:
            self._cost.observe(self._shape_of(plan.entries), seconds)

    # --- answers -------------------------------------------------------------------------------------------------

    def started(self, seq: Sequence) -> None:
        """A prompt begins, and it is known how much of it no cache had."""
        self._fresh_share += 0.1 * (1.0 - seq.num_cached_tokens / seq.num_prompt - self._fresh_share)

    def finished(self, seq: Sequence, now: float) -> None:
        """An answer came to its own end."""
        pace, num_output = self._pace(seq), seq.num_output
        first_s = now if pace.first_s is None else pace.first_s
        slo = seq.owner.request.slo or self.held.slo
        arrived_s = seq.arrival_time if seq.owner.request.submitted_time is None else seq.owner.request.submitted_time
        ttft = slo.ttft_s is None or first_s - arrived_s < slo.ttft_s
        tpot = slo.tpot_s is None or num_output < 2 or (now - first_s) / (num_output - 1) < slo.tpot_s
        if self._envelope is not None:
            with self._lock:
                self._envelope.answered(arrived_s, ttft, tpot, seq.num_prompt, num_output)
        self.counters.classes.setdefault(seq.order[0], Attainment()).note(ttft, tpot)
        self._output += 0.05 * (num_output - self._output)
        if seq.first_scheduled_time is not None:
            held_s = now - seq.first_scheduled_time
            self._service_s += (0.1 if self._service_s else 1.0) * (held_s - self._service_s)

    # --- each second ---------------------------------------------------------------------------------------------

    def limits(self, now: float, otherwise: SchedulerLimits) -> SchedulerLimits:
        """Those of the row of the recipe that is in force from this step on."""
        envelope = self._envelope
        if envelope is None:
            return otherwise
        if now - self._row_s >= TICK_S:
            self._row_s = now
            with self._lock:
                view = envelope.view(now)
                choice = choose_row(view)
                envelope.follow(choice, now)
            self.decisions.add(now, view, choice)
            self.counters.row, self.counters.num_switches = envelope.row, envelope.num_switches
            self.counters.outside = envelope.outside
        return envelope.limits

    def _max_running(self, limits: SchedulerLimits) -> int:
        return max(1, min(limits.max_num_seqs, self._cap))

    def _largest_batch(self, context: float, most: int) -> int:
        """Sequences of so much context that can all have a token within the TPOT target of the agreement.

        A request's own, tighter target has no say here: it could keep all others waiting.
        """
        tpot_s = self.held.slo.tpot_s
        if tpot_s is None or not self._cost.is_known:
            return most
        allowed_s = MARGIN * tpot_s

        def seconds(num: int) -> float:
            return self._cost.seconds(StepShape(num, num, num, num * context, num * context))

        found = bisect_right(range(1, most + 1), allowed_s, key=seconds)
        return found or most  # none: it cannot be held at all, and a small batch would only be slow
