"""HTTP servers in processes of their own, ours and llama.cpp's, asked the same thing in the same words."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

START_S = 120.0
ANSWER_S = 120.0


class ServerFailed(Exception):
    """With the last lines of its log, or its answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a prompt to which one token was generated."""

    seconds: float  # from the request to the token
    num_prompt: int
    num_cached: int


class Server:
    """`command` listens on the port given to it; the server is ready when this was constructed. A context manager."""

    def __init__(self, command: Sequence[str | Path], ready: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._log = log
        with log.open("w") as stream:
            words = [*map(str, command), "--port", str(self.port)]
            self.process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_S
        while not self._is_ready(ready):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise ServerFailed("\n".join(log.read_text(errors="replace").splitlines()[-3:]))
            time.sleep(0.05)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _is_ready(self, path: str) -> bool:
        try:
            return self._ask("GET", path, None)[0] == 200
        except OSError:
            return False

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        connection.connect()
        return connection

    def _ask(self, method: str, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = self._connect()
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> Any:
        """The JSON of a successful answer."""
        status, answer = self._ask("POST", path, body)
        if status != 200:
            raise ServerFailed(f"{path}: {status} {answer[:300].decode(errors='replace')}")
        return json.loads(answer)

    def first_token(self, prompt: Sequence[int], key: str | None = None, **fields: Any) -> Answer:
        """Send token ids to `/v1/completions`, on a connection that is open already."""
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"model": "default", "stream_options": {"include_usage": True}, **fields}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        sent = json.dumps(body)
        connection = self._connect()
        try:
            began = time.perf_counter()
            connection.request("POST", "/v1/completions", sent, headers)
            response = connection.getresponse()
            line = response.readline()
            while line and not line.startswith(b"data:"):  # keep-alives are comments
                line = response.readline()
            seconds = time.perf_counter() - began
            lines = [line, *response.read().splitlines()]
        finally:
            connection.close()
        if response.status != 200:
            raise ServerFailed(b" ".join(lines)[:300].decode(errors="replace"))
        chunks = [json.loads(one[6:]) for one in lines if one.startswith(b"data: {")]
        usage = next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), None)
        if usage is None:
            raise ServerFailed(f"no usage: {chunks[-1:]}")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(seconds, usage["prompt_tokens"], cached)

    def metric(self, name: str) -> float:
        """The sum over the labels of one of our own metrics; 0 where there is none."""
        lines = self._ask("GET", "/metrics", None)[1].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def setpoint(model: Path, log: Path, *flags: object) -> Server:
    """`setpoint serve` of this checkout."""
    command = [sys.executable, "-m", "setpoint.cli.main", "serve", model, "--served-model-name", "default"]
    return Server([*map(str, command), *map(str, flags)], "/readyz", log)


def llama_server(program: Path, model: Path, log: Path, *flags: object) -> Server:
    """llama.cpp's server, at its defaults but for threads and what is given."""
    threads = str(len(os.sched_getaffinity(0)))
    command = [program, "--model", model, "--host", "127.0.0.1", "--threads", threads, "--no-webui"]
    return Server([*map(str, command), *map(str, flags)], "/health", log)
