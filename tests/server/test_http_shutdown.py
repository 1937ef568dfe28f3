"""CR-5 and CR-8: signals under load, and a port that is taken. Each server is a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from canary import assert_clean
from house import completion, events, until

PATH = "/v1/completions"
Start = Callable[..., "Process"]


class Process:
    def __init__(self, *arguments: object, port: int = 0) -> None:
        script = Path(__file__).with_name("serve_fake.py")
        paths = [str(script.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
        self.popen = subprocess.Popen(
            [sys.executable, str(script), str(port), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.popen.stdout is not None
        self.url = self.popen.stdout.readline().strip()
        self.command = self.popen.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self, timeout_s: float) -> tuple[int, str]:
        """Exit code and the log."""
        _, log = self.popen.communicate(timeout=timeout_s)
        return self.popen.returncode, log

    def stream(self, max_tokens: int) -> Streaming:
        return Streaming(self.url, completion(max_tokens=max_tokens, ignore_eos=True, stream=True, temperature=0))


class Streaming:
    """A streaming client on a thread of its own."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.status = 0
        self.text = ""
        self._url, self._body = url, body
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url + PATH, json=self._body, timeout=60) as response:
            self.status = response.status_code
            try:
                for part in response.iter_text():
                    self.text += part
            except httpx.HTTPError:
                self.status = -1

    def join(self) -> list[Any]:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return events(self.text)


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Process] = []

    def begin(*arguments: object, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield begin
    for process in started:
        process.popen.kill()
        process.popen.communicate()


def under_way(clients: list[Streaming]) -> None:
    until(lambda: all(client.text for client in clients))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_lets_streams_finish(start: Start, number: int) -> None:
    process = start(0.01, 20)
    clients = [process.stream(80) for _ in range(4)]
    under_way(clients)
    process.signal(number)
    began = time.monotonic()
    status = 200
    while status == 200 and time.monotonic() - began < 5:
        status = httpx.get(process.url + "/readyz").status_code
    assert status == 503
    assert time.monotonic() - began < 1  # generous: 100 ms on a machine of one's own
    refused = httpx.post(process.url + PATH, json=completion())
    assert refused.status_code == 503
    assert refused.json()["error"]["reason"] == "draining"
    for client in clients:
        *_, last, done = client.join()
        assert last["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"
    code, log = process.end(10)
    assert code == 0
    assert_clean(log)


def test_drain_ends_what_takes_too_long_with_an_error_event(start: Start) -> None:
    process = start(0.05, 0.5)
    clients = [process.stream(900) for _ in range(3)]
    under_way(clients)
    whole: list[httpx.Response] = []
    body = completion(max_tokens=900, ignore_eos=True)
    thread = threading.Thread(target=lambda: whole.append(httpx.post(process.url + PATH, json=body, timeout=30)))
    thread.start()
    time.sleep(0.3)
    process.signal(signal.SIGTERM)
    began = time.monotonic()
    for client in clients:
        *_, error, done = client.join()
        assert error["error"]["reason"] == "draining"
        assert done == "[DONE]"
    thread.join()
    assert whole[0].status_code == 503
    code, log = process.end(10)
    assert code == 0
    assert time.monotonic() - began < 0.5 + 2 + 1  # drain, 2 s, and one for a busy machine
    assert_clean(log)


def test_second_signal_exits_fast(start: Start) -> None:
    process = start(0.05, 60)
    clients = [process.stream(900)]
    under_way(clients)
    process.signal(signal.SIGTERM)
    until(lambda: httpx.get(process.url + "/readyz").status_code == 503)
    process.signal(signal.SIGTERM)
    began = time.monotonic()
    code, log = process.end(10)
    assert code == 1
    assert time.monotonic() - began < 3.5
    assert clients[0].join()[-1] == "[DONE]"
    assert_clean(log)


def test_idle_server_leaves_at_once(start: Start) -> None:
    process = start(0, 30)
    httpx.get(process.url + "/readyz")
    process.signal(signal.SIGTERM)
    assert process.end(5)[0] == 0


def test_stuck_engine_does_not_hold_the_exit(start: Start) -> None:
    process = start(0, 0.3, "stuck")
    body = json.dumps(completion()).encode()
    with socket.create_connection(("127.0.0.1", int(process.url.rsplit(":", 1)[1]))) as sock:
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        sock.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.5)
        process.signal(signal.SIGTERM)
        assert sock.recv(4096).startswith(b"HTTP/1.1 503")
    assert process.end(8)[0] == 0


def test_port_in_use(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(0, 1, port=port)
        code, log = process.end(10)
        assert code == 4
        assert log.strip() == f"error: port {port} is in use; stop the other server or choose another --port"


def test_the_printed_command_works(start: Start) -> None:
    process = start(0, 5)
    assert process.command.startswith(f"curl {process.url}/v1/")
    words = shlex.split(process.command)
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    response = httpx.post(words[1], content=words[words.index("-d") + 1], headers=headers, timeout=60)
    assert response.status_code == 200
