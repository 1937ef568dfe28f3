"""What a step moves between the pool of KV blocks and the tiers below it: how much, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from setpoint.engine.kv_cache import KVCache
from setpoint.engine.plan import KVSave, StepPlan, StepResult
from setpoint.engine.restore_cost import ALONE_S, STALL_S
from setpoint.engine.roster import Roster
from setpoint.engine.sequence import SequenceStatus


class KVMoves:
    """Does nothing where nothing lies below the pool."""

    def __init__(self, kv: KVCache, roster: Roster) -> None:
        self._kv = kv
        self._roster = roster

    @property
    def num_unsaved(self) -> int:
        """Blocks of the pool that may not be on disk yet."""
        return 0 if self._kv.saves is None else self._kv.saves.num_behind

    def begin(self, num_tokens: int) -> int:
        """A step of at most so many tokens is planned; returns the bytes that it may restore."""
        lower, saves = self._kv.lower, self._kv.saves
        if lower is None or saves is None:
            return 0
        others = any(seq.restore is None for seq in self._roster.running)
        restore_bytes = lower.cost.restore_bytes_in(STALL_S if others else ALONE_S)
        lower.poll()
        saves.begin(num_tokens, restore_bytes, is_busy=bool(self._roster.sequences))
        return restore_bytes

    def end(self) -> Sequence[KVSave]:
        """What the step that was planned has to copy out of the pool."""
        return () if self._kv.saves is None else self._kv.saves.end()

    def file(self, plan: StepPlan, result: StepResult, num_tokens: int, seconds: float) -> None:
        """Take what was read from the pool, and start over the sequences whose blocks could not be written.

        Computing the step's `num_tokens` took `seconds`, moves not counted.
        """
        lower, saves = self._kv.lower, self._kv.saves
        if lower is None or saves is None:
            return
        saves.file(plan, result)
        for seq_id in result.unrestored:
            seq = self._roster.sequences.get(seq_id)
            if seq is not None and seq.status is SequenceStatus.RUNNING:
                self._roster.preempt(seq)
        if result.unrestored:
            lower.give_up()
        saved_bytes = sum(len(payload) for payload in result.saved if payload is not None)
        lower.cost.observe_moves(saved_bytes, sum(len(move.payload) for move in plan.restores), result.moving_s)
        lower.cost.observe_step(num_tokens, seconds)
