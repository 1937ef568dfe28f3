"""Sentences of an explanation: from records only, at most three, the costliest first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from engine_support import Harness, request

from setpoint.engine.diagnosis import Divergence
from setpoint.engine.explanation import Explanation, Limits, advice, totals
from setpoint.engine.timeline import Cause, Kind, Span, Timeline
from setpoint.server.explain import Explanations

LIMITS = Limits(64, 512, 4096)


def timeline(*parts: tuple[Kind, Cause, float], **fields: object) -> Timeline:
    made = Timeline(num_prompt=10, **fields)  # type: ignore[arg-type]
    at = 0.0
    for kind, cause, seconds in parts:
        made.spans.append(Span(kind, at, at + seconds, ((cause, seconds),), num_steps=2, num_tokens=7))
        at += seconds
    return made


def test_the_costliest_come_first_and_trifles_are_left_out() -> None:
    told = advice(
        timeline(
            (Kind.INBOX, Cause.STEP_UNDER_WAY, 0.001),
            (Kind.QUEUE, Cause.PLACES, 0.812),
            (Kind.PREFILL, Cause.PREFILL, 0.1),
            (Kind.PREFILL, Cause.PREFILL_OTHERS, 0.2),
            (Kind.DECODE, Cause.DECODE, 0.3),
            num_ahead=7,
        ),
        LIMITS,
    )
    assert len(told) == 3
    assert told[0] == (
        "Waited 812 ms (57%) because all places were taken, 7 waiting ahead of it; "
        "a larger --max-num-seqs (now 64) is the knob."
    )
    assert told[1].startswith("Decoding took 300 ms (21%) in 2 steps")
    assert told[2].startswith("14 tokens of others") or "tokens of others" in told[2]


def test_every_cause_has_a_sentence_with_its_numbers() -> None:
    for cause in Cause:
        (told,) = advice(timeline((Kind.DECODE, cause, 0.5), num_preemptions=2), LIMITS)
        assert "500 ms (100%)" in told
        assert told.endswith(".")


def test_preemption_tells_the_wait_and_the_work_as_one() -> None:
    made = timeline((Kind.PREEMPTED, Cause.PREEMPTED, 0.2), (Kind.RECOMPUTE, Cause.RECOMPUTE, 0.3), num_preemptions=1)
    (told,) = advice(made, LIMITS)
    assert told.startswith("Preempted 1 times: 500 ms (100%) to wait and to compute 7 tokens again")


def test_a_divergence_is_told_by_its_cause() -> None:
    for found, word in (
        (Divergence("text", 103, 1904), "differs from token 103 on"),
        (Divergence("evicted", 16, 32), "--kv-host-bytes"),
        (Divergence("salt", 0, 32), "cache_salt"),
    ):
        (told,) = advice(timeline((Kind.PREFILL, Cause.PREFILL, 0.5), divergence=found), LIMITS)
        assert word in told
        assert f"{found.num_lost_tokens} that its session had" in told


def test_the_critical_sequence_is_the_last_to_end() -> None:
    early, late, running = Timeline(finished=1.0), Timeline(finished=2.0), Timeline()
    assert Explanation((early, late), LIMITS, 3.0).critical is late
    assert Explanation((early, running, late), LIMITS, 3.0).critical is running


def test_drafts_are_told_as_they_fared() -> None:
    made = timeline((Kind.DECODE, Cause.DECODE, 0.5), num_drafted=10, num_accepted=4, num_forced=3)
    (told,) = advice(made, LIMITS)
    assert "4 of 10 drafted tokens were accepted" in told
    assert "forced 3 tokens" in told


def test_nothing_to_tell_is_nothing_told() -> None:
    assert advice(Timeline(), LIMITS) == []
    harness = Harness()
    harness.step_s = 0.5
    harness.add(request("a", [1, 2], max_tokens=2))
    harness.run()
    (read,) = harness.scheduler.timelines.read("a", 9.0) or []
    assert sum(totals(read).values()) > 0
    assert len(advice(read, LIMITS)) <= 3


def test_what_the_pacer_cut_is_named() -> None:
    parts = ((Cause.PREFILL, 0.7), (Cause.PACER, 0.3))
    span = Span(Kind.PREFILL, 0.0, 1.0, parts, num_steps=6, num_tokens=400, paced_steps=4)
    told = advice(Timeline(spans=[span], finished=1.0, num_prompt=400), LIMITS)
    assert "the pacer made 4 of these steps smaller" in told[0]
    assert told[1].startswith("Waited 300 ms (30%) because the pacer let in fewer")


def test_the_time_for_a_grammar_is_part_of_the_preparation() -> None:
    made = timeline((Kind.PREFILL, Cause.PREFILL, 0.5), finished=0.5)
    explained = Explanation((made,), LIMITS, 0.5)
    job = SimpleNamespace(id="cmpl-1", tenant="key", grammar_s=0.3)
    explanations = Explanations(lambda engine_id: explained, lambda: 0.5)
    explanations.begin(SimpleNamespace(job=job, engine_ids=["cmpl-1"]), -0.4)  # type: ignore[arg-type]
    body = explanations.body("cmpl-1", "key")
    assert body is not None
    assert body["path"][0]["parts"] == pytest.approx({"grammar": 0.3, "prepare": 0.1})
    assert body["causes"]["grammar"] == pytest.approx(0.3)
    assert "until its grammar was compiled" in body["advice"][0]
