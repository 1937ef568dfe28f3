"""The open-loop client against a real server: everything adds up, sessions are kept, and what goes wrong is said."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from setpoint.tune.metrics import Targets, summarize
from setpoint.tune.replay.client import ReplayOptions, replay
from setpoint.tune.replay.run_file import read_run
from setpoint.tune.replay.server import ServerError, Surveyor
from setpoint.tune.replay.urgency import NICE
from setpoint.workload.trace import Trace, TraceHeader, TraceRequest, write_trace

SETPOINT = [sys.executable, "-m", "setpoint.cli.main"]


def small_trace(seconds: float = 2.0) -> Trace:
    """20 requests: four sessions of three turns behind a shared start, and eight by themselves."""
    requests = []
    for s in range(4):
        ids: tuple[int, ...] = (1, 2, 100 + s)
        for turn in range(3):
            at = seconds * (0.05 * s + 0.3 * turn)
            think = 0.05 if turn else None
            requests.append(
                TraceRequest(
                    at, 16 * len(ids) + 5, 6, ids, session=f"s{s}", turn=turn, think_s=think, class_name="chat"
                )
            )
            ids = (*ids, 1000 + 10 * s + turn, 2000 + 10 * s + turn)
    requests += [TraceRequest(seconds * 0.1 * i, 20 + i, 1 + 3 * i, class_name="single") for i in range(8)]
    return Trace(TraceHeader("made here"), sorted(requests, key=lambda request: request.arrival_s))


@pytest.fixture(scope="module")
def surveyor(server_url: str) -> Iterator[Surveyor]:
    with Surveyor(server_url) as asking:
        yield asking


@pytest.mark.parametrize("processes", [1, 2])
def test_tokens_and_requests_reconcile_with_the_server(surveyor: Surveyor, processes: int) -> None:
    trace = small_trace()
    target = surveyor.target(temperature=0.8)
    assert target.kind == "setpoint"
    assert target.pool is not None
    run = replay(surveyor, target, trace, ReplayOptions(salt=f"test-{processes}", processes=processes))
    assert [log.status for log in run.logs] == ["ok"] * 20
    assert [log.prompt_tokens for log in run.logs] == [request.input_tokens for request in trace.requests]
    assert [log.output_tokens for log in run.logs] == [request.output_tokens for request in trace.requests]
    assert [log.counted_tokens for log in run.logs] == [request.output_tokens for request in trace.requests]
    said = {verdict.tripwire: verdict.outcome for verdict in run.verdicts}
    assert said["accounting"] == said["load reached"] == said["KV pool"] == said["failures"] == said["clock"] == "ok"
    assert run.after.finished - run.before.finished == 20  # type: ignore[operator]
    last: dict[str, float] = {}
    for log in run.logs:
        assert log.sent_s is not None
        assert log.sent_s >= log.scheduled_s - 1e-6
        if log.session is not None:
            assert log.scheduled_s >= last.get(log.session, -1.0) + (0.05 if log.turn else 0.0) - 1e-6
            last[log.session] = log.finished_s or 0.0
            if log.turn:
                assert log.cached_tokens >= 48  # the turn before it is in the real cache
    assert run.provenance["client"]["processes"] == processes
    assert run.provenance["client"]["urgency"] in ("real time", f"nice {NICE}", "none")


def test_equal_salts_are_found_in_the_cache_and_new_ones_are_not(surveyor: Surveyor) -> None:
    trace = Trace(TraceHeader("one"), [TraceRequest(0.0, 64, 2, (7, 8, 9))])
    target = surveyor.target(temperature=0.0)
    cached = [
        replay(surveyor, target, trace, ReplayOptions(salt=salt, warm_up=False)).logs[0].cached_tokens
        for salt in ("first", "first", "second")
    ]
    assert cached[0] == cached[2] == 0
    assert cached[1] >= 32


def test_a_server_that_is_told_nothing_of_ids_gets_text(surveyor: Surveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Surveyor, "_tokenize", lambda *_: None)
    target = surveyor.target(temperature=0.8)
    assert target.pool is None
    trace = Trace(TraceHeader("text"), [TraceRequest(0.01 * i, 100, 3, (i % 2, 5)) for i in range(6)])
    run = replay(surveyor, target, trace, ReplayOptions(salt="text"))
    assert [log.status for log in run.logs] == ["ok"] * 6
    for log in run.logs:
        assert log.prompt_tokens == pytest.approx(100, rel=0.35)


def test_a_timeout_is_a_miss(surveyor: Surveyor) -> None:
    trace = Trace(TraceHeader("slow"), [TraceRequest(0.0, 20, 200), TraceRequest(0.0, 20, 1)])
    run = replay(surveyor, surveyor.target(temperature=0.0), trace, ReplayOptions(salt="slow", timeout_s=0.02))
    assert run.logs[0].status == "timeout"
    assert summarize(run, Targets.parse(["e2e.p50<9s"])).attainment in (0.0, 0.5)


def test_a_trace_beyond_the_context_is_named_before_it_starts(surveyor: Surveyor) -> None:
    target = surveyor.target(temperature=0.0)
    assert target.max_model_len is not None
    trace = Trace(TraceHeader("long"), [TraceRequest(0.0, 8, 1), TraceRequest(0.0, target.max_model_len, 1)])
    with pytest.raises(ServerError, match="request 2 of the trace"):
        replay(surveyor, target, trace, ReplayOptions(salt="long"))


# --- a server of another kind, which can do little ---------------------------------------------------------------


class PlainServer:
    """Chat only, no token ids, no counts while streaming, and it refuses what it does not know."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.bodies: list[dict[str, Any]] = []
        self.port = 0
        self._ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self.loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (int(line[15:]) for line in head.lower().split("\r\n") if line[:15] == "content-length:"), 0
                )
                body = json.loads(await reader.readexactly(length)) if length else {}
                status, answer = self._answer(head.split()[1], body)
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(answer)}\r\n\r\n".encode() + answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path == "/v1/models":
            return 200, b'{"data": [{"id": "plain"}]}'
        if path != "/v1/chat/completions":
            return 404, b"{}"
        unknown = set(body) - {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
        if unknown or body["stream_options"] != {"include_usage": True}:
            return 400, b'{"error": {"message": "I do not know that field"}}'
        self.bodies.append(body)
        words = len(body["messages"][0]["content"].split())
        count = min(body["max_tokens"], 3)
        pieces: list[Any] = [{"choices": [{"delta": {"content": "x"}, "finish_reason": None}]}] * count
        pieces.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        pieces.append({"choices": [], "usage": {"prompt_tokens": 10 + 2 * words, "completion_tokens": count}})
        return 200, b"".join(b"data: " + json.dumps(p).encode() + b"\n\n" for p in pieces) + b"data: [DONE]\n\n"


def test_a_server_that_can_do_little_is_measured_as_it_is() -> None:
    server = PlainServer()
    with Surveyor(f"http://127.0.0.1:{server.port}/v1") as asking:
        target = asking.target(temperature=0.5)
        assert target.path == "/v1/chat/completions"
        assert target.items_per_token == pytest.approx(0.5)
        assert target.overhead_tokens == 10
        assert not target.is_forced
        assert any("ignore_eos" in note for note in target.notes)
        trace = Trace(TraceHeader("x"), [TraceRequest(0.01 * i, 60, 8) for i in range(5)])
        run = replay(asking, target, trace, ReplayOptions(salt="s"))
    assert [(log.status, log.prompt_tokens, log.output_tokens) for log in run.logs] == [("ok", 60, 3)] * 5
    assert {verdict.tripwire for verdict in run.verdicts if verdict.outcome == "unknown"} >= {"accounting", "KV pool"}


# --- the command -------------------------------------------------------------------------------------------------


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*SETPOINT, "bench", "serve", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    write_trace(small_trace(), path)
    return path


def test_the_command_writes_table_document_page_and_log(server_url: str, trace_file: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"run.{name}" for name in ("json", "html", "log")}
    flags = [part for name, path in files.items() for part in (f"--{name}", path)]
    done = bench(server_url, "--trace", trace_file, "--slo", "ttft.p95<60s,tpot.p95<60s", *flags)
    assert done.returncode in (0, 5)  # 5: others use this machine, which is what a tripwire is for
    assert "goodput" in done.stdout
    assert "20 requests (20 ok)" in done.stdout
    document = json.loads(files["json"].read_text())
    assert document["valid"] == (done.returncode == 0)
    assert document["summary"]["attainment"] == 1.0
    assert set(document["classes"]) == {"chat", "single"}
    assert all(term["value"] < 60 for term in document["terms"])
    page = files["html"].read_text()
    assert page.count("<svg") == 5
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "").replace(server_url, "")
    assert "<script" not in page
    run = read_run(files["log"])
    assert (
        json.loads(json.dumps(summarize(run, Targets.parse(["ttft.p95<60s,tpot.p95<60s"])).document))
        == document["summary"]
    )


def test_an_unmet_slo_has_its_own_exit_code(server_url: str, trace_file: Path) -> None:
    done = bench(server_url, "--trace", trace_file, "--slo", "ttft.p95<1us", "--json", "-")
    document = json.loads(done.stdout)
    assert done.returncode == (1 if document["valid"] else 5)
    assert not document["terms"][0]["met"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"url": "http://127.0.0.1:9"}, "no server answers"),
        ({"url": "ftp://x"}, "not a server's URL"),
        ({"slo": "fast"}, "not of the form"),
        ({"flags": ["--find-capacity"]}, "--find-capacity needs"),
        ({"line": '{"t": 1, "in": 0, "out": 1}'}, "line 3"),
        ({"line": '{"t": 90, "in": 500000, "out": 1}'}, "request 21 of the trace has 500000 + 1 tokens"),
        ({"flags": ["--model", "gpt"]}, "no model 'gpt'"),
        ({"flags": ["--cpus", "x"]}, "--cpus"),
    ],
)
def test_what_is_wrong_is_one_line(server_url: str, trace_file: Path, change: dict[str, Any], says: str) -> None:
    if "line" in change:
        lines = trace_file.read_text().splitlines()
        lines.insert(2 if "line 3" in says else len(lines), change["line"])
        trace_file.write_text("\n".join(lines))
    slo = ["--slo", change["slo"]] if "slo" in change else []
    done = bench(change.get("url", server_url), "--trace", trace_file, *slo, *change.get("flags", []))
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("setpoint: ")
    assert says in last


def test_ctrl_c_writes_what_there_is(server_url: str, tmp_path: Path) -> None:
    path, out = tmp_path / "t.jsonl", tmp_path / "run.json"
    write_trace(Trace(TraceHeader("long"), [TraceRequest(0.2 * i, 20, 2) for i in range(500)]), path)
    command = [*SETPOINT, "bench", "serve", server_url, "--trace", str(path), "--json", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "of 500 requests" in line:
            break
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "cut short" in output
    document = json.loads(out.read_text())
    assert document["cut_short"]
    assert not document["valid"]
    assert 1 <= document["summary"]["arrivals"] < 500


def test_a_capacity_is_searched(server_url: str, trace_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    flags = ["--slo", "ttft.p95<60s", "--duration", 1, "--max-runs", 4, "--json", out, "--html", tmp_path / "c.html"]
    done = bench(server_url, "--trace", trace_file, "--find-capacity", "--rate-scale", 0.5, *flags)
    assert done.returncode in (1, 5)  # no load of four such runs fails: no capacity, and it says so
    document = json.loads(out.read_text())
    assert document["capacity"]["factor"] is None
    assert document["slo"] == {"all": "ttft.p95<60000ms"}
    factors = [point["factor"] for point in document["capacity"]["points"]]
    assert factors == [0.5 * 2**i for i in range(len(factors))]
    assert "No capacity" in (tmp_path / "c.html").read_text()
