"""Traces: what is written is read, what is malformed is named, what is made looks like its source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.cli.main import main
from setpoint.errors import ConfigError
from setpoint.workload.describe import compare, describe, dispersion, hit_rate, ks_distance
from setpoint.workload.imports import import_trace
from setpoint.workload.synth import PRESETS, from_table, synthesize
from setpoint.workload.tables import lengths, table
from setpoint.workload.trace import SCHEMA, Trace, TraceError, TraceHeader, TraceRequest, read_trace, write_trace
from setpoint.workload.transform import excerpt, more_bursts, scale_lengths, scale_rate, split

requests = st.lists(
    st.builds(
        TraceRequest,
        arrival_s=st.floats(0, 1e6).map(lambda t: round(t, 6)),
        input_tokens=st.integers(64, 1000),
        output_tokens=st.integers(1, 1000),
        hash_ids=st.lists(st.integers(0, 20), max_size=4).map(tuple),
        session=st.none() | st.sampled_from(["a", "b"]),
        turn=st.integers(0, 3),
        think_s=st.none() | st.floats(0, 100).map(lambda t: round(t, 6)),
        class_name=st.sampled_from(["", "chat"]),
        slo=st.none() | st.just("ttft.p95<200ms"),
    ),
    min_size=1,
    max_size=20,
).map(lambda items: sorted(items, key=lambda item: item.arrival_s))


@given(requests)
@settings(max_examples=scaled(50))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, items: list[TraceRequest]) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    trace = Trace(TraceHeader("test", "CC0", 16, ("time / 2",)), items)
    write_trace(trace, path)
    assert read_trace(path) == trace


HEADER = json.dumps({"schema": SCHEMA})


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "empty"),
        ([HEADER], "no request"),
        (['{"t": 0, "in": 1, "out": 1}'], "line 1: a trace begins"),
        ([HEADER, "{"], "line 2 is not JSON"),
        ([json.dumps({"schema": SCHEMA, "order": "none"})], "line 1: order must be"),
        ([json.dumps({"schema": SCHEMA, "order": "end"}), "{", "{}"], "line 2 is not JSON"),
        ([json.dumps({"schema": SCHEMA, "order": "end"}), '{"t": 0, "in"'], "no request"),
        ([HEADER, "[1]"], "line 2 is not a JSON object"),
        ([HEADER, '{"t": 0, "in": 1}'], 'line 2: "out" is missing'),
        ([HEADER, '{"t": 0, "in": 0, "out": 1}'], 'line 2: "in" must be'),
        ([HEADER, '{"t": -1, "in": 1, "out": 1}'], 'line 2: "t" must be'),
        ([HEADER, '{"t": NaN, "in": 1, "out": 1}'], 'line 2: "t" must be'),
        ([HEADER, '{"t": 0, "in": true, "out": 1}'], 'line 2: "in" must be'),
        ([HEADER, '{"t": 0, "in": 1, "out": 1, "prompt": "x"}'], "line 2: unknown field 'prompt'"),
        ([HEADER, '{"t": 0, "in": 1, "out": 1, "hash_ids": [1, 2]}'], "line 2: 2 hash_ids for 1 tokens"),
        ([HEADER, '{"t": 0, "in": 1, "out": 1, "session": 5}'], "line 2: session must be"),
        ([HEADER, '{"t": 5, "in": 1, "out": 1}', '{"t": 4, "in": 1, "out": 1}'], "line 3: t goes back"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, lines: list[str], says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert says in str(caught.value)


# --- synthesis ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_its_rate_and_is_repeatable(preset: str, tmp_path: Path) -> None:
    rates = [len(synthesize(preset, rate=1.0, seconds=2000, seed=seed).requests) / 2000 for seed in range(12)]
    assert 0.8 < float(np.mean(rates)) < 1.25
    trace = synthesize(preset, rate=1.0, seconds=300, seed=3)
    assert trace == synthesize(preset, rate=1.0, seconds=300, seed=3)
    assert trace != synthesize(preset, rate=1.0, seconds=300, seed=4)
    write_trace(trace, tmp_path / "t.jsonl")
    assert len(read_trace(tmp_path / "t.jsonl").requests) == len(trace.requests)


def test_lengths_come_out_as_in_their_source() -> None:
    for source in ("azure2023_code", "azure2023_conv"):
        found = compare(from_table(source, rate=None, seconds=3500, seed=1), source)
        assert found["ks_input"] <= 0.05
        assert found["ks_output"] <= 0.05


@pytest.mark.parametrize("source", ["azure2023_conv", "azure2023_code"])
def test_burstiness_is_that_of_the_source(source: str) -> None:
    """Variance over mean of counts, mean of 20 seeds, within a fifth."""
    found: dict[int, list[float]] = {}
    for seed in range(20):
        trace = from_table(source, rate=None, seconds=table(source)["duration_s"], seed=seed)
        times = np.asarray([request.arrival_s for request in trace.requests])
        for counts in dispersion(times, table(source)["duration_s"]):
            found.setdefault(counts.window_s, []).append(counts.var_over_mean)
    for window, values in found.items():
        theirs = table(source)["dispersion"][f"{window}s"]["var_over_mean"]
        assert float(np.mean(values)) == pytest.approx(theirs, rel=0.2), window


def test_chat_and_agents_share_prefixes() -> None:
    for preset, least in (("chat", 0.15), ("agent", 0.7), ("rag", 0.3)):
        trace = synthesize(preset, rate=1.0, seconds=2000, seed=1)
        assert least < hit_rate(trace) < 0.99, preset
        small, large = hit_rate(trace, 100), hit_rate(trace, 10**7)
        assert small <= large == hit_rate(trace)
    assert hit_rate(synthesize("code", rate=1.0, seconds=500)) == 0.0


def test_a_session_continues_its_own_prompt() -> None:
    trace = synthesize("agent", rate=1.0, seconds=2000, seed=2)
    last: dict[str | None, TraceRequest] = {}
    for item in trace.requests:
        before = last.get(item.session)
        if before is not None:
            assert item.turn == before.turn + 1
            assert item.think_s is not None
            assert item.arrival_s >= before.arrival_s
            assert item.hash_ids[: len(before.hash_ids)] == before.hash_ids
            assert item.input_tokens > before.input_tokens + before.output_tokens
        last[item.session] = item


def test_what_cannot_be_made_is_refused() -> None:
    for fields in ({"rate": 0.0}, {"seconds": -1.0}, {"rate": 1e6, "seconds": 1e8}, {"length_scale": 0.0}):
        with pytest.raises(ConfigError):
            synthesize("chat", **{"rate": 1.0, "seconds": 10.0, **fields})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="choose one of"):
        synthesize("chats", rate=1.0, seconds=10.0)


# --- description -------------------------------------------------------------------------------------------------


def test_distances_of_known_distributions() -> None:
    source = lengths("azure2023_conv", "input_len")
    drawn = np.round(source.draw(np.random.default_rng(1), 20_000))
    assert ks_distance(drawn, source) < 0.02
    assert ks_distance(drawn * 2, source) > 0.2


def test_poisson_counts_have_a_variance_like_their_mean() -> None:
    times = np.sort(np.random.default_rng(1).random(20_000) * 4000)
    for counts in dispersion(times, 4000):
        assert counts.var_over_mean == pytest.approx(1.0, abs=0.4)


def test_hit_rates_of_a_trace_by_hand() -> None:
    items = [TraceRequest(float(t), 32, 1, ids) for t, ids in enumerate([(1, 2), (1, 3), (1, 2), (4, 2)])]
    trace = Trace(TraceHeader("hand"), items)
    assert hit_rate(trace) == (1 + 2) * 16 / 128  # a block behind another first block is no hit
    assert hit_rate(trace, 2) == (1 + 1) * 16 / 128
    document = describe(trace)
    assert document["requests"] == 4
    assert document["prefix"]["unique_blocks"] == 4


# --- cutting and scaling -----------------------------------------------------------------------------------------


@given(requests, st.floats(0.1, 0.9))
@settings(max_examples=scaled(50))
def test_a_split_loses_nothing(items: list[TraceRequest], share: float) -> None:
    trace = Trace(TraceHeader("test"), items)
    try:
        first, rest = split(trace, share)
    except TraceError:
        assert len({item.arrival_s for item in items}) == 1 or len(items) < 10
        return
    assert [replace(item, arrival_s=0.0) for item in items] == [
        replace(item, arrival_s=0.0) for item in (*first.requests, *rest.requests)
    ]
    assert all(item.arrival_s >= 0 for item in rest.requests)


def test_independent_requests_are_brought_together_and_sessions_are_superposed() -> None:
    code = synthesize("code", rate=2.0, seconds=1000, seed=1)
    assert len(scale_rate(code, 2.0).requests) == len(code.requests)
    assert scale_rate(code, 2.0).seconds == pytest.approx(code.seconds / 2)
    agent = synthesize("agent", rate=2.0, seconds=1000, seed=1)
    more = scale_rate(agent, 2.5, seed=3)
    assert len(more.requests) == pytest.approx(2.5 * len(agent.requests), rel=0.15)
    assert more.seconds <= agent.seconds * 1.001
    assert hit_rate(more) == pytest.approx(hit_rate(agent), abs=0.05)
    thinned = scale_rate(agent, 0.5, seed=3)
    assert {item.session for item in thinned.requests} < {item.session for item in agent.requests}
    assert more.header.scaling[-1].startswith("sessions x 2.5")


@given(requests, st.floats(0, 100), st.floats(1.0, 500.0))
@settings(max_examples=scaled(50))
def test_an_excerpt_holds_what_arrives_in_its_time(items: list[TraceRequest], begin: float, seconds: float) -> None:
    items = [replace(item, arrival_s=item.arrival_s % 60) for item in items]
    trace = Trace(TraceHeader("test"), sorted(items, key=lambda item: item.arrival_s))
    try:
        part = excerpt(trace, begin, seconds)
    except ConfigError:  # nobody arrives in it, or the trace would go round a thousand times
        return
    times = [item.arrival_s for item in part.requests]
    assert times == sorted(times)
    if trace.seconds > 0:
        assert all(0 <= t < seconds for t in times)


def test_more_bursts_keep_the_requests_and_the_time_and_gather_the_arrivals() -> None:
    trace = synthesize("rag", rate=5.0, seconds=600.0, seed=1)

    def variation(found: Trace) -> float:
        gaps = np.diff([request.arrival_s for request in found.requests])
        return float(gaps.std() / gaps.mean())

    bursts = more_bursts(trace, 2.0, seed=3)
    assert variation(bursts) == pytest.approx(2 * variation(trace), rel=0.2)
    assert bursts.seconds == pytest.approx(trace.seconds)
    assert sorted(r.input_tokens for r in bursts.requests) == sorted(r.input_tokens for r in trace.requests)
    with pytest.raises(ConfigError, match="variation"):
        more_bursts(trace, 0.5)


def test_more_bursts_move_sessions_as_a_whole() -> None:
    trace = synthesize("agent", rate=2.0, seconds=600.0, seed=1)

    def spans(found: Trace) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {}
        for request in found.requests:
            times.setdefault(str(request.session), []).append(request.arrival_s)
        return {name: [round(at - many[0], 6) for at in many] for name, many in times.items()}

    assert spans(more_bursts(trace)) == spans(trace)
    arrivals = [request.arrival_s for request in more_bursts(trace).requests]
    assert arrivals == sorted(arrivals)


def test_a_trace_that_goes_round_brings_new_blocks_and_sessions() -> None:
    trace = synthesize("agent", rate=2.0, seconds=200, seed=1)
    part = excerpt(trace, 50.0, 600.0)
    assert len(part.requests) == pytest.approx(3 * len(trace.requests), rel=0.1)
    assert hit_rate(part) == pytest.approx(hit_rate(trace), abs=0.07)
    assert part.header.scaling[-1].startswith("600 s from 50")
    with pytest.raises(ConfigError):
        excerpt(trace, 0.0, 0.0)


def test_lengths_are_divided_with_their_blocks(tmp_path: Path) -> None:
    trace = synthesize("chat", rate=1.0, seconds=500, seed=1)
    small = scale_lengths(trace, 8)
    assert small.header.block_size == 2
    assert hit_rate(small) == pytest.approx(hit_rate(trace), abs=0.05)
    write_trace(small, tmp_path / "t.jsonl")
    assert read_trace(tmp_path / "t.jsonl").requests[0].input_tokens == small.requests[0].input_tokens


# --- other formats -----------------------------------------------------------------------------------------------

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,API log
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}
{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 47, 2366]}
"""
BAILIAN = (
    '{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.1, "input_length": 521, "output_length": 132, '
    '"type": "text", "turn": 1, "hash_ids": [1, 2]}\n'
    '{"chat_id": 160, "parent_chat_id": 159, "timestamp": 80.5, "input_length": 700, "output_length": 12, '
    '"type": "text", "turn": 2, "hash_ids": [1, 2, 3]}\n'
)
OPENAI = """{"time": 5.5, "request": {}, "response": {"usage": {"prompt_tokens": 12, "completion_tokens": 7}}}
{"time": 6, "request": {}, "response": {"error": {"message": "overloaded"}}}
{"time": 7, "request": {"input": "x"}, "response": {"usage": {"input_tokens": 3, "output_tokens": 4}}}
"""


@pytest.mark.parametrize(
    ("name", "text", "expected", "skipped"),
    [
        ("azure", AZURE, [(0.0, 374, 44), (4.314579, 396, 109)], 0),
        ("burstgpt", BURSTGPT, [(0.0, 472, 18), (113.0, 417, 276)], 1),
        ("mooncake", MOONCAKE, [(0.0, 6955, 52), (3.053, 6472, 26)], 0),
        ("bailian", BAILIAN, [(0.0, 521, 132), (19.4, 700, 12)], 0),
        ("openai", OPENAI, [(0.0, 12, 7), (1.5, 3, 4)], 1),
    ],
)
def test_public_formats_are_read(name: str, text: str, expected: list[Any], skipped: int, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_text(text)
    trace, left_out = import_trace(path, name)
    found = [(item.arrival_s, item.input_tokens, item.output_tokens) for item in trace.requests]
    assert found == [(pytest.approx(t, abs=1e-5), i, o) for t, i, o in expected]
    assert left_out == skipped
    if name == "bailian":
        assert [(item.session, item.turn) for item in trace.requests] == [("159", 0), ("159", 1)]
    if name == "mooncake":
        assert trace.requests[1].hash_ids == (46, 47, 2366)
        assert trace.header.block_size == 512


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("azure", "a,b\n1,2\n", "no column 'TIMESTAMP'"),
        ("azure", AZURE.replace("374", "many"), "line 2: time and token counts"),
        ("azure", AZURE.replace("2023-11-16 18:15:46", "yesterday"), "line 2"),
        ("burstgpt", BURSTGPT + "7,x\n", "line 5: 2 columns"),
        ("mooncake", MOONCAKE.replace("[46, 47, 48]", '["a"]'), "line 1: hash_ids"),
        ("mooncake", "\n", "holds no request"),
        ("bailian", BAILIAN.replace('"chat_id": 159', '"chat_id": "x"'), "line 1: chat_id"),
        ("openai", "{}", "holds no request"),
        ("excel", "", "choose one of"),
    ],
)
def test_a_malformed_source_is_named(name: str, text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_text(text)
    with pytest.raises(TraceError) as caught:
        import_trace(path, name)
    assert says in str(caught.value)


# --- command line ------------------------------------------------------------------------------------------------


def test_the_commands_from_making_to_describing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, first, rest, more = (str(tmp_path / name) for name in ("t.jsonl", "a.jsonl", "b.jsonl", "c.jsonl"))
    assert main(["trace", "synth", "chat", "-o", made, "--rate", "2", "--seconds", "300"]) == 0
    assert main(["trace", "split", made, "--first", first, "--rest", rest]) == 0
    assert main(["trace", "scale", first, "-o", more, "--rate", "1.5", "--lengths", "4"]) == 0
    capsys.readouterr()
    assert main(["trace", "describe", more, "--against", "azure2023_conv"]) == 0
    shown = capsys.readouterr().out
    assert "requests in" in shown
    assert "endless prefix cache" in shown
    assert main(["trace", "describe", made, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sessions"] > 10
    (tmp_path / "bad.jsonl").write_text(HEADER + "\n{}\n")
    assert main(["trace", "describe", str(tmp_path / "bad.jsonl")]) == 2
    assert "line 2" in capsys.readouterr().err
    assert main(["trace", "describe", str(tmp_path / "none.jsonl")]) == 2
    assert main(["trace", "synth", "chat", "-o", str(tmp_path / "no" / "t.jsonl")]) == 2
