"""How many tokens to draft, for which sequence, guessed by whom: the choice that may not lose.

Each step the drafts are chosen that make most tokens a second, by two measured things: the probability that a drafted
token is right (`acceptance`) and what a step with that many more tokens costs (`verify_cost`). What came of earlier
choices corrects both (`calibration`): the best of many estimates is an estimate too high. Nothing drafted is always
among the choices, and where guesses do not pay for the looking up, few steps look up. A chain of guesses for each
sequence, no tree: the second best guess of a lookup is seldom right (`benchmarks/draft_trees.py`).
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass

from setpoint.engine.sequence import Sequence
from setpoint.engine.speculation.acceptance import Acceptance, Record
from setpoint.engine.speculation.calibration import Calibration
from setpoint.engine.speculation.draft_model import STRENGTH, DraftModel
from setpoint.engine.speculation.drafter import MAX_DRAFTS, Draft, Drafter
from setpoint.engine.speculation.verify_cost import VerifyCost
from setpoint.engine.stats import SpeculationCounters

_MIN_GAIN = 1.03  # tokens a second, against no drafts: what less promises is noise
_PLAIN_EVERY = 64  # one in so many drafted steps goes without drafts, to know what those cost
_DEAR_ROW = 0.8  # share of a token's cost from which on even guesses that are always right bring little
_TRY_EVERY = 16  # a likely guess that was declined so often is verified: the cost it is expected to have may be wrong
_LIKELY, _TRIED = 0.5, 2  # its probability at least, and how much of it
_MANY_TOKENS = 64
_WATCH_EVERY, _WATCH_DEAR_EVERY = 8, 16  # while looking up does not pay, one step in so many does it,
_AWAKE = 8  # and so many more after one that found drafts worth verifying: copies come in stretches
_FIRST_NET, _NET_STEP = (
    0.1,
    0.03,
)  # what looking up brings, as a share of a step: before anything is seen; weight of a step
_MOST_SAVED, _MOST_LOOKING = 0.5, 0.1  # that a single step counts for: one of a hundred is disturbed, or reads a prompt
_MODEL_RETRY_STEPS = 256  # a draft model that did not pay is asked again, for two tokens
_CATCH_UP_OVER = 64  # steps over which a draft model's prompt pays off


@dataclass(slots=True)
class _Choice:
    """What one sequence could draft: somebody's guess and how likely each of its tokens is right."""

    seq: Sequence
    drafter: int
    draft: Draft
    survival: list[float]


@dataclass(slots=True)
class SequenceRecord:
    """What is known of a sequence, besides the drafters' own notes."""

    records: list[Record]
    drafted_by: int = -1  # of the drafts under way


@dataclass(slots=True)
class _Step:
    """The step under way, as it was planned: sizes, and what they cost by the model of costs."""

    num_decodes: int
    rows: int  # without drafts
    seconds: float  # of the step without drafts
    plain_seconds: float  # of a step that decodes these sequences and nothing else
    rate: float  # tokens a second that drafts have to beat
    looking_seconds: float  # that the lookups took
    expected_tokens: float = 0.0
    expected_seconds: float = 0.0
    num_drafts: int = 0
    num_accepted: int = 0
    drafting_seconds: float = 0.0  # that the draft model took
    is_model: bool = False  # the drafts are the draft model's


class Speculator:
    """Belongs to the scheduler's thread. `lookups` cost next to nothing, so that they may guess just to be judged."""

    def __init__(
        self,
        lookups: abc.Sequence[Drafter],
        model: DraftModel | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.drafters: tuple[Drafter, ...] = (*lookups, *(() if model is None else (model,)))
        self.cost = VerifyCost()
        self.counters = SpeculationCounters(methods={drafter.name: [0, 0] for drafter in self.drafters})
        self._model, self._num_lookups, self._clock = model, len(lookups), clock
        self._model_share = 0.0 if model is None else model.cost_share
        self._acceptance = [Acceptance() for _ in self.drafters]
        self._step: _Step | None = None
        self._calibration, self._model_calibration = Calibration(), Calibration()
        self._net = _FIRST_NET  # time that looking up saves, less what it takes; as a share of a step
        self._num_steps = self._awake_until = 0
        self._steps_without_model = 0
        self._drafted_steps = 0
        self._declined = 0

    def draft(self, decodes: abc.Sequence[Sequence], num_prefill: int, room: int, max_drafts: int) -> None:
        """Give every sequence of `decodes` the drafts to verify in this step, beside `num_prefill` other tokens.

        At most `max_drafts` each, none beyond its own end, and `room` all together.
        """
        for seq in decodes:
            seq.drafts = []
        self._step = None
        limit = min(max_drafts, MAX_DRAFTS)
        if not decodes or limit < 1:
            return
        self._num_steps += 1
        is_awake = self._net > 0 or self._num_steps < self._awake_until
        is_watching = self._num_steps % _WATCH_EVERY == 0
        if self._model is None and not is_awake and not is_watching:
            return  # most steps of a text that repeats nothing: they must cost nothing
        row_cost = self._row_cost(len(decodes), num_prefill) if self.cost.is_known else 0.0
        choices, looking_seconds = [], 0.0
        is_watching &= row_cost <= _DEAR_ROW or self._num_steps % _WATCH_DEAR_EVERY == 0
        if is_awake or is_watching:
            began = self._clock()
            choices = self._look_up(decodes, limit, 0.5 * row_cost)
            looking_seconds = self._clock() - began
        if room > 0 and self.cost.is_known:
            self._choose(choices, decodes, num_prefill, room, limit, looking_seconds)
        if self._step is not None and self._step.expected_tokens:
            self._awake_until = self._num_steps + _AWAKE

    def _row_cost(self, num_decodes: int, num_prefill: int) -> float:
        """Of a further row in this step, as a share of what a token costs without drafts."""
        rows, more = num_decodes + num_prefill, 8
        added = (self.cost.seconds(rows + more) - self.cost.seconds(rows)) / more
        return added * num_decodes / self.cost.seconds(num_decodes)

    def _look_up(self, decodes: abc.Sequence[Sequence], limit: int, least: float) -> list[_Choice]:
        """The best guess for each sequence, up to where it is right with a probability of `least`.

        All of them are judged by what comes.
        """
        best: dict[int, _Choice] = {}
        for number, drafter in enumerate(self.drafters[: self._num_lookups]):
            acceptance = self._acceptance[number]
            for seq, draft in zip(decodes, drafter.propose(decodes, limit), strict=True):
                record = self._record(seq).records[number]
                acceptance.judge(record, seq)
                if draft is None:
                    continue
                acceptance.watch(record, seq, draft)
                survival = acceptance.survival(record, draft, least)
                known = best.get(seq.seq_id)
                if known is None or sum(survival) > sum(known.survival):
                    best[seq.seq_id] = _Choice(seq, number, draft, survival)
        return list(best.values())

    def _record(self, seq: Sequence) -> SequenceRecord:
        if seq.speculation is None:
            seq.speculation = SequenceRecord([Record() for _ in self.drafters])
        return seq.speculation

    def _choose(
        self,
        choices: list[_Choice],
        decodes: abc.Sequence[Sequence],
        num_prefill: int,
        room: int,
        limit: int,
        looking_seconds: float,
    ) -> None:
        """Whatever makes the best rate of tokens: no drafts, those looked up, or the model's.

        A step with prompts in it would take its time anyway: only what drafts add to it counts.
        """
        num_decodes, rows = len(decodes), len(decodes) + num_prefill
        plain = self.cost.seconds(num_decodes) * self._calibration.plain(num_decodes)
        rate = num_decodes / plain * _MIN_GAIN
        seconds = self.cost.seconds(rows) if num_prefill else plain
        self._step = step = _Step(num_decodes, rows, seconds, plain, rate, looking_seconds)
        lengths = self._best_lengths(choices, step, room) if choices else []
        model_length = 0 if self._model is None else self._best_model_length(decodes, step, room, limit)
        if not any(lengths) and not model_length:
            lengths = self._try_anyway(choices, room)
            if not any(lengths):
                return
        self._drafted_steps += 1
        if self._drafted_steps % _PLAIN_EVERY == 0:
            step.expected_tokens = 0.0
            return
        if model_length:
            choices = self._ask_model(decodes, model_length)
            lengths = [min(len(choice.draft.token_ids), _most(choice.seq)) for choice in choices]
        for choice, length in zip(choices, lengths, strict=True):
            choice.seq.drafts = choice.draft.token_ids[:length]
            self._record(choice.seq).drafted_by = choice.drafter
        step.num_drafts = sum(lengths)

    def _best_lengths(self, choices: list[_Choice], step: _Step, room: int) -> list[int]:
        """How much of each guess to verify; raises `step.rate` to what that promises.

        Tokens are taken in the order of their probability, which within a sequence only falls.
        """
        cost, rows, num_decodes = self.cost, step.rows, step.num_decodes
        before, honesty = cost.seconds(rows), self._calibration.drafted(num_decodes)
        least = 0.5 * num_decodes * (cost.seconds(rows + 1) - before) / step.plain_seconds
        ranked = sorted(
            (
                (probability, -position, index)
                for index, choice in enumerate(choices)
                for position, probability in enumerate(choice.survival[: _most(choice.seq)])
                if probability > least
            ),
            reverse=True,
        )
        best_count, tokens = 0, float(num_decodes)
        for count, (probability, _, _) in enumerate(ranked[:room], 1):
            tokens += probability
            seconds = step.plain_seconds + cost.seconds(rows + count) - before
            if honesty * tokens / seconds > step.rate:
                step.rate, best_count = honesty * tokens / seconds, count
                step.expected_tokens, step.expected_seconds = tokens, seconds
        lengths = [0] * len(choices)
        for _, _, index in ranked[:best_count]:
            lengths[index] += 1
        return lengths

    def _try_anyway(self, choices: list[_Choice], room: int) -> list[int]:
        """Nothing paid, by costs that may be outdated: now and then the likeliest guess is verified all the same."""
        likely = max(choices, key=lambda choice: choice.survival[0], default=None)
        if likely is None or likely.survival[0] < _LIKELY:
            return []
        self._declined += 1
        if self._declined % _TRY_EVERY:
            return []
        length = min(_TRIED, room, _most(likely.seq))
        return [length if choice is likely else 0 for choice in choices]

    def _best_model_length(self, decodes: abc.Sequence[Sequence], step: _Step, room: int, limit: int) -> int:
        """How many tokens to ask of the draft model for each sequence; 0 where that beats nothing."""
        assert self._model is not None
        number, num_decodes = self._num_lookups, step.num_decodes
        acceptance = self._acceptance[number]
        nothing = Draft([0] * limit, STRENGTH)
        survival = [0.0] * limit
        for seq in decodes:
            record = self._record(seq).records[number]
            acceptance.judge(record, seq)
            most = _most(seq)
            for position, probability in enumerate(acceptance.survival(record, nothing)[:most]):
                survival[position] += probability
        self._steps_without_model += 1
        if self._steps_without_model >= _MODEL_RETRY_STEPS and room >= 2 * num_decodes:
            step.expected_tokens = 0.0
            return min(2, limit)
        catch_up = sum(self._model.num_missing(seq) - 1 for seq in decodes)
        share = self._model_share
        to_catch_up = share * self.cost.seconds(catch_up) if catch_up > 0 else 0.0
        to_come = sum(map(_most, decodes)) + num_decodes  # tokens at most: the prompts pay off by their end or never
        best, tokens, before = 0, float(num_decodes), self.cost.seconds(step.rows)
        honesty = self._model_calibration.drafted(num_decodes)
        for length in range(1, min(limit, room // num_decodes) + 1):
            tokens += survival[length - 1]
            verify = step.plain_seconds + self.cost.seconds(step.rows + length * num_decodes) - before
            overhead = to_catch_up / max(1.0, min(_CATCH_UP_OVER, to_come / tokens))
            seconds = verify + overhead + length * share * step.plain_seconds
            if honesty * tokens / seconds > step.rate:
                step.rate, best = honesty * tokens / seconds, length
                step.expected_tokens, step.expected_seconds = tokens, seconds
        return best

    def _ask_model(self, decodes: abc.Sequence[Sequence], length: int) -> list[_Choice]:
        assert self._model is not None
        assert self._step is not None
        self._step.is_model = True
        number, began = self._num_lookups, self._clock()
        catch_up = sum(self._model.num_missing(seq) - 1 for seq in decodes)
        drafts = self._model.propose(decodes, length)
        seconds = self._step.drafting_seconds = self._clock() - began
        if catch_up == 0 and all(drafts):
            share = seconds / (length * self._step.plain_seconds)
            self._model_share += 0.1 * (min(share, 4.0) - self._model_share)
        self._steps_without_model = 0
        choices = []
        for seq, draft in zip(decodes, drafts, strict=True):
            if draft is not None:
                self._acceptance[number].watch(self._record(seq).records[number], seq, draft)
                choices.append(_Choice(seq, number, draft, []))
        return choices

    def verified(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        """So many of the sequence's drafts were verified, and the first so many of them are right."""
        if self._step is not None:
            self._step.num_accepted += num_accepted
        by = self._record(seq).drafted_by
        if by >= 0:
            totals = self.counters.methods[self.drafters[by].name]
            totals[0] += num_drafts
            totals[1] += num_accepted

    def learn(self, num_tokens: int, num_prefill: int, seconds: float) -> None:
        """A step of so many tokens, of which `num_prefill` belong to prompts, took so long, drafting included.

        A few tokens of a prompt cost less than as many decodes, which want logits; many of either cost the same.
        """
        step = self._step
        if step is not None:
            self._account(step, num_prefill, seconds)
            seconds -= step.drafting_seconds + step.looking_seconds
        if num_prefill == 0 or num_tokens > _MANY_TOKENS:
            self.cost.learn(num_tokens, seconds)

    def _account(self, step: _Step, num_prefill: int, seconds: float) -> None:
        """What the step's drafts brought, and whether they came up to what was expected."""
        saved = 0.0
        own = seconds - step.drafting_seconds - step.looking_seconds
        if step.num_drafts:
            gained = step.num_accepted * step.plain_seconds / step.num_decodes
            saved = gained - (own + step.drafting_seconds - step.seconds)
            if step.expected_tokens:
                tokens = (step.num_decodes + step.num_accepted) / step.expected_tokens
                took = (step.plain_seconds + own + step.drafting_seconds - step.seconds) / step.expected_seconds
                calibration = self._model_calibration if step.is_model else self._calibration
                calibration.learn_drafted(step.num_decodes, tokens, took)
        elif num_prefill == 0:
            self._calibration.learn_plain(step.num_decodes, own / step.plain_seconds)
        self.counters.saved_seconds += saved - step.looking_seconds
        if step.looking_seconds:
            share = min(max(saved / step.plain_seconds, -_MOST_SAVED), _MOST_SAVED)
            net = share - min(step.looking_seconds / step.plain_seconds, _MOST_LOOKING)
            self._net += _NET_STEP * (net - self._net)

    def finished(self, seq: Sequence) -> None:
        """A sequence came to its own end."""
        for drafter in self.drafters:
            drafter.finished(seq)

    def close(self) -> None:
        if self._model is not None:
            self._model.close()


def _most(seq: Sequence) -> int:
    """Drafts that can all be used: the token drawn after the last of them is the last one allowed."""
    return max(0, seq.max_tokens - seq.num_output - 1)
