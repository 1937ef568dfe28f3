"""Sessions keep prefixes for those who come back: while they last, within a share, and never more than a wish."""

from __future__ import annotations

from typing import Any

import pytest
from engine_support import Harness, request, scaled, solo
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tier_support import tiers

from setpoint.engine.diagnosis import EXCERPT_TOKENS, Divergence, common_length, diagnose
from setpoint.engine.request import Request
from setpoint.engine.sessions import MAX_BRANCHES, SessionLimits, Sessions
from setpoint.errors import RequestError
from setpoint.runtime.fake import fake_info

INFO = fake_info(num_blocks=16, block_size=4, max_model_len=64)
WINDOWED = fake_info(num_blocks=16, block_size=4, max_model_len=64, windows=(None, 6))
PROMPT = list(range(1, 18))


def item(name: str, prompt: list[int], session_id: str = "", **fields: Any) -> Request:
    made = request(name, prompt, **{"max_tokens": 4, "temperature": 1.0, **fields})
    made.session_id = session_id
    return made


def run(harness: Harness, made: Request) -> int:
    """Serve it; returns its cached tokens."""
    harness.add(made)
    harness.run()
    return harness.last(made.request_id).num_cached_tokens


def others(harness: Harness, count: int = 4) -> None:
    for number in range(count):
        run(harness, item(f"o{number}-{harness.now}", [50 + 40 * number + i for i in range(30)]))


@pytest.mark.parametrize("info", [INFO, WINDOWED], ids=["full", "windowed"])
def test_a_session_keeps_its_prefix_while_others_take_the_pool(info: Any) -> None:
    for session_id, cached in [("", 0), ("agent", 16)]:
        harness = Harness(info)
        run(harness, item("first", PROMPT, session_id))
        others(harness)
        following = item("second", [*PROMPT, 9, 9, 9], session_id)
        assert run(harness, following) == cached
        assert harness.outputs()["second", 0] == solo(following, info)["second", 0]


def test_the_whole_pool_is_there_for_others_all_the_same() -> None:
    harness = Harness(INFO)
    run(harness, item("first", PROMPT, "agent"))
    long = item("long", [100 + i for i in range(60)])
    assert run(harness, long) == 0
    assert harness.outputs()["long", 0] == solo(long, INFO)["long", 0]
    assert run(harness, item("second", PROMPT, "agent")) < 16


def test_an_expired_session_is_evicted_first() -> None:
    harness = Harness(INFO, session_ttl_s=10.0)
    run(harness, item("first", PROMPT, "agent"))
    assert len(harness.scheduler.sessions) == 1
    harness.now += 11.0
    others(harness, 2)
    assert len(harness.scheduler.sessions) == 0
    assert harness.scheduler.sessions.num_expired == 1
    assert run(harness, item("second", PROMPT, "agent")) == 0


def test_a_session_does_not_expire_under_a_running_request() -> None:
    harness = Harness(INFO, session_ttl_s=3.0)
    run(harness, item("long", PROMPT, "agent", max_tokens=20))
    assert len(harness.scheduler.sessions) == 1


def test_the_least_recently_used_session_gives_way_when_the_share_is_full() -> None:
    harness = Harness(INFO, session_share=0.5)
    for number in range(3):
        run(harness, item(f"f{number}", [10 * number + i for i in range(17)], f"s{number}"))
    assert harness.scheduler.sessions.num_over_budget == 2  # three of four to five blocks, and eight may be kept
    harness.scheduler.check_integrity()


def test_other_tenants_keep_theirs() -> None:
    harness = Harness(INFO, session_share=0.4)
    for tenant in ("a", "b"):
        run(harness, item(f"first {tenant}", PROMPT, "agent", tenant=tenant))
    assert harness.scheduler.sessions.num_over_budget == 0
    assert len(harness.scheduler.sessions) == 2


def test_deleting_is_for_the_owner_and_once() -> None:
    harness = Harness(INFO)
    sessions = harness.scheduler.sessions
    run(harness, item("first", PROMPT, "agent", tenant="mine"))
    assert not sessions.delete("other", "agent")
    assert not sessions.delete("mine", "another")
    assert sessions.delete("mine", "agent")
    assert not sessions.delete("mine", "agent")
    harness.step()
    assert len(sessions) == 0
    harness.scheduler.check_integrity()
    run(harness, item("second", PROMPT, "agent", tenant="mine"))
    assert sessions.delete("mine", "agent")


def test_a_session_deleted_while_its_request_runs_stays_gone() -> None:
    harness = Harness(INFO)
    harness.add(item("first", PROMPT, "agent"))
    harness.step()
    assert harness.scheduler.sessions.delete("", "agent")
    harness.run()
    assert len(harness.scheduler.sessions) == 0
    harness.scheduler.check_integrity()


def test_a_session_id_that_is_too_long_is_refused() -> None:
    with pytest.raises(RequestError, match="session_id"):
        Harness(INFO).add(item("first", PROMPT, "x" * 129))


# --- diagnosis ---------------------------------------------------------------------------------------------------


def told(harness: Harness, made: Request) -> Divergence | None:
    run(harness, made)
    return harness.last(made.request_id).divergence


def test_a_prompt_that_goes_on_from_its_session_is_not_diagnosed() -> None:
    harness = Harness(INFO)
    assert told(harness, item("first", PROMPT, "agent")) is None
    answer = harness.outputs()["first", 0]
    assert told(harness, item("second", [*PROMPT, *answer, 5, 6, 7], "agent")) is None
    assert told(harness, item("third", PROMPT[:9], "agent")) is None


def test_where_the_prompt_differs_is_told_to_its_session_only() -> None:
    changed = [*PROMPT[:6], 99, *PROMPT[7:]]
    harness = Harness(INFO)
    run(harness, item("first", PROMPT, "agent"))
    found = told(harness, item("second", changed, "agent"))
    assert found == Divergence("text", 6, 12, (*PROMPT[6:], *harness.outputs()["first", 0]), tuple(changed[6:]))
    assert len(found.expected) <= EXCERPT_TOKENS
    for stranger in (item("a", changed, "agent", tenant="b"), item("b", changed, "other"), item("c", changed)):
        assert told(harness, stranger) is None
    assert harness.scheduler.counters.divergences == {"text": 1, "salt": 0, "evicted": 0}


def test_another_salt_is_told_without_any_text() -> None:
    harness = Harness(INFO)
    run(harness, item("first", PROMPT, "agent"))
    assert told(harness, item("second", PROMPT, "agent", cache_salt="x")) == Divergence("salt", 0, 16)


def test_what_was_evicted_is_told_from_where() -> None:
    harness = Harness(INFO, session_share=0.0)
    run(harness, item("first", PROMPT, "agent"))
    others(harness)
    found = told(harness, item("second", PROMPT, "agent"))
    assert found is None or found.cause == "evicted"
    kept = Harness(INFO, lower=tiers(INFO, host_blocks=100))
    run(kept, item("first", PROMPT, "agent"))
    others(kept)
    assert told(kept, item("second", PROMPT, "agent")) is None  # restored


def test_helpers_of_an_agent_are_compared_with_their_own_sequences() -> None:
    harness = Harness(fake_info(num_blocks=64, block_size=4, max_model_len=64))
    prompts = [[number, *PROMPT] for number in range(MAX_BRANCHES)]
    for number, prompt in enumerate(prompts):
        run(harness, item(f"f{number}", prompt, "agent"))
    for number, prompt in enumerate(prompts):
        assert told(harness, item(f"s{number}", [*prompt, 7, 7], "agent")) is None


def test_common_length_and_diagnosis_agree_with_the_definition() -> None:
    left, right = [1] * 2000, [1] * 1500 + [2] * 500
    assert common_length(left, right) == common_length(right, left) == 1500
    assert common_length(left, left[:7]) == 7
    assert diagnose(left, right, 1488, 16) == Divergence("text", 1500, 496, (1,) * 16, (2,) * 16)
    assert diagnose(left, left, 1984, 16) is None
    assert diagnose(left, left, 160, 16) == Divergence("evicted", 160, 1824)


# --- anything at any time ----------------------------------------------------------------------------------------


class SessionsMachine(RuleBasedStateMachine):
    """Protection is counted right whatever happens: nothing stays protected that no session wants."""

    def __init__(self) -> None:
        super().__init__()
        self.protected: dict[bytes, int] = {}
        self.sessions = Sessions(SessionLimits(5.0, 6), self.protect, self.unprotect, 4)
        self.now = 0.0
        self.active: list[Any] = []

    def protect(self, keys: list[bytes], num_prompt_blocks: int) -> None:
        for key in keys:
            self.protected[key] = self.protected.get(key, 0) + 1

    def unprotect(self, keys: list[bytes], num_prompt_blocks: int) -> None:
        for key in keys:
            self.protected[key] -= 1
            assert self.protected[key] >= 0

    @rule(tenant=st.sampled_from("ab"), name=st.sampled_from("xyz"), salt=st.sampled_from(["", "s"]))
    def open(self, tenant: str, name: str, salt: str) -> None:
        self.active.append((self.sessions.open(tenant, name, salt, self.now), salt))

    @rule(which=st.integers(0, 9), tokens=st.lists(st.integers(0, 2), max_size=30), ran=st.booleans())
    def close(self, which: int, tokens: list[int], ran: bool) -> None:
        if self.active:
            session, salt = self.active.pop(which % len(self.active))
            keys = [bytes(tokens[: end * 4]) for end in range(1, len(tokens) // 4 + 1)] if ran else []
            self.sessions.close(session, salt, tokens, 1 + len(tokens) // 2, keys, self.now)

    @rule(seconds=st.sampled_from([0.5, 4.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.sessions.expire(self.now)

    @rule(tenant=st.sampled_from("ab"), name=st.sampled_from("xyz"))
    def delete(self, tenant: str, name: str) -> None:
        self.sessions.delete(tenant, name)

    @invariant()
    def counts_agree(self) -> None:
        self.sessions.check_integrity()
        wanted: dict[bytes, int] = {}
        for session in self.sessions._sessions.values():
            for branch in session.branches:
                for key in branch.keys:
                    wanted[key] = wanted.get(key, 0) + 1
        assert wanted == {key: count for key, count in self.protected.items() if count}


SessionsMachine.TestCase.settings = settings(max_examples=scaled(30), stateful_step_count=40, deadline=None)
test_sessions_at_any_time = SessionsMachine.TestCase
