"""The open-loop client without a network: when requests leave, how answers are read, what a server's pages say."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.errors import ConfigError
from setpoint.tune.measure import EngineCounters, RequestLog
from setpoint.tune.replay.answer import Answer
from setpoint.tune.replay.host import cpu_times, cpus_beside, listener, machine_use
from setpoint.tune.replay.http import Address
from setpoint.tune.replay.server import ServerError, Target, read_counters
from setpoint.tune.replay.worker import PREPARED_S, Player, Sender
from setpoint.workload.trace import Trace, TraceHeader, TraceRequest

# --- when requests leave -----------------------------------------------------------------------------------------


class VirtualTime:
    """An asyncio clock that jumps to the next thing to do."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    async def sleep_until(self, when: float) -> None:
        if when > self.now:
            future = asyncio.get_running_loop().create_future()
            self._sleepers.append((when, len(self._sleepers), future))
            await future

    async def drive(self, until: asyncio.Future[Any]) -> None:
        while not until.done():
            for _ in range(10):  # let everyone who can run do so
                await asyncio.sleep(0)
            if self._sleepers and not until.done():
                self._sleepers.sort(key=lambda sleeper: sleeper[:2])
                self.now, _, future = self._sleepers.pop(0)
                if not future.done():
                    future.set_result(None)


def play(requests: list[TraceRequest], service_s: Any, stop_at: float | None = None) -> list[RequestLog]:
    """Logs of a player whose requests take `service_s(index)`."""

    async def run() -> list[RequestLog]:
        clock = VirtualTime()

        async def send(index: int, request: TraceRequest, due: float) -> RequestLog:
            await clock.sleep_until(due)
            sent = clock.now
            await clock.sleep_until(sent + service_s(index))
            return RequestLog(index, due, sent, "ok", ((clock.now, 1),), clock.now, output_tokens=1)

        player = Player(enumerate(requests), send, clock.sleep_until)
        playing = asyncio.ensure_future(player.run())
        if stop_at is not None:

            async def stop() -> None:
                await clock.sleep_until(stop_at)
                playing.cancel()

            asyncio.ensure_future(stop())  # noqa: RUF006
        await clock.drive(playing)
        return sorted(player.logs, key=lambda log: log.index)

    return asyncio.run(run())


def test_nobody_waits_for_anybody() -> None:
    """Open loop: arrivals do not depend on answers."""
    logs = play([TraceRequest(0.1 * i, 8, 1) for i in range(20)], lambda index: 100.0)
    assert [log.sent_s for log in logs] == pytest.approx([0.1 * i for i in range(20)])


def test_a_turn_waits_for_the_answer_before_it_and_for_the_pause() -> None:
    turns = [
        TraceRequest(0.0, 8, 1, session="a", turn=0),
        TraceRequest(1.0, 8, 1, session="a", turn=1, think_s=0.5),  # the answer comes at 3: not before 3.5
        TraceRequest(9.0, 8, 1, session="a", turn=2, think_s=0.5),  # the trace says 9
    ]
    logs = play(turns, lambda index: 3.0)
    assert [log.scheduled_s for log in logs] == pytest.approx([0.0, 3.5, 9.0])
    assert [log.sent_s for log in logs] == pytest.approx([0.0, 3.5, 9.0])


lines = st.lists(
    st.tuples(st.floats(0, 50), st.none() | st.sampled_from("abc"), st.none() | st.floats(0, 3)), max_size=25
)


@given(lines, st.lists(st.floats(0, 5), min_size=25, max_size=25))
@settings(max_examples=scaled(50), deadline=None)
def test_every_request_is_sent_once_at_its_time(rows: list[Any], spans: list[float]) -> None:
    rows.sort(key=lambda row: row[0])
    requests = [TraceRequest(at, 8, 1, session=session, think_s=think) for at, session, think in rows]
    logs = play(requests, lambda index: spans[index])
    assert [log.index for log in logs] == list(range(len(requests)))
    last: dict[str, float] = {}
    for log, request in zip(logs, requests, strict=True):
        due = request.arrival_s
        if request.session in last:
            due = max(due, last[request.session] + (request.think_s or 0.0))  # type: ignore[index]
        assert log.scheduled_s == pytest.approx(due)
        assert log.sent_s == pytest.approx(due, abs=PREPARED_S)
        if request.session is not None:
            assert log.finished_s is not None
            last[request.session] = log.finished_s


def test_what_is_under_way_is_dropped_when_stopped_and_nothing_follows() -> None:
    requests = [TraceRequest(0.0, 8, 1), TraceRequest(1.0, 8, 1), TraceRequest(9.0, 8, 1)]
    logs = play(requests, lambda index: (0.5, 100.0, 1.0)[index], stop_at=5.0)
    assert [log.index for log in logs] == [0]


# --- answers -----------------------------------------------------------------------------------------------------


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events)


def piece(text: str = "a", finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}


def usage(output: int, prompt: int = 5, cached: int = 2) -> dict[str, Any]:
    details = {"cached_tokens": cached}
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details}}


def read(*pieces: tuple[float, bytes], status: int = 200, wanted: int = 0, is_forced: bool = True) -> tuple[Any, ...]:
    answer = Answer(0.0)
    for at, body in pieces:
        answer.feed(status, body, at)
    return answer, *answer.outcome(status, wanted, is_forced)


def test_a_stream_without_counts_is_a_token_an_event() -> None:
    body = sse(piece("Hi"), piece(""), piece("!", "length"), b"[DONE]")
    answer, status, _ = read((0.5, body))
    assert status == "ok"
    assert answer.deliveries == [(0.5, 1), (0.5, 1)]
    assert answer.output_tokens == 2


def test_running_counts_tell_how_many_tokens_an_event_brought() -> None:
    answer, status, _ = read(
        (0.1, sse(piece("a", **usage(1)))),
        (0.2, sse(piece("bcd", **usage(4)))),
        (0.3, sse(piece("", "length", **usage(6)), {"choices": [], **usage(6)}, b"[DONE]")),
        wanted=6,
    )
    assert status == "ok"
    assert answer.deliveries == [(0.1, 1), (0.2, 3), (0.3, 2)]
    assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (5, 2, 6)


def test_the_last_usage_has_the_last_word() -> None:
    answer, status, _ = read((0.1, sse(piece("a"), piece("b", "stop"), {"choices": [], **usage(5)}, b"[DONE]")))
    assert status == "ok"
    assert len(answer.deliveries) == 2
    assert answer.output_tokens == 5


def test_token_ids_are_counted_and_chat_deltas_too() -> None:
    answer, _, _ = read((0.1, sse({"choices": [{"index": 0, "text": "", "token_ids": [5, 6]}]})))
    assert answer.deliveries == [(0.1, 2)]
    answer, _, _ = read(
        (0.1, sse({"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "x"}}]}))
    )
    assert answer.deliveries == [(0.1, 1)]


@given(st.lists(st.integers(1, 60), max_size=20))
@settings(max_examples=scaled(50))
def test_it_does_not_matter_how_the_network_cuts_it(cuts: list[int]) -> None:
    body = b": ping\n\n" + sse(piece("é", **usage(1)), piece("b", "stop", **usage(3)), b"[DONE]").replace(
        b"\n", b"\r\n"
    )
    pieces, place = [], 0
    for cut in cuts:
        pieces.append((0.1, body[place : place + cut]))
        place += cut
    answer, status, _ = read(*pieces, (0.1, body[place:]))
    assert status == "ok"
    assert [count for _, count in answer.deliveries] == [1, 2]


@pytest.mark.parametrize(
    ("status", "body", "expected", "says"),
    [
        (429, b'{"error": {"message": "full"}}', "rejected", "429: full"),
        (503, b"<html>", "rejected", "503: <html>"),
        (504, b'{"detail": "late"}', "timeout", "504"),
        (400, b'{"error": {"message": "bad\\nfield"}}', "error", "400: bad field"),
        (200, sse({"error": {"message": "the engine failed"}}), "error", "the engine failed"),
        (200, sse(piece("a")), "error", "the answer broke off"),
        (200, sse(b"[DONE]"), "error", "an answer without tokens"),
        (200, sse(b"{"), "error", "not an event"),
        (200, sse([1]), "error", "not an event"),
        (200, sse(piece("a", "stop"), b"[DONE]"), "short", "1 of 6 tokens"),
    ],
)
def test_what_is_no_whole_answer_has_its_name(status: int, body: bytes, expected: str, says: str) -> None:
    _, found, error = read((0.1, body), status=status, wanted=6)
    assert found == expected
    assert error.startswith(says)


def test_an_answer_may_end_by_itself_where_nothing_forces_it() -> None:
    assert read((0.1, sse(piece("a", "stop"), b"[DONE]")), wanted=6, is_forced=False)[1] == "ok"


# --- servers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://api.example.org/llm/v1", "https://api.example.org:443/llm"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_urls_as_people_write_them(url: str, base: str) -> None:
    assert Address.parse(url).base == base


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://a:b", "http://u@h", "http://h?x=1"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Address.parse(url)


def test_counters_of_the_three_servers() -> None:
    ours = (
        '# HELP x y\nvllm:prompt_tokens_total{engine="0"} 5.0\nvllm:generation_tokens_total{engine="0"} 7.0\n'
        'vllm:request_success_total{finished_reason="stop"} 1.0\n'
        'vllm:request_success_total{finished_reason="length"} 2.0\n'
        'vllm:num_preemptions_total{engine="0"} 0.0\nsetpoint_requests_rejected_total{reason="queue_full"} 4.0\n'
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="256"} 1.0\n'
    )
    assert read_counters(ours) == EngineCounters(5, 7, 3, 4, 0, 4096)
    assert read_counters("llamacpp:tokens_predicted_total 9\nbad line\nx nan?\n") == EngineCounters(generation_tokens=9)


def test_a_request_that_cannot_fit_is_named_before_anything_is_sent() -> None:
    target = Target(Address.parse("h:1"), "m", "setpoint", max_model_len=100)
    trace = Trace(TraceHeader("x"), [TraceRequest(0.0, 90, 10), TraceRequest(1.0, 150, 60)])
    with pytest.raises(ServerError, match=r"request 2 of the trace has 150 \+ 60 tokens.*holds 100.*--lengths 2.1"):
        target.check(trace)
    target.check(Trace(TraceHeader("x"), trace.requests[:1]))


# --- the machine -------------------------------------------------------------------------------------------------


def fake_proc(root: Path, tick: int) -> Path:
    """Two CPUs, a client (10), an engine (20) with a child (21), and somebody else (30)."""
    proc = root / str(tick)
    for pid, parent, ticks in ((10, 1, 10), (20, 1, 50), (21, 20, 10), (30, 1, 20)):
        (proc / str(pid)).mkdir(parents=True)
        spent = ticks * tick
        (proc / str(pid) / "stat").write_text(f"{pid} (a (b) c) S {parent} 0 0 0 0 0 0 0 0 0 {spent} 0 0 0 0 0")
    busy, idle, steal = 45 * tick, 50 * tick, 5 * tick
    cpus = "".join(f"cpu{i} {busy} 0 0 {idle} 0 0 0 {steal} 0 0\n" for i in range(2))
    (proc / "stat").write_text(f"cpu 0 0 0 0\n{cpus}intr 1\n")
    return proc


def test_who_used_the_cpus(tmp_path: Path) -> None:
    before, after = (cpu_times([10], 20, fake_proc(tmp_path, tick)) for tick in (1, 2))
    use = machine_use(before, after)
    assert use is not None
    assert use.steal == pytest.approx(0.05)
    assert use.others == pytest.approx(0.1)  # 90 busy ticks of 200, of which 70 are ours
    remote = machine_use(*(cpu_times([10], None, tmp_path / str(tick)) for tick in (1, 2)))
    assert remote is not None
    assert remote.others is None
    assert machine_use(before, before) is None
    assert cpu_times([10], 20, tmp_path / "none") is None


def test_the_engine_is_found_by_its_port_and_left_its_cpus(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, 1)
    (proc / "net").mkdir()
    row = "   0: 0100007F:{:04X} 00000000:0000 {} 00000000:00000000 00:00000000 00000000     0        0 4711 1"
    lines = ["  sl  local_address", row.format(8000, "0A"), row.format(8001, "01")]
    (proc / "net" / "tcp").write_text("\n".join(lines))
    (proc / "20" / "fd").mkdir()
    (proc / "20" / "fd" / "3").symlink_to("socket:[4711]")
    assert listener(8000, proc) == 20
    assert listener(8001, proc) is None
    task = proc / "20" / "task" / "20"
    task.mkdir(parents=True)
    (task / "status").write_text("Name:\tx\nCpus_allowed_list:\t0-1023\n")
    assert cpus_beside(20, proc) == []
    assert cpus_beside(None, proc) == []


def test_the_target_of_a_request_is_sent_to_a_server_that_can_hold_it() -> None:
    job = {"address": asdict(Address.parse("http://127.0.0.1:1")), "headers": {}, "pool": None, "block_size": 16}
    job |= {"salt": "s", "items_per_token": 1.0, "first": None, "overhead_tokens": 0, "model": "m", "fields": {}}
    job |= {"seeds": False, "path": "/v1/completions"}

    def sent(slo: str | None, *, is_ours: bool) -> object:
        sender = Sender(job | {"sessions": is_ours}, 0.0, lambda at: None)
        return json.loads(sender._body(0, TraceRequest(0.0, 4, 2, slo=slo))[1]).get("slo")

    assert sent("ttft.p95<300ms", is_ours=True) == "ttft.p95<300ms"
    assert sent("ttft.p95<300ms", is_ours=False) is None  # others may refuse what they do not know
    assert sent("e2e.p95<3s", is_ours=True) is None  # judged here, and refused there
    assert sent(None, is_ours=True) is None
