"""Tiers under everything at once: preemption, n, chunks, windows, drafts, aborts, a disk that is late, full or forgets,
and restarts. Tokens are those of a lone run without any cache."""

from __future__ import annotations

from engine_support import AlwaysDraft, Harness, scaled
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from test_scheduler_state import VOCABULARY, SchedulerMachine, assert_outputs, parrot
from tier_support import Attic, fixed_cost, tiers

from setpoint.runtime.fake import fake_info


class TieredMachine(SchedulerMachine):
    """Everything that `SchedulerMachine` does, over a pool that is too small and tiers that are not."""

    @initialize(
        num_blocks=st.integers(7, 11),
        windows=st.sampled_from([(None,), (None, 6), (5,), (None, 1, 9)]),
        budget=st.sampled_from([3, 8, 64]),
        max_drafts=st.sampled_from([0, 3]),
        host_blocks=st.sampled_from([0, 3, 40]),
        delay=st.sampled_from([None, 0, 0, 2]),
        blocks_per_step=st.sampled_from([0.1, 2.0, 100.0]),
        compute_s_per_token=st.sampled_from([0.2, 2.0]),
    )
    def build(  # type: ignore[override]
        self,
        num_blocks: int,
        windows: tuple[int | None, ...],
        budget: int,
        max_drafts: int,
        host_blocks: int,
        delay: int | None,
        blocks_per_step: float,
        compute_s_per_token: float,
    ) -> None:
        self.info = fake_info(
            vocab_size=VOCABULARY, num_blocks=num_blocks, block_size=4, max_model_len=28, windows=windows
        )
        self.disk = None if delay is None else Attic(delay)
        self.host_blocks = host_blocks
        self.cost = fixed_cost(self.info, blocks_per_step=blocks_per_step, compute_s_per_token=compute_s_per_token)
        self.limits = {
            "max_drafts": max_drafts,
            "max_num_batched_tokens": budget,
            "max_num_seqs": 6,
            "max_num_queued_reqs": 5,
        }
        self.start()

    def start(self) -> None:
        self.harness = Harness(
            self.info,
            speculator=AlwaysDraft(parrot) if self.limits["max_drafts"] else None,
            lower=tiers(self.info, host_blocks=self.host_blocks, disk=self.disk, cost=self.cost),
            **self.limits,
        )

    @precondition(lambda self: self.requests)
    @rule()
    def restart(self) -> None:
        """A new process: only the disk is what it was."""
        self.harness.run()
        assert_outputs(self.harness, self.requests)
        for _ in range(200):
            if not self.harness.scheduler.num_unsaved or self.disk is None or not self.disk.takes_more:
                break
            self.harness.step()
        self.requests = []
        self.start()

    @precondition(lambda self: self.disk is not None and self.disk.records)
    @rule(which=st.integers(0, 63))
    def forget(self, which: int) -> None:
        assert self.disk is not None
        names = sorted(self.disk.records)
        del self.disk.records[names[which % len(names)]]

    @precondition(lambda self: self.disk is not None)
    @rule(full=st.booleans())
    def fill_the_disk(self, full: bool) -> None:
        assert self.disk is not None
        self.disk.takes_more = not full


TieredMachine.TestCase.settings = settings(max_examples=scaled(40), stateful_step_count=40, deadline=None)
test_tiers_never_change_a_token = TieredMachine.TestCase
