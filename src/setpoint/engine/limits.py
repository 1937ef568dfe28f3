"""What a scheduler may do at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The first four are hot: assign a new value to `scheduler.limits` between any two steps."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_drafts: int = 0  # per sequence and step
    jump_forward: bool = True  # tokens that a grammar forces are taken without a forward pass of their own
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 1 << 20
    session_ttl_s: float = 600.0  # since the last request
    session_share: float = 0.5  # of the KV cache that the sessions of a tenant may protect
