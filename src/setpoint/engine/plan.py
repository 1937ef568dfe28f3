"""The contract between scheduler and runner: `execute(StepPlan) -> StepResult`.

A plan is all that a backend sees. It knows nothing of requests, prompts, phases or text; the scheduler knows
nothing of tensors. Block ids index the pool of one KV group; a block holds `block_size` consecutive tokens.

Nobody changes a plan or a result, but for masks that come late. The records made for every token of a step do not say
`frozen` all the same: that would make them three times as slow to build, and a step of 32 sequences 1.6 times as slow
to plan and commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from setpoint.engine.late_masks import LateMasks


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table: all full-attention layers, or all layers of one sliding window."""

    num_blocks: int
    window: int | None = None  # tokens a query sees, itself included; None = all of them
    block_bytes: int = 0  # of one block over all layers of the group, as `KVSave` gives them out; 0 = unknown


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What the scheduler must know of a backend."""

    vocab_size: int  # width of the logits; every token id of a client must be below it
    max_model_len: int
    kv_groups: tuple[KVGroup, ...]
    block_size: int = 16
    late_masks: bool = False  # it leaves a CPU idle: masks may be computed beside a step (`PlanEntry.late_masks`)


@dataclass(slots=True)
class RowSampling:
    """How to choose one token from one row of logits. Plain values only; already validated.

    Order of application: mask, banned/allowed ids, bias, repetition, frequency and presence penalties, temperature,
    min_p, top_k, top_p, draw. `temperature == 0` is greedy (ties go to the lowest id). The draw depends on
    (seed, position) alone. Penalty state: `penalty_ids[i]` occurred `penalty_counts[i]` times in the output
    (0 = in the prompt only); the repetition penalty applies to all of them, the other two where count > 0.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # unsigned 64 bit
    position: int = 0  # absolute position of the token being drawn
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_ids: Sequence[int] = ()
    penalty_counts: Sequence[int] = ()
    bias_ids: Sequence[int] = ()
    bias_values: Sequence[float] = ()
    banned_ids: Sequence[int] = ()
    allowed_ids: Sequence[int] | None = None  # None = all
    mask: bytes | None = None  # bit i of byte i // 8: token i is allowed; whole words of 4 bytes; None = all


@dataclass(slots=True)
class LogitsRow:
    """One position whose logits are wanted.

    `sampling` set: draw a token. `target` set: score that token instead (prompt logprobs).
    `num_logprobs` = how many of the most likely tokens to report beside it, from the raw logits; None = no logprobs.
    """

    offset: int  # index into PlanEntry.token_ids
    sampling: RowSampling | None = None
    target: int | None = None
    num_logprobs: int | None = None


@dataclass(slots=True)
class PlanEntry:
    seq_id: int
    token_ids: Sequence[int]  # tokens to compute in this step; the last `num_drafts` of them are guesses
    start: int  # absolute position of token_ids[0]
    block_tables: tuple[Sequence[int], ...]  # per KV group: logical block -> block id, -1 where out of the window
    rows: Sequence[LogitsRow] = ()  # ascending offsets
    num_drafts: int = 0
    late_masks: LateMasks | None = (
        None  # to be computed before anything is drawn; sets masks, or says why there are none
    )


@dataclass(slots=True)
class KVSave:
    """Read the bytes of a block, before anything of the step is written. They are filed under `key` and `group`."""

    group: int
    block: int
    key: bytes
    parent: bytes
    tokens: bytes  # the block's token ids, packed


@dataclass(slots=True)
class KVRestore:
    """Write bytes that a `KVSave` read, before anything of the step is computed."""

    seq_id: int
    group: int
    block: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class StepPlan:
    """In this order: `saves`, `restores`, `entries`."""

    entries: Sequence[PlanEntry]
    saves: Sequence[KVSave] = ()
    restores: Sequence[KVRestore] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)


@dataclass(slots=True)
class RowResult:
    token_id: int  # drawn, or the target
    logprob: float | None = None  # of token_id, from the raw logits; None when not asked for
    rank: int | None = None  # 1 = most likely
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


@dataclass(slots=True)
class EntryResult:
    """Rows in the order of the entry's `rows`; `error` set means: this entry failed, its neighbours did not."""

    rows: Sequence[RowResult] = ()
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    entries: Sequence[EntryResult] = field(default_factory=tuple)  # same order as the plan
    saved: Sequence[bytes | None] = ()  # per `KVSave` of the plan; None = not read
    unrestored: frozenset[int] = frozenset()  # seq_ids whose blocks could not be written: nothing of theirs is computed
    moving_s: float = 0.0  # what saves and restores took


class Runner(Protocol):
    """A backend. `execute` is called from one thread; it may raise, which concerns the whole step.

    Executing the same entry twice is harmless: it rewrites the same KV bytes (law 1).
    """

    @property
    def info(self) -> RunnerInfo: ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises before any entry is computed when a block cannot be restored."""
        ...

    def close(self) -> None: ...
