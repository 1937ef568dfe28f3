"""Every example runs as a reader would run it, and says what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TESTED = {"generate.py", "logprobs.py", "chat_stream.py", "many_clients.py"}


def run(name: str, *arguments: object) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def test_no_example_is_untested_or_long() -> None:
    examples = list(EXAMPLES.glob("*.py"))
    assert {path.name for path in examples} == TESTED
    for path in examples:
        assert len(path.read_text().splitlines()) < 60, path.name


def test_generate(tiny_llama: Path) -> None:
    lines = run("generate.py", tiny_llama)
    text = "\n".join(lines)
    for prompt in ("The capital of France is", "Once upon a time", "def fibonacci(n):"):
        assert prompt in text
    assert lines[-1].startswith("chat: ")
    assert lines[-1].endswith(("(length)", "(stop)"))


def test_logprobs(tiny_llama: Path) -> None:
    lines = run("logprobs.py", tiny_llama)
    assert len(lines) == 5  # four tokens and the perplexity
    assert all(line.count("%") >= 3 for line in lines[:4])
    assert lines[-1].startswith("perplexity of 'The quick brown fox")


def test_chat_stream(server_url: str) -> None:
    lines = run("chat_stream.py", f"{server_url}/v1", "hello")
    assert lines[-1].startswith("[tiny-llama: ")
    assert lines[-1].endswith(" tokens]")


@pytest.mark.parametrize("num_clients", [1, 6])
def test_many_clients(server_url: str, num_clients: int) -> None:
    lines = run("many_clients.py", f"{server_url}/v1", num_clients)
    assert lines[0].startswith(f"{num_clients} clients: ")
    assert lines[1] == "every output is the same"
