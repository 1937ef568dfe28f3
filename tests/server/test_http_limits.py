"""RX-1 and friends: sizes, chunks, encodings, smuggling, slow clients, full queues."""

from __future__ import annotations

import gzip
import json
import resource
import socket
import threading
from collections.abc import Iterator

import pytest
from canary import Canary, assert_clean
from house import House, chat, completion, raw_request, read_response, until

from setpoint.engine.scheduler import SchedulerLimits

PATH = "/v1/completions"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def error_of(data: bytes) -> dict[str, object]:
    error = json.loads(data.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code", "reason"}
    assert_clean(data.decode("latin-1"))
    return error


def send(house: House, *parts: bytes) -> tuple[int, bytes]:
    with house.connect() as sock:
        try:
            for part in parts:
                sock.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before everything was sent
        return read_response(sock)


def test_body_is_refused_on_its_declared_length(house: House, canary: Canary) -> None:
    for length in (16 * 2**20 + 1, 2**40, 10**30):
        status, data = send(house, HEAD + f"Content-Length: {length}\r\n\r\n".encode())  # nothing of it is sent
        assert status in (413, 400)
        assert length > 2**62 or (status, error_of(data)["reason"]) == (413, "body_too_large")


def test_body_is_refused_while_it_streams(house: House, canary: Canary) -> None:
    chunk = b"%x\r\n" % 2**18 + b" " * 2**18 + b"\r\n"
    status, data = send(house, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 66)
    assert (status, error_of(data)["reason"]) == (413, "body_too_large")


def test_largest_body_is_read(house: House) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    padded = body + b" " * (16 * 2**20 - len(body))
    response = house.client().post(PATH, content=padded, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


def test_long_prompts_are_refused_before_they_are_tokenised(house: House) -> None:
    response = house.post(PATH, completion("x" * 15_000_000))
    assert response.json()["error"]["reason"] == "context_length_exceeded"
    assert "at least" in response.json()["error"]["message"]


def test_many_chunks(house: House, canary: Canary) -> None:
    """100 times a million tiny chunks: refused at 65,536, and memory does not grow with them: 9 GiB were sent."""
    flood = b"1\r\n \r\n" * 70_000

    def attack() -> None:
        status, data = send(house, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[flood] * 15)
        assert status in (413, 0)  # 0: the connection was reset while we still sent
        assert status == 0 or error_of(data)["reason"] == "body_too_large"

    for _ in range(10):
        attack()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(90):
        attack()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= 8 * 1024  # KiB


def test_few_chunks_are_fine(house: House) -> None:
    body = json.dumps(completion(max_tokens=1)).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    status, _ = send(house, HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert status == 200


@pytest.mark.parametrize(
    "lines",
    [
        b"X-Big: " + b"a" * 70_000,
        b"".join(b"X-%d: %s\r\n" % (i, b"b" * 1000) for i in range(70)).removesuffix(b"\r\n"),
        b"".join(b"X-%d: 1\r\n" % i for i in range(101)).removesuffix(b"\r\n"),
        b"X-Endless: " + b"c" * 2_000_000,
        b"Cookie: " + b"; ".join(b"k%d=v" % i for i in range(20_000)),
    ],
)
def test_headers_too_large(house: House, canary: Canary, lines: bytes) -> None:
    status, data = send(house, b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n" + lines + b"\r\n\r\n")
    assert status in (431, 0)
    assert status == 0 or error_of(data)["reason"] == "headers_too_large"


def test_header_fields_up_to_the_limit(house: House) -> None:
    lines = b"".join(b"X-%d: 1\r\n" % i for i in range(98))
    status, _ = send(house, b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + lines + b"\r\n")
    assert status == 200


def test_long_url(house: House) -> None:
    status, data = send(house, b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert status in (431, 0)
    assert status == 0 or error_of(data)["reason"] == "headers_too_large"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x"])
def test_compressed_bodies_are_refused(house: House, encoding: str) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    response = house.client().post(PATH, content=bomb, headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["param"] == "Content-Encoding"


def test_range_is_ignored(house: House) -> None:
    response = house.get("/v1/models", headers={"Range": "bytes=" + ",".join(f"{i}-{i}" for i in range(1000))})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        HEAD + b"Content-Length: +5\r\n\r\nabcde",
        HEAD + b"Content-Length: 0x5\r\n\r\nabcde",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        HEAD + b"X: a\r\n folded\r\n\r\n",
        HEAD + b"X\x00Y: a\r\n\r\n",
        HEAD + b": empty\r\n\r\n",
        HEAD.replace(b"\r\n", b"\n") + b"Content-Length: 0\n\n",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_smuggling_and_garbage(house: House, canary: Canary, request_bytes: bytes) -> None:
    with house.connect() as sock:
        sock.sendall(request_bytes)
        sock.settimeout(5)
        status, data = read_response(sock)
    assert status == 400, data[:200]
    assert data.count(b"HTTP/1.1") == 1  # one answer: nothing was taken for a second request
    error_of(data)


def test_upgrade_is_not_offered(house: House) -> None:
    lines = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    status, _ = send(house, f"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n".encode())
    assert status == 200
    body = json.dumps(completion(max_tokens=1)).encode()
    status, data = send(house, raw_request(PATH, body, "Connection: Upgrade\r\nUpgrade: h2c\r\n"))
    assert (status, error_of(data)["param"]) == (400, "Upgrade")


def test_pipelined_requests_are_answered_in_order(house: House) -> None:
    body = json.dumps(completion(max_tokens=2, temperature=0)).encode()
    one = raw_request(PATH, body)
    last = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    _, data = send(house, one + one + last)
    assert data.count(b"HTTP/1.1 200") == 3
    assert data.rindex(b"text_completion") < data.rindex(b'"status":"ok"')


@pytest.fixture(scope="module")
def strict() -> Iterator[House]:
    with House(header_timeout_s=0.3, body_timeout_s=0.4, max_connections=8) as house:
        yield house


def test_slow_headers(strict: House) -> None:
    for start in (b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "):
        with strict.connect() as sock:
            sock.sendall(start)
            status, data = read_response(sock)
            assert (status, error_of(data)["reason"]) == (408, "client_too_slow")


def test_slow_body(strict: House) -> None:
    with strict.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 50\r\n\r\n{")
        status, data = read_response(sock)
        assert (status, error_of(data)["reason"]) == (408, "client_too_slow")
    until(lambda: strict.is_quiet)


def test_too_many_connections(strict: House) -> None:
    until(lambda: len(strict.server.server_state.connections) == 0)
    opened = [strict.connect() for _ in range(8)]
    with strict.connect() as late:
        status, data = read_response(late)
    assert status == 503
    assert b"retry-after: 1" in data.lower()
    for sock in opened:
        sock.close()
    until(lambda: len(strict.server.server_state.connections) == 0)
    assert strict.get("/livez").status_code == 200


def test_full_queue_is_429_with_retry_after() -> None:
    limits = SchedulerLimits(max_num_seqs=1, max_num_queued_reqs=2)
    with House(limits=limits, step_s=0.01) as house:
        statuses: list[int] = []
        waits: list[str] = []

        def ask() -> None:
            response = house.post(PATH, completion(max_tokens=40, ignore_eos=True))
            statuses.append(response.status_code)
            if response.status_code == 429:
                waits.append(response.headers["retry-after"])
                assert response.json()["error"]["reason"] == "queue_full"

        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}
        assert all(wait.isdigit() and int(wait) >= 1 for wait in waits)
        until(lambda: house.is_quiet)
        assert house.post(PATH, completion(max_tokens=1)).status_code == 200


def test_bodies_together_are_bounded() -> None:
    with House(max_buffered_bytes=1 << 20) as house:
        idle = [house.connect() for _ in range(3)]
        for sock in idle:
            sock.sendall(HEAD + b"Content-Length: 400000\r\n\r\n" + b" " * 300_000)
        until(lambda: house.server.admission.num_active == 3)
        body = json.dumps(completion("x" * 200_000)).encode()
        status, data = send(house, raw_request(PATH, body))
        assert (status, error_of(data)["reason"]) == (429, "rate_limited")
        for sock in idle:
            sock.close()
        until(lambda: house.is_quiet)
        response = house.post(PATH, json.loads(body))
        assert response.json()["error"]["reason"] == "context_length_exceeded"


def test_concurrent_requests_are_bounded() -> None:
    with House(max_concurrent_requests=2, step_s=0.05) as house:
        socks = [house.connect() for _ in range(2)]
        for sock in socks:
            sock.sendall(raw_request(PATH, json.dumps(completion(max_tokens=500, ignore_eos=True)).encode()))
        until(lambda: house.server.admission.num_active == 2)
        response = house.post("/v1/chat/completions", chat())
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        for sock in socks:
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        until(lambda: house.is_quiet)
