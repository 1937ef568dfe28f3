"""Recordings: what is seen is what is read back, in the order of arrival, whatever ends first or fails."""

from __future__ import annotations

import errno
import gzip
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.slo import HeldSla, Slo
from setpoint.workload import record
from setpoint.workload.describe import describe, hit_rate
from setpoint.workload.record import BLOCK_TOKENS, Recording, Seen, block_ids
from setpoint.workload.record_answer import AnswerMeter, estimated, read_prompt
from setpoint.workload.record_file import Parts
from setpoint.workload.trace import TraceHeader, TraceRequest, read_trace

HEADER = TraceHeader("a test", block_size=BLOCK_TOKENS)
MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def no_sync() -> Iterator[None]:
    """Waiting for the disk takes most of the time otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setpoint.workload.record_file._sync", lambda file: None)
        yield


def single(path: Path, max_bytes: int = MIB) -> Parts:
    return Parts(lambda number: path if number == 1 else None, HEADER, max_bytes=max_bytes, part_bytes=max_bytes)


def recorded(parts: Parts, seen: list[Seen], **options: Any) -> list[str]:
    """The warnings."""
    warnings: list[str] = []
    recording = Recording(parts, lambda: 0.0, warnings.append, **options)
    for one in seen:
        recording.add(lambda one=one: [one])  # type: ignore[misc]
    recording.close()
    recording.add(lambda: [Seen(0.0, 1.0, [1], 1, 1)])  # too late, and harmless
    return warnings


def seen(arrival_s: float, end_s: float, prompt: list[int] | None = None, **fields: Any) -> Seen:
    prompt = [1, 2, 3] if prompt is None else prompt
    return Seen(arrival_s, end_s, prompt, len(prompt), 5, **fields)


SEEN = st.lists(
    st.builds(
        lambda arrival, took, prompt, output, session: Seen(
            arrival, arrival + took, prompt, len(prompt), output, "chat", session
        ),
        arrival=st.floats(0, 1e4).map(lambda t: round(t, 6)),
        took=st.floats(0, 1e3),
        prompt=st.builds(lambda a, b: [0] * a + [1] * b, st.integers(1, 40), st.integers(0, 40)),
        output=st.integers(0, 9),
        session=st.none() | st.sampled_from(["a", "b"]),
    ),
    min_size=1,
    max_size=8,
).map(lambda items: sorted(items, key=lambda item: item.end_s))


@given(items=SEEN)
@settings(max_examples=scaled(25), deadline=None)
def test_what_is_seen_is_read(tmp_path_factory: pytest.TempPathFactory, items: list[Seen]) -> None:
    """Lengths and arrivals are kept, blocks are shared where prompts begin alike, sessions count their turns."""
    path = tmp_path_factory.mktemp("record") / "t.jsonl"
    assert recorded(single(path), items) == []
    answered = [item for item in items if item.output_tokens]
    if not answered:
        assert not path.exists()
        return
    trace = read_trace(path)
    assert trace.header == HEADER
    by_arrival = sorted(answered, key=lambda item: item.arrival_s)
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in trace.requests] == [
        (item.arrival_s, item.input_tokens, item.output_tokens) for item in by_arrival
    ]
    for one, first in zip(trace.requests, by_arrival, strict=True):
        assert len(one.hash_ids) == one.input_tokens // BLOCK_TOKENS
        assert (one.session is None) == (first.session is None)
        for other, second in zip(trace.requests, by_arrival, strict=True):
            common = next(
                (i for i, pair in enumerate(zip(first.prompt, second.prompt, strict=False)) if pair[0] != pair[1]),
                min(len(first.prompt), len(second.prompt)),
            )
            shared = sum(1 for a, b in zip(one.hash_ids, other.hash_ids, strict=False) if a == b)
            assert shared == common // BLOCK_TOKENS
    for name in {r.session for r in trace.requests} - {None}:
        turns = sorted(r.turn for r in trace.requests if r.session == name)
        assert turns == list(range(len(turns)))


def test_describe_reads_a_recording(tmp_path: Path) -> None:
    prompt = list(range(64))
    items = [seen(float(i), i + 0.5, prompt + [i] * 16, session="s") for i in range(4)]
    recorded(single(tmp_path / "t.jsonl"), items)
    trace = read_trace(tmp_path / "t.jsonl")
    assert [r.think_s for r in trace.requests] == [None, 0.5, 0.5, 0.5]
    assert hit_rate(trace) == pytest.approx(3 * 64 / (4 * 80))
    assert describe(trace)["sessions"] == 1


def test_the_salt_is_of_one_recording(tmp_path: Path) -> None:
    """The same prompt in two recordings has nothing in common, and no name of a client is written."""
    ids = []
    for name in ("a", "b"):
        path = tmp_path / name
        recorded(single(path), [seen(0.0, 1.0, list(range(32)), session="alice@example.org")])
        assert "alice" not in path.read_text()
        ids.append(read_trace(path).requests[0].hash_ids)
        assert path.stat().st_mode & 0o077 == 0
    assert not set(ids[0]) & set(ids[1])


def test_ids_are_exact_in_json() -> None:
    assert all(0 <= i < 1 << 53 for i in block_ids(bytes(range(256)) * 8, b"salt"))
    assert block_ids(b"x" * 63, b"salt") == []


def test_a_session_is_found_by_what_it_repeats(tmp_path: Path) -> None:
    """Where clients name none: all messages of an earlier request, then more. A shared system prompt is no session."""
    turns = [b"system", b"hi", b"hello", b"and?"]
    items = [
        seen(0.0, 1.0, turns=tuple(turns[:2])),
        seen(0.5, 1.5, turns=(b"system", b"other")),
        seen(3.0, 4.0, turns=tuple(turns)),
        seen(5.0, 6.0, turns=(*turns, b"so", b"on")),
    ]
    recorded(single(tmp_path / "t.jsonl"), items)
    first, other, second, third = read_trace(tmp_path / "t.jsonl").requests
    assert first.session == second.session == third.session != other.session
    assert [(r.turn, r.think_s) for r in (first, second, third)] == [(0, None), (1, 2.0), (2, 1.0)]


def test_sessions_are_bounded(tmp_path: Path) -> None:
    items = [seen(float(i), i + 0.5, session=str(i % 50)) for i in range(100)]
    recorded(single(tmp_path / "t.jsonl"), items, max_sessions=10)
    assert {r.turn for r in read_trace(tmp_path / "t.jsonl").requests} == {0}


def test_a_program_that_is_killed_leaves_what_it_wrote(tmp_path: Path) -> None:
    """Lines in the order of ends, the last one torn."""
    path = tmp_path / "t.jsonl"
    parts = single(path)
    for arrival in (2.0, 0.5, 1.0):
        parts.add(json.dumps({"t": arrival, "in": 1, "out": 1}).encode() + b"\n")
    with path.open("ab") as file:
        file.write(b'{"t": 3.0, "in"')
    assert [r.arrival_s for r in read_trace(path).requests] == [0.5, 1.0, 2.0]


def test_parts_are_kept_within_the_limit(tmp_path: Path) -> None:
    """The newest parts stay, each a trace of its own."""
    parts = Parts(lambda n: tmp_path / f"{n:03d}.jsonl", HEADER, max_bytes=4000, part_bytes=1000)
    recorded(parts, [seen(float(i), i + 0.5) for i in range(200)])
    files = sorted(tmp_path.iterdir())
    assert sum(file.stat().st_size for file in files) <= 4000
    assert len(files) in (3, 4)
    arrivals = [r.arrival_s for file in files for r in read_trace(file).requests]
    assert arrivals == [float(i) for i in range(200 - len(arrivals), 200)]


def test_a_single_file_ends_at_its_limit(tmp_path: Path) -> None:
    warnings = recorded(single(tmp_path / "t.jsonl", 500), [seen(float(i), i + 0.5) for i in range(50)])
    assert warnings == ["the recording has reached its limit; it stops here"]
    assert 0 < len(read_trace(tmp_path / "t.jsonl").requests) < 50


def full_after(count: int) -> Callable[[int, Any], int]:
    """A disk with room for so many bytes, which takes the beginning of what does not fit."""
    written = 0
    write = os.write

    def limited(file: int, data: Any) -> int:
        nonlocal written
        if written >= count:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(file, bytes(data)[: count - written])
        written += done
        return done

    return limited


@pytest.mark.parametrize("room", [200, 333, 400, 517])
def test_a_full_disk_ends_the_recording_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    path = tmp_path / "t.jsonl"
    monkeypatch.setattr("setpoint.workload.record_file._write", full_after(room))
    warnings = recorded(single(path), [seen(float(i), i + 0.5) for i in range(50)])
    assert warnings == ["the recording cannot be written (No space left on device); it stops here"]
    assert len(read_trace(path).requests) == (path.stat().st_size - 129) // 36 or path.stat().st_size <= room
    assert all(line.endswith("}") for line in path.read_text().splitlines())


def test_no_room_to_sort_leaves_it_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    parts = single(path)

    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("setpoint.workload.record_file._sync", no_room)
    warnings = recorded(parts, [seen(2.0, 3.0), seen(1.0, 4.0)])
    assert ["can be read as it is" in warning for warning in warnings] == [True]
    assert [r.arrival_s for r in read_trace(path).requests] == [1.0, 2.0]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_exists_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        single(path)
    assert path.read_text() == "mine"


def test_what_cannot_be_described_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_LINE_BYTES", 300)
    warnings: list[str] = []
    recording = Recording(single(tmp_path / "t.jsonl"), lambda: 0.0, warnings.append)

    def broken() -> list[Seen]:
        raise ValueError

    recording.add(broken)
    recording.add(lambda: [seen(0.0, 1.0, messages=({"role": "user", "content": "x" * 400},))])  # kept without
    recording.add(lambda: [seen(1.0, 2.0, list(range(5000)))])
    recording.close()
    assert (recording.num_written, recording.num_left_out, warnings) == (1, 2, [])
    assert read_trace(tmp_path / "t.jsonl").requests[0].messages is None


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by bytes; one warning for all that is left out, and the rest is written."""
    monkeypatch.setattr(record, "MAX_PENDING", 3)
    monkeypatch.setattr(record, "MAX_PENDING_BYTES", 100)
    warnings: list[str] = []
    recording = Recording(single(tmp_path / "t.jsonl"), lambda: 0.0, warnings.append)
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> list[Seen]:
        begun.set()
        go_on.wait(10)
        return [seen(0.0, 1.0)]

    recording.add(slow)
    begun.wait(10)
    for number, num_bytes in enumerate((90, 20, 10, 0, 0)):  # the second has no room, nor has the last a place
        recording.add(lambda number=number: [seen(number + 1.0, 9.0)], num_bytes)  # type: ignore[misc]
    go_on.set()
    recording.close()
    assert [r.arrival_s for r in read_trace(tmp_path / "t.jsonl").requests] == [0.0, 1.0, 3.0, 4.0]
    assert recording.num_left_out == 2
    assert warnings == ["requests end faster than they can be recorded; some are left out"]


def test_messages_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    message = {"role": "user", "content": "hi"}
    recorded(single(tmp_path / "t.jsonl"), [seen(0.0, 1.0, messages=(message,))])
    assert read_trace(tmp_path / "t.jsonl").requests == [
        TraceRequest(arrival_s=0.0, input_tokens=3, output_tokens=5, messages=(message,))
    ]


# --- reading answers ---------------------------------------------------------------------------------------------


def metered(body: bytes, kind: str, encoding: str = "", *, step: int = 7) -> AnswerMeter:
    meter = AnswerMeter(kind, encoding, keeps_text=True)
    for begin in range(0, len(body), step):
        meter.feed(body[begin : begin + step])
    meter.finish()
    return meter


SSE = (
    b": ping\n\n"
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "caf\xc3\xa9 "}}]}\n\n'
    b'data: {"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}}]}\n\n'
    b'data: not json\n\ndata: {"choices": 5}\n\n'
)
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("encoding", ["", "gzip", "deflate"])
def test_a_stream_is_read_as_it_passes(step: int, encoding: str) -> None:
    pack = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    meter = metered(pack(SSE), "text/event-stream; charset=utf-8", encoding, step=step)
    assert (meter.num_text_bytes, "".join(meter.text)) == (9, "café f{}")
    assert (meter.input_tokens, meter.output_tokens) == (0, 0)
    meter = metered(pack(SSE + USAGE), "text/event-stream", encoding, step=step)
    assert (meter.input_tokens, meter.output_tokens) == (9, 4)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {"choices": [{"message": {"content": "abc"}}], "usage": {"prompt_tokens": 2, "completion_tokens": 1}},
            (2, 1, 3),
        ),
        ({"choices": [{"text": "abc"}, {"text": "d"}]}, (0, 0, 4)),
        ({"usage": {"input_tokens": 3, "output_tokens": 4}}, (3, 4, 0)),
        ({"usage": {"prompt_tokens": -3, "completion_tokens": True}}, (0, 0, 0)),
        ({"usage": [], "choices": [{"message": {"content": [1]}}, 5]}, (0, 0, 0)),
        ([1, 2], (0, 0, 0)),
    ],
)
def test_a_body_is_read_at_its_end(body: Any, expected: tuple[int, int, int]) -> None:
    meter = metered(json.dumps(body).encode(), "application/json")
    assert (meter.input_tokens, meter.output_tokens, meter.num_text_bytes) == expected


def test_the_responses_api_is_read_too() -> None:
    done = {"type": "response.completed", "response": {"usage": {"input_tokens": 7, "output_tokens": 2}}}
    delta = {"type": "response.output_text.delta", "delta": "abcd"}
    meter = metered(
        b"".join(b"data: " + json.dumps(d).encode() + b"\r\n\r\n" for d in (delta, done)), "text/event-stream"
    )
    assert (meter.input_tokens, meter.output_tokens, meter.num_text_bytes) == (7, 2, 4)


@pytest.mark.parametrize(
    ("body", "kind", "encoding"),
    [
        (b"data: {" + b"x" * (2 << 20), "text/event-stream", ""),
        (gzip.compress(b"data: " + b"0" * (64 << 20)), "text/event-stream", "gzip"),
        (b"\x1f\x8b broken", "text/event-stream", "gzip"),
        (SSE + USAGE, "text/event-stream", "br"),
    ],
    ids=["long line", "bomb", "not gzip", "unknown"],
)
def test_what_cannot_be_read_is_given_up(body: bytes, kind: str, encoding: str) -> None:
    meter = metered(body, kind, encoding, step=60_000)
    assert (meter.output_tokens, meter.num_text_bytes, len(meter._pending)) == (0, 0, 0)


@given(st.binary(max_size=300), st.sampled_from(["text/event-stream", "application/json", ""]), st.integers(1, 50))
@settings(max_examples=scaled(60), deadline=None)
def test_no_bytes_hurt(body: bytes, kind: str, step: int) -> None:
    metered(b"data: " + body + b"\n", kind, step=step)


@pytest.mark.parametrize(
    ("body", "text", "num_turns"),
    [
        ({"prompt": "abc"}, "abc", 0),
        ({"messages": [{"role": "user", "content": "hi"}]}, "user\nhi\n", 1),
        ({"input": "hi", "instructions": "be brief"}, "be briefuser\nhi\n", 1),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, {"content": None}]}, None, 2),
    ],
)
def test_prompts_are_read(body: dict[str, Any], text: str | None, num_turns: int) -> None:
    found = read_prompt(json.dumps(body).encode())
    assert found is not None
    assert text is None or found.text == text
    assert len(found.turns) == num_turns


@pytest.mark.parametrize(
    "body", [[], {}, {"prompt": ["a", "b"]}, {"prompt": [[1]]}, {"messages": [1]}, {"prompt": [-1]}]
)
def test_what_is_no_single_prompt(body: Any) -> None:
    assert read_prompt(json.dumps(body).encode()) is None


def test_a_longer_conversation_begins_with_the_shorter_one() -> None:
    messages = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y" * 100}]
    first, second = (
        read_prompt(json.dumps({"tools": [{"type": "function"}], "messages": list}).encode())
        for list in (messages[:1], [*messages, messages[0]])
    )
    assert first is not None
    assert second is not None
    assert second.text.startswith(first.text)
    assert second.turns[: len(first.turns)] == first.turns
    ids = [block_ids(prompt.text.encode(), b"salt") for prompt in (first, second)]
    assert ids[1][: len(ids[0])] == ids[0] != []


def test_the_estimate_is_as_stated() -> None:
    assert [estimated(count) for count in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_the_target_that_a_request_brought_is_recorded(tmp_path: Path) -> None:
    target = str(Slo(0.3, 0.03))
    assert HeldSla.parse(target).slo == Slo(0.3, 0.03)
    path = tmp_path / "trace.jsonl"
    recorded(single(path), [seen(0.0, 1.0, slo=target), seen(1.0, 2.0)])
    assert [request.slo for request in read_trace(path).requests] == ["ttft.max<300ms,tpot.max<30ms", None]
