"""Traffic recorded by our own server and by the proxy: what passes is unchanged, what is kept is lengths and hashes."""

from __future__ import annotations

import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from house import TOKENIZER, House, chat, completion, until

from setpoint.cli.recording import record_server
from setpoint.config import ServerConfig
from setpoint.errors import ConfigError
from setpoint.server.auth import KeyRing
from setpoint.server.run import bind
from setpoint.workload.describe import describe
from setpoint.workload.record import BLOCK_TOKENS, Recording
from setpoint.workload.record_file import Parts
from setpoint.workload.record_proxy import RecordingProxy, check_upstream
from setpoint.workload.trace import TraceHeader, TraceRequest, read_trace

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY = "sk-a-key-that-must-not-be-kept"
SECRET = "what the client says is nobody's business, and longer than a block of the cache " * 2


# --- serve --record ----------------------------------------------------------------------------------------------


@contextmanager
def recording_house(folder: Path, *, keeps_text: bool = False, **options: Any) -> Iterator[House]:
    house = House(keeps_messages=keeps_text, **options)
    recording = record_server(house.context, ServerConfig(record=str(folder), record_text=keeps_text))
    with house:
        yield house
    recording.close()


def requests_of(folder: Path) -> list[TraceRequest]:
    (file,) = folder.iterdir()
    return read_trace(file).requests


def test_a_server_records_its_traffic(tmp_path: Path) -> None:
    with recording_house(tmp_path / "new") as house:
        for _ in range(2):
            answer = house.post(CHAT, chat(SECRET, max_tokens=7, ignore_eos=True, session_id="alice")).json()
        house.post(COMPLETIONS, completion(["one", SECRET], max_tokens=3, n=2, ignore_eos=True, stream=True))
        house.post(COMPLETIONS, completion("refused", max_tokens=-1))
        until(lambda: house.is_quiet)
    found = requests_of(tmp_path / "new")
    assert [(r.class_name, r.turn, r.output_tokens) for r in found] == [
        ("chat", 0, 7),
        ("chat", 1, 7),
        ("completion", 0, 6),
        ("completion", 0, 6),
    ]
    assert found[0].input_tokens == answer["usage"]["prompt_tokens"]
    assert found[0].hash_ids == found[1].hash_ids
    assert len(found[0].hash_ids) == found[0].input_tokens // BLOCK_TOKENS
    assert found[0].session == found[1].session != "alice"
    assert found[0].think_s is None
    assert found[1].think_s is not None
    (file,) = (tmp_path / "new").iterdir()
    assert "nobody" not in file.read_text()
    assert "alice" not in file.read_text()
    assert describe(read_trace(file))["requests"] == 4


def test_text_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    with recording_house(tmp_path, keeps_text=True) as house:
        house.post(CHAT, chat("in words", max_tokens=2))
        house.post(COMPLETIONS, completion("as it is", max_tokens=2))
        house.post(COMPLETIONS, completion([1, 2, 3], max_tokens=2))
    assert [request.messages for request in requests_of(tmp_path)] == [
        ({"role": "user", "content": "in words"},),
        ({"role": "user", "content": "as it is"},),
        None,
    ]


def test_a_client_that_leaves_is_recorded_with_what_it_got(tmp_path: Path) -> None:
    with recording_house(tmp_path, step_s=0.005) as house:
        with house.client() as client, client.stream("POST", CHAT, json=chat(stream=True, max_tokens=900)) as answer:
            next(answer.iter_bytes())
        until(lambda: house.is_quiet)
    (request,) = requests_of(tmp_path)
    assert 1 <= request.output_tokens < 900


def test_a_full_disk_fails_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with recording_house(tmp_path) as house:
        house.post(CHAT, chat(max_tokens=2))
        until(lambda: len(next(iter(tmp_path.iterdir())).read_bytes().splitlines()) == 2)
        monkeypatch.setattr("setpoint.workload.record_file._write", full)
        for _ in range(3):
            assert house.post(CHAT, chat(max_tokens=2)).status_code == 200
        until(lambda: any(line["event"] == "recording" for line in house.log_lines()))
        monkeypatch.undo()
    assert len(requests_of(tmp_path)) == 1
    (warning,) = (line for line in house.log_lines() if line["event"] == "recording")
    assert "No space left" in warning["note"]


def test_a_directory_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--record"):
        record_server(House().context, ServerConfig(record=str(tmp_path / "file" / "x")))
    with pytest.raises(ConfigError, match="needs --record"):
        ServerConfig(record_text=True)


# --- trace record ------------------------------------------------------------------------------------------------


class Front:
    """The proxy before an upstream, on a port of its own; `requests` reads what it has recorded."""

    def __init__(self, upstream: str, path: Path, **options: Any) -> None:
        self.path = path
        parts = Parts(lambda n: path if n == 1 else None, TraceHeader("t"), max_bytes=1 << 20)
        self.recording = Recording(parts, lambda: 0.0, lambda message: None)
        proxy = RecordingProxy(check_upstream(upstream), self.recording, time.monotonic, **options)
        config = uvicorn.Config(proxy, ws="none", log_config=None, access_log=False, date_header=False)
        self.server = uvicorn.Server(config)
        self.socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self) -> Front:
        self._thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        self.recording.close()

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 30, **options})

    @property
    def requests(self) -> list[TraceRequest]:
        return read_trace(self.path).requests if self.path.exists() else []


class Script:
    """An upstream that reads one request, sends prepared pieces, and keeps what it was sent."""

    def __init__(self, *pieces: bytes, breaks_off: bool = False) -> None:
        self._pieces = pieces
        self._breaks_off = breaks_off
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.next = threading.Semaphore(0)  # one for each piece
        self.received = b""
        self.was_left = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        client, _ = self._socket.accept()
        while b"\r\n\r\n" not in self.received:
            self.received += client.recv(65536)
        head, _, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        while length is not None and len(body) < int(length[1]):
            body += client.recv(65536)
        for piece in self._pieces:
            self.next.acquire(timeout=20)
            client.sendall(piece)
        client.settimeout(20)
        if not self._breaks_off and client.recv(1) == b"":
            self.was_left.set()
        client.close()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Own: 1\r\nConnection: X-Hop\r\nX-Hop: 2\r\n"
CHUNKED = SSE_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"delta": {"content": "caf\xc3\xa9"}}]}\r\n\r\n'


def test_bytes_pass_at_once_and_unchanged(tmp_path: Path) -> None:
    """Each piece arrives before the upstream sends the next one."""
    odd = b": a comment\n\ndata: not json\n\n" + EVENT[:30]
    script = Script(CHUNKED + chunk(EVENT), chunk(odd), chunk(EVENT[30:]) + b"0\r\n\r\n")
    with Front(script.url, tmp_path / "t") as front, front.client() as client:
        script.next.release()
        with client.stream("POST", CHAT, json=chat(), headers={"TE": "trailers"}) as answer:
            pieces = answer.iter_raw()
            got = [next(pieces)]
            assert got == [EVENT]
            for expected in (odd, EVENT[30:]):
                script.next.release()
                got.append(next(pieces))
                assert got[-1] == expected
            assert list(pieces) == []
            assert answer.headers["x-own"] == "1"
            assert "x-hop" not in answer.headers
    assert b"trailers" not in script.received
    (request,) = front.requests
    assert request.output_tokens == 3  # twice five bytes, by the rule of four a token


def test_our_own_server_behind_it_says_the_same(tmp_path: Path) -> None:
    """Streams and bodies, byte for byte but for ids and times of the two requests."""
    with House() as house, Front(house.url, tmp_path / "t") as front:
        for path, body in (
            (CHAT, chat(SECRET, seed=3, max_tokens=30)),
            (CHAT, chat(SECRET, seed=3, max_tokens=30, stream=True, stream_options={"include_usage": True})),
            (COMPLETIONS, completion(seed=4, max_tokens=20, stream=True, stream_interval=64)),
            (COMPLETIONS, completion(temperature=99)),
            ("/v1/nothing", {}),
        ):
            house.post(path, body)  # both find it in the cache
            with house.client() as direct, front.client() as client:
                answers = [one.post(path, json=body) for one in (direct, client)]
            assert len({answer.status_code for answer in answers}) == 1
            ids = rb'"(id|created)": ?("[^"]*"|\d+)'
            first, second = (re.sub(ids, b"", answer.content) for answer in answers)
            assert first == second
        with front.client() as client:
            assert client.get("/v1/models").json() == house.get("/v1/models").json()
    assert [(r.class_name, r.output_tokens) for r in front.requests][:2] == [("chat", 30), ("chat", 30)]
    assert len(front.requests) == 3
    assert front.requests[0].hash_ids == front.requests[1].hash_ids != ()


def test_no_key_and_no_text_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with House(keys=KeyRing([KEY])) as house, Front(house.url, tmp_path / "t") as front, front.client() as client:
        assert client.post(CHAT, json=chat(SECRET)).status_code == 401
        for name, value in (("Authorization", f"Bearer {KEY}"),):
            assert client.post(CHAT, json=chat(SECRET, max_tokens=4), headers={name: value}).status_code == 200
    (request,) = front.requests
    assert request.messages is None
    written = (tmp_path / "t").read_text() + "".join(capfd.readouterr())
    for word in (KEY, "Bearer", "nobody", "authorization"):
        assert word not in written


def test_a_client_that_leaves_ends_the_upstream_request(tmp_path: Path) -> None:
    with House(step_s=0.005) as house, Front(house.url, tmp_path / "t") as front:
        with front.client() as client, client.stream("POST", CHAT, json=chat(stream=True, max_tokens=900)) as answer:
            next(answer.iter_raw())
            assert house.engine.stats().num_running == 1
        until(lambda: house.is_quiet)
        until(lambda: front.recording.num_written == 1)
    assert 0 < front.requests[0].output_tokens < 900


def test_a_client_that_leaves_before_the_answer_does_too(tmp_path: Path) -> None:
    script = Script()
    with Front(script.url, tmp_path / "t") as front, front.client(timeout=0.3) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=chat())
        assert script.was_left.wait(10)
    assert front.requests == []


def test_an_upstream_that_breaks_off_is_not_made_whole(tmp_path: Path) -> None:
    script = Script(CHUNKED + chunk(EVENT), breaks_off=True)
    script.next.release()
    with Front(script.url, tmp_path / "t") as front, front.client() as client, pytest.raises(httpx.RemoteProtocolError):
        client.post(CHAT, json=chat())
    assert front.requests[0].output_tokens == 2


def test_compressed_answers_are_read_and_passed_as_they_are(tmp_path: Path) -> None:
    body = gzip.compress(json.dumps({"usage": {"prompt_tokens": 40, "completion_tokens": 9}}).encode())
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    script = Script(head + body)
    script.next.release()
    with Front(script.url, tmp_path / "t") as front, front.client() as client:
        headers = {"Accept-Encoding": "br, gzip, zstd"}
        with client.stream("POST", CHAT, json=chat(SECRET), headers=headers) as answer:
            assert b"".join(answer.iter_raw()) == body
    assert b"accept-encoding: gzip\r\n" in script.received.lower()
    (request,) = front.requests
    assert (request.input_tokens, request.output_tokens) == (40, 9)
    assert len(request.hash_ids) == 2  # no more than the tokens that the upstream counts


def test_a_tokenizer_counts_where_the_upstream_does_not(tmp_path: Path) -> None:
    script = Script(CHUNKED + chunk(EVENT) + b"0\r\n\r\n")
    script.next.release()

    def encode(text: str) -> list[int]:
        return TOKENIZER.encode(text, add_special_tokens=False)

    with Front(script.url, tmp_path / "t", encode=encode, keeps_text=True) as front, front.client() as client:
        client.post(COMPLETIONS, json=completion("hello there, you"))
    (request,) = front.requests
    assert (request.input_tokens, request.output_tokens) == (len(encode("hello there, you")), 5)
    assert request.messages == ({"role": "user", "content": "hello there, you"},)


def test_what_is_not_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setpoint.workload.record_proxy.MAX_BODY_BYTES", 1000)
    closed = bind("127.0.0.1", 0)
    with Front(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "t") as front, front.client() as client:
        assert client.post(CHAT, json=chat()).status_code == 502
        assert client.post(CHAT, json=chat("x" * 2000)).status_code == 413
        assert client.post(CHAT, json=chat(), headers={"Host": "evil.example:80"}).status_code == 403
        monkeypatch.setattr("setpoint.workload.record_proxy.MAX_BUFFERED_BYTES", 10)
        assert client.post(CHAT, json=chat()).status_code == 503
        monkeypatch.setattr("setpoint.workload.record_proxy.MAX_CONCURRENT", 0)
        assert client.post(CHAT, json=chat()).status_code == 503
    assert front.requests == []


@pytest.mark.parametrize(
    "url", ["ftp://a.b", "api.openai.com", "http://", "http://u:p@a.b", "http://a.b?q=1", "http://a.b:x", "file:///etc"]
)
def test_upstreams_are_http_without_credentials(url: str) -> None:
    with pytest.raises(ConfigError, match="--upstream"):
        check_upstream(url)


def test_a_version_stands_once_in_the_path(tmp_path: Path) -> None:
    with House() as house:
        for number, base in enumerate((house.url, house.url + "/", house.url + "/v1", house.url + "/v1/")):
            with Front(base, tmp_path / str(number)) as front, front.client() as client:
                assert client.get("/v1/models").status_code == 200


def test_ctrl_c_closes_the_file_and_a_kill_leaves_it_readable(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("setpoint")
    for number, sent in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)):
        path = tmp_path / f"{number}.jsonl"
        with House() as house:
            command = [str(program), "trace", "record", "--upstream", house.url, "--port", "0", "--output", str(path)]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert process.stderr is not None
            url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
            assert url is not None
            for _ in range(2):
                httpx.post(url[0] + CHAT, json=chat(max_tokens=3), timeout=30)
            until(lambda path=path: len(path.read_bytes().splitlines()) == 3)
            process.send_signal(sent)
            said = process.communicate(timeout=20)[1]
        assert len(read_trace(path).requests) == 2
        assert ('"order"' in path.read_text()) is (sent == signal.SIGKILL)
        if sent != signal.SIGKILL:
            assert (process.returncode, "2 requests" in said) == (0, True), said
