"""A `setpoint serve` process with a tiny model, for tests that need a server and not its sense."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tiny_models import TINY_MODELS, write_gguf

START_S = 60.0


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(TINY_MODELS["llama"], tmp_path_factory.mktemp("e2e") / "tiny-llama.gguf")


@pytest.fixture(scope="session")
def server_url(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`http://127.0.0.1:PORT` of a server that is ready and serves `tiny-llama`; it must leave with 0."""
    log = tmp_path_factory.mktemp("server") / "stderr"
    command = [sys.executable, "-m", "setpoint.cli.main", "serve", str(tiny_llama), "--port", "0"]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        yield _url_when_ready(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=START_S)
    assert code == 0, log.read_text()
    assert "Traceback" not in log.read_text()


def _url_when_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        announced = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if announced is not None and httpx.get(f"{announced[0]}/readyz", timeout=5).status_code == 200:
            return announced[0]
        time.sleep(0.05)
    raise AssertionError(f"the server did not become ready:\n{log.read_text()}")
