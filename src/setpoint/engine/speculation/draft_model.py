"""Drafts from a smaller model with the same vocabulary, which has a runner and KV blocks of its own.

Its cache may lag behind the sequence: it computes what it missed before it guesses, in steps of bounded size, and
takes back what it computed for guesses that turned out wrong. It draws with the target's seed and position, so that
at a temperature, too, both tend to draw the same token.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from setpoint.engine.kv_cache import KVCache
from setpoint.engine.plan import LogitsRow, PlanEntry, Runner, RunnerInfo, StepPlan
from setpoint.engine.sequence import Sequence, SequenceStatus
from setpoint.engine.speculation.drafter import Draft

CATCH_UP_TOKENS = 512  # of all sequences in a call
STRENGTH = 32  # a model's guesses do not tell how sure they are


@dataclass(slots=True)
class _Shadow:
    """A sequence as the draft model has it: `twin` holds its blocks and how far they are computed."""

    target: Sequence
    twin: Sequence
    num_known: int = 0  # computed tokens that were no guesses
    guesses: list[int] = field(default_factory=list)  # what was computed behind them


class DraftModel:
    name = "draft"

    def __init__(self, runner: Runner, info: RunnerInfo, *, cost_share: float) -> None:
        """`cost_share`: what a step of it is expected to cost, as a share of the target's."""
        self.cost_share = cost_share
        self._runner = runner
        self._max_len = info.max_model_len
        self._kv = KVCache(info, prefix_caching=False)
        self._shadows: dict[int, _Shadow] = {}

    def close(self) -> None:
        self._runner.close()

    def num_missing(self, seq: Sequence) -> int:
        """Tokens that it has to compute before its first guess."""
        shadow = self._shadows.get(seq.seq_id)
        return seq.num_tokens - (shadow.twin.num_computed if shadow is not None else 0)

    def propose(self, seqs: abc.Sequence[Sequence], max_drafts: int) -> list[Draft | None]:
        self._drop_ended()
        room = CATCH_UP_TOKENS
        chains: dict[int, list[int]] = {}
        entries: list[PlanEntry] = []
        for seq in seqs:
            shadow = self._agreed(seq)
            num_new = min(seq.num_tokens - shadow.twin.num_computed, room)
            entry = self._entry(shadow, num_new, max_drafts)
            if entry is None:
                continue
            room -= num_new
            entries.append(entry)
            if entry.rows:
                chains[seq.seq_id] = []
        for length in range(1, max_drafts + 1):
            if not entries:
                break
            self._execute(entries, chains)
            if length < max_drafts:
                entries = [self._next(self._shadows[seq_id], chain) for seq_id, chain in chains.items()]
        for seq_id, chain in chains.items():
            self._shadows[seq_id].guesses = chain[: max_drafts - 1]
        found = (chains.get(seq.seq_id) for seq in seqs)
        return [Draft(chain, STRENGTH) if chain else None for chain in found]

    def finished(self, seq: Sequence) -> None:
        pass  # its blocks go with the next call, as those of sequences that were aborted

    def _drop_ended(self) -> None:
        for seq_id, shadow in list(self._shadows.items()):
            if shadow.target.status is SequenceStatus.FINISHED:
                self._drop(seq_id)

    def _drop(self, seq_id: int) -> None:
        self._kv.release(self._shadows.pop(seq_id).twin)

    def _agreed(self, seq: Sequence) -> _Shadow:
        """The shadow, taken back to what is computed and true."""
        shadow = self._shadows.get(seq.seq_id)
        if shadow is None:
            twin = Sequence(
                seq.seq_id,
                seq.owner,
                seq.index,
                arrival=0,
                seed=0,
                num_groups=len(self._kv.pools),
                max_len=self._max_len,
            )
            shadow = self._shadows[seq.seq_id] = _Shadow(seq, twin)
        known = shadow.num_known
        for guess in shadow.guesses:
            if known >= seq.num_tokens - 1 or seq.token_ids[known] != guess:
                break
            known += 1
        known = min(known, seq.num_tokens - 1)
        shadow.num_known, shadow.guesses = known, []
        shadow.twin.num_computed = max(0, known - 1)  # should a step fail, its tokens are asked for again
        self._kv.settle(shadow.twin)
        shadow.twin.num_computed = known
        return shadow

    def _entry(self, shadow: _Shadow, num_new: int, max_drafts: int) -> PlanEntry | None:
        """The next tokens that are missing; with a row if they are the last ones. None where there is no room."""
        twin, seq = shadow.twin, shadow.target
        start = twin.num_computed
        reaches_end = start + num_new == seq.num_tokens
        end = start + num_new + (max_drafts - 1 if reaches_end else 0)
        if num_new <= 0 or end > self._max_len:
            return None
        if self._kv.grow(twin, end) < end:
            self._drop(seq.seq_id)
            return None
        twin.num_computed = shadow.num_known = start + num_new
        rows = (self._row(seq, [], num_new - 1),) if reaches_end else ()
        return PlanEntry(seq.seq_id, seq.token_ids[start : start + num_new], start, twin.block_tables, rows)

    def _next(self, shadow: _Shadow, chain: list[int]) -> PlanEntry:
        seq, twin = shadow.target, shadow.twin
        start = twin.num_computed
        twin.num_computed += 1
        return PlanEntry(seq.seq_id, chain[-1:], start, twin.block_tables, (self._row(seq, chain, 0),))

    @staticmethod
    def _row(seq: Sequence, chain: list[int], offset: int) -> LogitsRow:
        return LogitsRow(offset, seq.row_state.row(seq.token_ids, seq.num_prompt, chain))

    def _execute(self, entries: list[PlanEntry], chains: dict[int, list[int]]) -> None:
        result = self._runner.execute(StepPlan(entries))
        for entry, computed in zip(entries, result.entries, strict=True):
            if computed.error is not None:
                chains.pop(entry.seq_id, None)
                self._drop(entry.seq_id)
            elif entry.rows:
                chains[entry.seq_id].append(computed.rows[0].token_id)

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant is broken. For tests."""
        self._kv.check_integrity([shadow.twin for shadow in self._shadows.values()])
