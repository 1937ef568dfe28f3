"""AT-4: a tenant cannot tell by anything it sees whether another tenant has sent the same prompt.

What a client could measure is what the cache spared: `cached_tokens`, and the tokens that the server computes before
the first answer (the time to the first token is theirs). A prompt that another tenant has sent must be as dear as one
that nobody has. The negative control lets both share, and the same probe finds the leak.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from house import MAX_MODEL_LEN, VOCAB_SIZE, House, completion

from setpoint.engine.plan import StepPlan, StepResult
from setpoint.runtime.fake import FakeRunner, fake_info
from setpoint.server.auth import KeyRing

ALICE, BOB = "alice-key-1", "bob-key-22"
PAIRS = 25
Reading = tuple[int, int]  # (cached tokens told, tokens computed)


class Watched(FakeRunner):
    """Counts what it computes."""

    num_tokens = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.num_tokens += plan.num_tokens
        return super().execute(plan)


def probe(house: House, runner: Watched, prompt: str, key: str, **fields: Any) -> Reading:
    before = runner.num_tokens
    body = completion(prompt, max_tokens=1, temperature=0, **fields)
    response = house.post("/v1/completions", body, headers={"Authorization": f"Bearer {key}"})
    assert response.status_code == 200, response.text
    cached = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached, runner.num_tokens - before


def readings(victim: str, attacker: str, *, victim_fields: Any = (), attacker_fields: Any = ()) -> tuple[Any, Any]:
    """What the attacker sees of prompts that the victim has sent, and of prompts that nobody has."""
    runner = Watched(fake_info(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, num_blocks=4096))
    source = random.Random(1)
    with House(keys=KeyRing([ALICE, BOB]), runner=runner, num_blocks=4096) as house:
        known, fresh = [], []
        for _ in range(PAIRS):
            secret, other = ("".join(source.choices("abcdfg ", k=200)) for _ in range(2))
            probe(house, runner, secret, victim, **dict(victim_fields))
            known.append(probe(house, runner, secret, attacker, **dict(attacker_fields)))
            fresh.append(probe(house, runner, other, attacker, **dict(attacker_fields)))
    return known, fresh


def test_another_tenants_prompts_cost_what_unknown_prompts_cost() -> None:
    known, fresh = readings(ALICE, BOB)
    assert known == fresh
    assert {cached for cached, _ in known} == {0}


def test_the_probe_finds_the_leak_where_prompts_are_shared() -> None:
    known, fresh = readings(ALICE, ALICE)
    assert all(cached >= 192 and computed < 20 for cached, computed in known)
    assert all(cached == 0 and computed >= 200 for cached, computed in fresh)


@pytest.mark.parametrize(("victim", "attacker"), [("a", "b"), ("a", None)])
def test_a_salt_separates_the_users_of_one_key(victim: str, attacker: str | None) -> None:
    known, fresh = readings(
        ALICE,
        ALICE,
        victim_fields={"cache_salt": victim},
        attacker_fields={} if attacker is None else {"cache_salt": attacker},
    )
    assert known == fresh


def test_a_session_id_of_another_tenant_opens_nothing() -> None:
    known, fresh = readings(ALICE, BOB, victim_fields={"session_id": "agent"}, attacker_fields={"session_id": "agent"})
    assert known == fresh
