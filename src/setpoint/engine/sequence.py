"""One generation in a request: its tokens, how far they are computed, and the KV blocks that hold them."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from setpoint.engine.diagnosis import Divergence
from setpoint.engine.events import FinishReason, TokenLogprob
from setpoint.engine.lower_tiers import Fetch
from setpoint.engine.request import Request
from setpoint.engine.row_state import RowState
from setpoint.engine.sessions import Session
from setpoint.engine.timeline import Timeline

if TYPE_CHECKING:
    from setpoint.engine.pacer import Pace
    from setpoint.engine.speculation.speculator import SequenceRecord

MAX_JUMP = 128  # tokens that a grammar may force at once: bounds what one sequence does between two steps


class SequenceStatus(Enum):
    WAITING = "waiting"  # holds no blocks; never ran, or was preempted
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class Restore:
    """Blocks that a running sequence has, but not yet their bytes. Until all have come, nothing counts as computed."""

    num_tokens: int  # computed, when all have come
    num_restored: int  # tokens of them that were not in the pool
    pending: deque[tuple[int, int, bytes]]  # (logical block, group, bytes)


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A request and its `params.n` sequences. They share the prompt's blocks, not their state."""

    request: Request
    arrival_time: float
    root_key: bytes  # of this tenant and salt in the prefix tree
    queued: bool = True  # counted in the bounded queue: no sequence of it ever ran
    session: Session | None = None
    divergence: Divergence | None = None
    leader: Sequence | None = None  # computes the prompt while its siblings wait for the cached prefix
    unfinished: list[Sequence] = field(default_factory=list)


class Sequence:
    """`token_ids` is prompt then output. Positions below `num_computed` have their KV in `block_tables`.

    A block table maps logical block -> block id of one KV group, -1 where it fell out of the window. Tables only grow
    at the end (and turn to -1 at the front) until the blocks are released; as arrays, a runner copies them at once.
    """

    __slots__ = (
        "arrival_time",
        "block_keys",
        "block_tables",
        "draft_states",
        "drafts",
        "fetch",
        "first_live",
        "first_scheduled_time",
        "index",
        "max_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_published",
        "num_reported",
        "order",
        "owner",
        "pace",
        "params",
        "prompt_logprobs",
        "restore",
        "row_state",
        "seq_id",
        "speculation",
        "status",
        "stop_ids",
        "timeline",
        "token_ids",
    )

    def __init__(
        self, seq_id: int, owner: ActiveRequest, index: int, *, arrival: int, seed: int, num_groups: int, max_len: int
    ) -> None:
        request = owner.request
        self.seq_id = seq_id
        self.owner = owner
        self.params = request.params
        self.index = index
        self.order = (request.priority, arrival, index)  # lower is served first, higher is preempted first
        self.status = SequenceStatus.WAITING
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_computed = 0
        self.num_reported = self.num_prompt  # of token_ids: what events have told, the prompt included
        self.max_tokens = request.params.max_tokens or max_len - self.num_prompt  # validated against max_len
        self.stop_ids = request.stop_ids
        self.row_state = RowState(
            request.params, seed=seed, prompt=self.token_ids, stop_ids=self.stop_ids, grammar=request.grammar
        )
        self.drafts: list[int] = []  # to be verified in the step under way
        self.draft_states: dict[str, object] = {}  # by drafter: what each notes of it
        self.speculation: SequenceRecord | None = None  # how its drafts fare; the scheduler never looks inside
        self.pace: Pace | None = None  # its deadlines, where the engine holds an SLA
        self.block_tables = tuple(array("i") for _ in range(num_groups))
        self.first_live = [0] * num_groups  # per group: logical blocks below it are -1
        self.block_keys: list[bytes] = []  # prefix-tree keys of the first full blocks of token_ids
        self.num_published = 0
        self.fetch: Fetch | None = None  # while it waits for blocks that are read from disk
        self.restore: Restore | None = None  # while its blocks are filled from lower tiers
        # One entry per scored prompt token; the first has no context. Index 0 scores for all its siblings.
        scores = request.params.prompt_logprobs is not None and index == 0
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if scores else None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.arrival_time = owner.arrival_time
        self.first_scheduled_time: float | None = None
        self.timeline = Timeline()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def state(self) -> str:
        """Where a request stands, for the abort counters."""
        if self.status is SequenceStatus.WAITING:
            return "preempted" if self.num_preemptions else "waiting"
        return "prefill" if self.num_computed < self.num_prompt else "decode"

    @property
    def max_cached(self) -> int:
        """Most tokens that may come from the prefix cache: one must be computed, and every prompt token to score."""
        if self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt:
            return len(self.prompt_logprobs) - 1
        return self.num_tokens - 1

    def append(self, token: int) -> tuple[FinishReason, int | None] | None:
        """Take a generated token; returns (finish reason, stop reason) when it is the last one."""
        self.token_ids.append(token)
        self.row_state.append(token)
        num_output = len(self.token_ids) - self.num_prompt
        if token in self.stop_ids and num_output > self.params.min_tokens:
            is_eos = token in self.owner.request.eos_token_ids and not self.params.ignore_eos
            return "stop", None if is_eos else token
        if self.row_state.is_finished(num_output):
            return "stop", None
        return ("length", None) if num_output >= self.max_tokens else None

    def jump(self) -> tuple[FinishReason, int | None] | None:
        """Append the tokens that are the only ones possible, as drawing them one by one would; returns as `append`."""
        for _ in range(MAX_JUMP):
            token = self.row_state.forced(self.num_output)
            if token is None:
                break
            finish = self.append(token)
            self.timeline.num_forced += 1
            if finish is not None:
                return finish
        return None

    def take_unreported(self) -> tuple[int, ...]:
        """The generated tokens that no event has told yet."""
        tokens = tuple(self.token_ids[self.num_reported :])
        self.num_reported += len(tokens)
        return tokens
