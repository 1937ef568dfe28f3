"""`setpoint serve` with SmolLM2 as a newcomer meets it: a process, a port, and the official client."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from setpoint.cli.main import main

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "Name three colours of the rainbow."}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A `setpoint serve` process on a free port, ready when constructed."""

    def __init__(self, model: Path, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        code = "import sys; from setpoint.cli.main import main; sys.exit(main(sys.argv[1:]))"
        serve = ["serve", str(model), "--port", str(self.port), "--served-model-name", MODEL, *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *serve], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        deadline = time.monotonic() + 60
        while not self.is_ready():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, sign: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit code and what was printed to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(sign)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[Server]:
    running = Server(smollm2_path, "--max-model-len", "2048")
    yield running
    code, errors = running.stop()
    assert code == 0
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_chat_makes_sense_and_streams_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 48, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content
    assert re.search("red|blue|green|yellow|orange|violet", whole.choices[0].message.content.lower())
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 3
    assert text_of(client.chat.completions.create(**options, stream=True)) == whole.choices[0].message.content


def test_an_answer_is_explained(server: Server, client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=16, temperature=0)
    began = time.monotonic()
    document: dict[str, Any] = {"state": "running"}
    while document["state"] == "running" and time.monotonic() < began + 30:
        document = httpx.get(f"{server.url}/v1/requests/{answer.id}/explain").json()
    assert document["state"] == "finished"
    assert answer.usage is not None
    assert document["tokens"]["output"] == answer.usage.completion_tokens
    starts = [span["start_s"] for span in document["path"]] + [document["e2e_s"]]
    ends = [0.0] + [span["end_s"] for span in document["path"]]
    assert starts == pytest.approx(ends, abs=1e-6)
    assert sum(document["causes"].values()) == pytest.approx(document["e2e_s"], abs=1e-6)
    assert document["advice"]
    assert main(["explain", answer.id, "--url", server.url]) == 0
    assert answer.id in capsys.readouterr().out
    assert main(["explain", "chatcmpl-unknown", "--url", server.url]) == 1


def test_two_choices_differ_and_repeat_with_their_seed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 32, "n": 2, "seed": 7}
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 2
    assert texts == [choice.message.content for choice in second.choices]


def test_stop_strings_end_the_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "1, 2, 3, 4,", "max_tokens": 40, "temperature": 0}
    full = client.completions.create(**options).choices[0].text
    stop = full[8:12]
    cut = client.completions.create(**options, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == full[: full.index(stop)]


def test_logprobs_are_of_the_greedy_choice(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content
    for position in content:
        assert position.top_logprobs[0].token == position.token
        assert position.logprob <= 0
        assert [top.logprob for top in position.top_logprobs] == sorted(
            (top.logprob for top in position.top_logprobs), reverse=True
        )


def test_a_repeated_prompt_is_found_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "A long shared prefix of many words that fills more than one block of the cache. " * 4
    options: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0}
    cold, warm = (client.completions.create(**options) for _ in range(2))
    assert warm.usage is not None
    assert warm.usage.prompt_tokens_details is not None
    assert (warm.usage.prompt_tokens_details.cached_tokens or 0) >= 16
    assert warm.choices[0].text == cold.choices[0].text


def test_32_concurrent_streams_equal_their_solo_runs(server: Server) -> None:
    """Greedy and seeded sampling, streaming and not: byte for byte what each gets when it is alone."""

    def options(index: int) -> dict[str, Any]:
        sampling: dict[str, Any] = (
            {"temperature": 0} if index % 2 else {"temperature": 1.0, "top_p": 0.95, "seed": index}
        )
        content = f"Write one sentence about the number {index}." + " Please." * (index % 5)
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 24,
            "stream": True,
            **sampling,
        }

    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(**options(index))
            if chunk.choices
        ]
        return "".join(pieces)

    async def all_of_them() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, index) for index in range(32)))
            solo = [await one(client, index) for index in range(32)]
        return list(together), solo

    together, solo = asyncio.run(all_of_them())
    assert all(together)
    assert together == solo
    assert server.metrics()['vllm:num_requests_running{engine="0",model_name="smollm2"}'] == 0


def test_server_info_tells_what_is_in_effect(server: Server) -> None:
    info = httpx.get(f"{server.url}/server_info").json()
    assert info["isa"] != "auto"
    assert info["knobs"]["max_model_len"] == info["max_model_len"] == 2048
    assert {"dtype", "kv_cache_dtype", "num_threads"} <= set(info["knobs"])


def test_wrong_requests_are_named_and_the_server_lives_on(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=9)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=MODEL, prompt="word " * 3000)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=QUESTION)
    assert server.is_ready()


@pytest.mark.parametrize("isa", ["avx2", "ref"])
def test_a_machine_without_avx512_serves_the_same(smollm2_path: Path, client: openai.OpenAI, isa: str) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 4, "temperature": 0}
    expected = client.chat.completions.create(**options).choices[0].message.content
    plain = Server(smollm2_path, "--max-model-len", "512", "--isa", isa)
    try:
        other = openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0, timeout=120)
        assert other.chat.completions.create(**options).choices[0].message.content == expected
    finally:
        assert plain.stop()[0] == 0


def test_ctrl_c_finishes_what_runs(smollm2_path: Path) -> None:
    running = Server(smollm2_path, "--max-model-len", "512")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=48, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [next(iter(stream)).choices[0].text]
    running.process.send_signal(signal.SIGINT)
    reasons = []
    for chunk in stream:
        pieces.append(chunk.choices[0].text)
        reasons.append(chunk.choices[0].finish_reason)
    assert reasons[-1] == "length"
    assert running.process.wait(30) == 0
    assert "Traceback" not in running.stop()[1]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["no-such-model"], 3, "no model"),
        (["no-such-file.gguf"], 3, "no model"),
        (["MODEL", "--max-model-len", "100000000"], 2, "--max-model-len"),
        (["MODEL", "--kv-cache-memory-bytes", "1000"], 2, "kv-cache"),
        (["MODEL", "--host", "0.0.0.0"], 2, "--api-key"),
        (["MODEL", "--port", "TAKEN"], 4, "in use"),
    ],
)
def test_what_cannot_start_says_why(
    smollm2_path: Path, server: Server, flags: list[str], code: int, words: str
) -> None:
    given = [{"MODEL": str(smollm2_path), "TAKEN": str(server.port)}.get(flag, flag) for flag in flags]
    command = "import sys; from setpoint.cli.main import main; sys.exit(main(['serve', *sys.argv[1:]]))"
    done = subprocess.run([sys.executable, "-c", command, *given], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.endswith("...")]
    assert len(lines) == 1
    assert words in lines[0]
