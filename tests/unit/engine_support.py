"""Drives a scheduler with a FakeRunner, checking every invariant after every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import settings

from setpoint.engine.events import Event
from setpoint.engine.lower_tiers import LowerTiers
from setpoint.engine.plan import RunnerInfo, StepPlan
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.scheduler import DraftPlanner, Scheduler, SchedulerLimits
from setpoint.engine.sequence import Sequence as EngineSequence
from setpoint.engine.stats import SpeculationCounters
from setpoint.runtime.fake import FakeRunner, fake_info


def scaled(examples: int) -> int:
    """So many examples by default, a hundred times as many in the nightly profile."""
    return examples * max(1, settings().max_examples // 100)


def request(name: str, prompt: Sequence[int], **fields: Any) -> Request:
    """Fields of Request or SamplingParams by name; seeded, so that a solo run can repeat it."""
    own = {key: fields.pop(key) for key in ("priority", "cache_salt", "tenant", "eos_token_ids") if key in fields}
    fields.setdefault("seed", 1)
    return Request(name, list(prompt), SamplingParams(**fields), **own)


class AlwaysDraft:
    """Drafts as much as it may, whatever it costs; `propose(token_ids, max_drafts)` guesses."""

    def __init__(self, propose: Callable[[list[int], int], list[int]]) -> None:
        self.propose = propose
        self.counters = SpeculationCounters()

    def draft(self, decodes: list[EngineSequence], num_prefill: int, room: int, max_drafts: int) -> None:
        for seq in decodes:
            most = min(max_drafts, room, seq.max_tokens - seq.num_output - 1)
            seq.drafts = self.propose(seq.token_ids, most)[:most] if most > 0 else []
            room -= len(seq.drafts)

    def verified(self, seq: EngineSequence, num_drafts: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= num_drafts

    def learn(self, num_tokens: int, num_prefill: int, seconds: float) -> None:
        assert 0 <= num_prefill <= num_tokens

    def finished(self, seq: EngineSequence) -> None:
        assert not seq.drafts

    def close(self) -> None:
        pass


_SOLO: dict[tuple[str, str, str], dict[tuple[str, int], list[int]]] = {}


class Harness:
    """One scheduler and one runner; time is the number of steps."""

    def __init__(
        self,
        info: RunnerInfo | None = None,
        *,
        speculator: DraftPlanner | None = None,
        prefix_caching: bool = True,
        next_token: Callable[[list[int]], int] | None = None,
        lower: LowerTiers | None = None,
        **limits: int,
    ) -> None:
        self.info = info or fake_info(num_blocks=64, block_size=4, max_model_len=128)
        self.runner = FakeRunner(self.info, next_token)
        self.scheduler = Scheduler(
            self.info,
            SchedulerLimits(**limits),
            enable_prefix_caching=prefix_caching,
            speculator=speculator,
            lower=lower,
        )
        self.now = 0.0
        self.step_s = 0.0 if speculator is None else 0.25  # of a plan's execution
        self.events: list[Event] = []
        self.plans: list[StepPlan] = []

    def add(self, item: Request) -> None:
        self.scheduler.add(item, self.now)
        self.scheduler.check_integrity()

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.events += self.scheduler.abort(request_id, index, self.now)
        self.scheduler.check_integrity()

    def step(self, between: Callable[[], None] | None = None) -> StepPlan:
        """schedule, execute, commit; `between` runs while the plan is out."""
        self.now += 1.0
        waiting = [seq for seq in self.scheduler.waiting if seq.index == 0 and seq.first_scheduled_time is None]
        plan = self.scheduler.schedule(self.now)
        self._check_order(waiting)
        self.scheduler.check_integrity()
        result = self.runner.execute(plan)
        if between is not None:
            between()
        self.events += self.scheduler.commit(plan, result, self.now + self.step_s)
        self.scheduler.check_integrity()
        self._poison_blank_blocks()
        self.plans.append(plan)
        return plan

    def run(self, max_steps: int = 2000) -> dict[tuple[str, int], list[int]]:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                self.check_empty()
                return self.outputs()
            self.step()
        raise AssertionError(f"work left after {max_steps} steps")

    def check_empty(self) -> None:
        assert [pool.num_used for pool in self.scheduler.kv.pools] == [0] * len(self.scheduler.kv.pools)
        assert (self.scheduler.queue.num_requests, self.scheduler.queue.num_tokens) == (0, 0)
        assert not self.scheduler.running
        assert not self.scheduler.waiting

    def _check_order(self, waiting: Sequence[Any]) -> None:
        """Nobody starts before a request that is ahead of it, unless that one waits for the disk."""
        started = [seq.order for seq in waiting if seq.first_scheduled_time is not None]
        still = [seq for seq in waiting if seq.first_scheduled_time is None and seq in self.scheduler.waiting]
        left = [seq.order for seq in still if seq.fetch is None]
        assert not started or not left or max(started) < min(left)

    def _poison_blank_blocks(self) -> None:
        """What is neither used nor cached must never be read again."""
        for group, pool in enumerate(self.scheduler.kv.pools):
            published = pool.published()
            for block in range(pool.num_blocks):
                if pool.is_free(block) and block not in published:
                    self.runner.poison(group, block)

    def outputs(self) -> dict[tuple[str, int], list[int]]:
        """Tokens per (request, index); raises what a request failed with."""
        tokens: dict[tuple[str, int], list[int]] = {}
        for event in self.events:
            if event.error is not None:
                raise event.error
            tokens.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        return tokens

    def last(self, name: str, index: int = 0) -> Event:
        return [event for event in self.events if (event.request_id, event.index) == (name, index)][-1]


def solo(item: Request, info: RunnerInfo) -> dict[tuple[str, int], list[int]]:
    """What the request generates alone, in one chunk, in a pool where nothing is ever short, without a cache."""
    key = (repr(item), repr(item.params.bad_words_token_ids), repr(info))
    if key not in _SOLO:
        _SOLO[key] = _solo(item, info)
    return _SOLO[key]


def _solo(item: Request, info: RunnerInfo) -> dict[tuple[str, int], list[int]]:
    roomy = fake_info(
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        num_blocks=item.params.n * -(-info.max_model_len // info.block_size),
        block_size=info.block_size,
        windows=[group.window for group in info.kv_groups],
    )
    harness = Harness(roomy, prefix_caching=False, max_num_batched_tokens=1 << 20)
    harness.add(item)
    return harness.run()
