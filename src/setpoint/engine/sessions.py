"""Sessions: which prefixes an agent will come back to after its tools have run, and for how long that is believed.

A session remembers the last sequences of its requests. Their blocks are evicted after all others: a wish, not a claim,
so a session that expires, is deleted or goes over its tenant's share loses speed and nothing else.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from setpoint.engine.diagnosis import Divergence, common_length, diagnose

MAX_BRANCHES = 4  # an agent and some helpers may share a session
MAX_SESSIONS = 1024  # of a tenant
MAX_TOKENS = 1 << 22  # that the sessions of a tenant remember

SessionName = tuple[str, str]  # (tenant, session_id)
Keys = list[bytes]  # of a sequence's full blocks in the prefix tree
Protect = Callable[[Keys, int], None]  # (keys, how many of them are of the prompt)


@dataclass(slots=True, eq=False)
class Branch:
    token_ids: array[int]
    keys: Keys  # whose blocks are protected
    num_prompt_blocks: int  # of them; the next prompt may differ behind them


@dataclass(slots=True, eq=False)
class Session:
    name: SessionName
    salt: str
    last_use: float
    num_active: int = 0  # requests under way
    branches: list[Branch] = field(default_factory=list)  # the most recent last
    is_closed: bool = False


@dataclass(slots=True)
class _Tenant:
    sessions: OrderedDict[SessionName, Session] = field(default_factory=OrderedDict)  # least recently used first
    num_tokens: int = 0
    num_protected: int = 0  # blocks


@dataclass(slots=True)
class SessionLimits:
    """`quota_blocks` are those that the sessions of one tenant may protect together."""

    ttl_s: float = 600.0
    quota_blocks: int = 0


class Sessions:
    """Belongs to the thread that schedules, but for `delete`."""

    def __init__(self, limits: SessionLimits, protect: Protect, unprotect: Protect, block_size: int) -> None:
        self.limits = limits
        self.num_expired = 0
        self.num_over_budget = 0  # sessions that lost their protection to others of their tenant
        self._protect = protect
        self._unprotect = unprotect
        self._block_size = block_size
        self._sessions: OrderedDict[SessionName, Session] = OrderedDict()  # least recently used first
        self._tenants: dict[str, _Tenant] = {}
        self._lock = threading.Lock()
        self._deleted: set[SessionName] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def delete(self, tenant: str, session_id: str) -> bool:
        """From any thread: whether there was such a session. It is gone at the next step."""
        name = (tenant, session_id)
        with self._lock:
            if name not in self._sessions or name in self._deleted:
                return False
            self._deleted.add(name)
        return True

    def open(self, tenant: str, session_id: str, salt: str, now: float) -> Session:
        """The session of a request that begins; `close` must follow."""
        self.expire(now)
        name = (tenant, session_id)
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = Session(name, salt, now)
            self._tenants.setdefault(tenant, _Tenant()).sessions[name] = session
        self._use(session, now)
        session.num_active += 1
        self._keep_within_limits(tenant)
        return session

    def diagnose(self, session: Session, salt: str, prompt: Sequence[int], num_cached: int) -> Divergence | None:
        """Why a prompt found less than the session had; judged by the sequence that it has most in common with."""
        if not session.branches or session.is_closed:
            return None
        ids = array("i", prompt)
        nearest = max(session.branches, key=lambda branch: common_length(branch.token_ids, ids))
        found = diagnose(nearest.token_ids, ids, num_cached, self._block_size)
        if found is not None and salt != session.salt:  # whose text it is, is not known then
            return Divergence("salt", 0, found.num_lost_tokens)
        return found

    def close(
        self, session: Session, salt: str, token_ids: Sequence[int], num_prompt: int, keys: Sequence[bytes], now: float
    ) -> None:
        """A request ended with this sequence, whose computed full blocks have these keys; none = it never ran."""
        session.num_active -= 1
        if session.is_closed:
            return
        self._use(session, now)
        if not keys:
            return
        if salt != session.salt:
            self._forget(session)
            session.salt = salt
        kept = list(keys[: self.limits.quota_blocks])
        branch = Branch(array("i", token_ids), kept, min((num_prompt - 1) // self._block_size, len(kept)))
        replaced = self._continued(session, branch)
        self._add(session, branch)
        if replaced is not None:
            self._remove(session, replaced)
        self._keep_within_limits(session.name[0])

    @staticmethod
    def _continued(session: Session, branch: Branch) -> Branch | None:
        """The branch that this one goes on from, or the oldest where there are too many."""
        for other in reversed(session.branches):
            if common_length(other.token_ids, branch.token_ids) * 2 >= len(other.token_ids):
                return other
        return session.branches[0] if len(session.branches) >= MAX_BRANCHES else None

    def expire(self, now: float) -> None:
        """Drop what was deleted, and what was not used for too long."""
        if self._deleted:
            with self._lock:
                deleted, self._deleted = self._deleted, set()
            for name in deleted:
                if name in self._sessions:
                    self._drop(self._sessions[name])
        while self._sessions:
            session = next(iter(self._sessions.values()))
            if now - session.last_use < self.limits.ttl_s:
                return
            if session.num_active:
                self._use(session, now)  # looked at again in a while
            else:
                self.num_expired += 1
                self._drop(session)

    def _use(self, session: Session, now: float) -> None:
        session.last_use = now
        self._sessions.move_to_end(session.name)
        self._tenants[session.name[0]].sessions.move_to_end(session.name)

    def _keep_within_limits(self, name: str) -> None:
        tenant = self._tenants[name]
        while len(tenant.sessions) > MAX_SESSIONS:
            self._drop(next(iter(tenant.sessions.values())))
        if tenant.num_protected <= self.limits.quota_blocks and tenant.num_tokens <= MAX_TOKENS:
            return
        for session in list(tenant.sessions.values()):
            self.num_over_budget += bool(session.branches)
            for branch in list(session.branches):
                self._remove(session, branch)
                if tenant.num_protected <= self.limits.quota_blocks and tenant.num_tokens <= MAX_TOKENS:
                    return

    def _add(self, session: Session, branch: Branch) -> None:
        tenant = self._tenants[session.name[0]]
        tenant.num_tokens += len(branch.token_ids)
        tenant.num_protected += len(branch.keys)
        session.branches.append(branch)
        self._protect(branch.keys, branch.num_prompt_blocks)

    def _remove(self, session: Session, branch: Branch) -> None:
        tenant = self._tenants[session.name[0]]
        tenant.num_tokens -= len(branch.token_ids)
        tenant.num_protected -= len(branch.keys)
        session.branches.remove(branch)
        self._unprotect(branch.keys, branch.num_prompt_blocks)

    def _forget(self, session: Session) -> None:
        for branch in list(session.branches):
            self._remove(session, branch)

    def _drop(self, session: Session) -> None:
        self._forget(session)
        session.is_closed = True
        del self._sessions[session.name]
        tenant = self._tenants[session.name[0]]
        del tenant.sessions[session.name]
        if not tenant.sessions:
            del self._tenants[session.name[0]]

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant is broken. For tests."""
        if {name for tenant in self._tenants.values() for name in tenant.sessions} != set(self._sessions):
            raise AssertionError("sessions and tenants disagree")
        for tenant in self._tenants.values():
            branches = [branch for session in tenant.sessions.values() for branch in session.branches]
            if tenant.num_protected != sum(len(branch.keys) for branch in branches):
                raise AssertionError("a tenant has lost count of what its sessions protect")
            if tenant.num_protected > self.limits.quota_blocks:
                raise AssertionError("a tenant's sessions protect more than its share")
