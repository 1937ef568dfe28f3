"""ST-1 .. ST-6: failures before and after the first token, disconnects in every state, slow readers, split text."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import httpx
import pytest
from canary import assert_clean
from house import TOKENIZER, House, chat, completion, events, raw_request, until

from setpoint.engine.scheduler import SchedulerLimits
from setpoint.text.stream import TextStream

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def failing_at(length: int) -> Any:
    def next_token(context: list[int]) -> int:
        if len(context) >= length and context[0] == ord("!"):
            raise RuntimeError("/work/secret/path 0xdeadbeef01")
        return ord("a") + len(context) % 26

    return next_token


def test_failure_before_the_first_token_has_its_status() -> None:
    with House(next_token=failing_at(0)) as house:
        for stream in (False, True):
            response = house.post(COMPLETIONS, completion([33, 34, 35], stream=stream))
            assert response.status_code == 500
            assert response.headers["content-type"] == "application/json"
            error = response.json()["error"]
            assert (error["type"], error["reason"], error["code"]) == ("InternalServerError", "engine_error", 500)
            assert_clean(response.text)
        assert house.post(COMPLETIONS, completion()).status_code == 200
        until(lambda: house.is_quiet)
        assert_clean(house.log.getvalue())


def test_failure_after_the_first_token_is_an_event() -> None:
    with House(next_token=failing_at(7), step_s=0.01) as house:
        for _ in range(20):
            response = house.post(COMPLETIONS, completion([33, 34, 35], max_tokens=50, stream=True))
            assert response.status_code == 200
            *chunks, error, done = events(response.text)
            assert chunks
            assert all("error" not in chunk for chunk in chunks)
            assert set(error["error"]) == {"message", "type", "param", "code", "reason"}
            assert done == "[DONE]"
            assert_clean(response.text)
        whole = house.post(COMPLETIONS, completion([33, 34, 35], max_tokens=50))
        assert whole.status_code == 500
        until(lambda: house.is_quiet)


def test_one_finish_reason_per_choice(house: House) -> None:
    """ST-3 over random requests."""
    rng = random.Random(4)
    with house.client() as client:
        for number in range(1000):
            n = rng.choice([1, 1, 2, 3])
            body: dict[str, Any] = {"n": n, "temperature": 1, "seed": number, "max_tokens": rng.randint(1, 20)}
            usage = rng.random() < 0.5
            body |= {"stream": True, "stream_interval": rng.choice([1, 3]), "stream_options": {"include_usage": usage}}
            path, build = rng.choice([(CHAT, chat), (COMPLETIONS, completion)])
            found = events(client.post(path, json=build(f"number {number}", **body)).text)
            assert found[-1] == "[DONE]"
            assert found.count("[DONE]") == 1
            chunks = found[:-1]
            assert (chunks[-1]["choices"] == []) is usage
            assert sum(1 for chunk in chunks if chunk.get("usage")) == usage
            ends = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
            assert sorted(ends) == list(range(n))


def test_stream_equals_whole(house: House) -> None:
    """ST-6: random bytes make split and invalid characters; stop strings of one to three characters hit often."""
    rng = random.Random(6)
    with house.client() as client:
        for number in range(120):
            stops = [chr(rng.choice([97, 104, 0xE9, 0xFFFD])) * rng.randint(1, 2) for _ in range(rng.randint(0, 3))]
            body = completion(f"prompt {number} 世界", max_tokens=40, temperature=0, stop=stops)
            body["include_stop_str_in_output"] = rng.random() < 0.3
            whole = client.post(COMPLETIONS, json=body).json()["choices"][0]
            chunks = events(client.post(COMPLETIONS, json={**body, "stream": True}).text)[:-1]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
            last = chunks[-1]["choices"][0]
            assert (last["finish_reason"], last["stop_reason"]) == (whole["finish_reason"], whole["stop_reason"])


def test_5000_texts_stream_as_they_are_whole() -> None:
    """ST-6 below HTTP: tokens are bytes, so every character but ASCII is split; stop strings are cut from the text."""
    rng = random.Random(66)
    alphabet = [*"ab \n", "é", "世", "界", "🙂", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "e\u0301", "\ufffd"]
    for _ in range(5000):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 20)))
        begin = rng.randrange(len(text))
        stops = [text[begin : begin + rng.randint(1, 4)], "b\nb", "🙂🙂"][: rng.randint(0, 3)]
        token_ids = TOKENIZER.encode(text, add_special_tokens=False)
        stream = TextStream(TOKENIZER, stop=stops)
        pieces = [stream.push([token_id], final=i == len(token_ids)) for i, token_id in enumerate(token_ids, start=1)]
        ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
        end, minus_length = min(ends, default=(len(text), 0))
        assert "".join(piece.text for piece in pieces) == text[: end + minus_length]


def test_stop_strings_wait_for_min_tokens() -> None:
    with House(next_token=lambda context: ord("a")) as house:
        body = completion("x", stop="aa", min_tokens=5, max_tokens=20)
        answer = house.post(COMPLETIONS, body).json()
        assert answer["usage"]["completion_tokens"] >= 6
        assert answer["choices"][0]["stop_reason"] == "aa"


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_everything(stream: bool) -> None:
    """ST-4: the client leaves after a random time: queued, tokenising, in prefill, while decoding, after the end."""
    limits = SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=32)
    with House(step_s=0.002, limits=limits) as house:
        rng = random.Random(8)
        for number in range(60):
            body = completion(
                f"{number} " + "long prompt " * rng.randint(0, 20),
                max_tokens=rng.choice([1, 50, 400]),
                n=rng.choice([1, 3]),
                temperature=1,
                ignore_eos=True,
                stream=stream,
            )
            sock = house.connect()
            sock.sendall(raw_request(COMPLETIONS, httpx.Request("POST", "http://x", json=body).content))
            time.sleep(rng.choice([0, 0.001, 0.01, 0.04]))
            sock.close()
        until(lambda: house.is_quiet, 20)
        before = house.runner.num_steps
        assert house.post(COMPLETIONS, completion(temperature=0, max_tokens=4, ignore_eos=True)).status_code == 200
        assert house.runner.num_steps - before <= 6
        assert house.metrics()['setpoint_requests_aborted_total{engine="0",model_name="tiny",state="decode"}'] > 0


def test_disconnect_is_seen_within_two_steps() -> None:
    with House(step_s=0.05) as house:
        sock = house.connect()
        body = httpx.Request("POST", "http://x", json=completion(max_tokens=900, ignore_eos=True, stream=True)).content
        sock.sendall(raw_request(COMPLETIONS, body))
        assert b"data:" in sock.recv(65536) + sock.recv(65536)
        steps = house.runner.num_steps
        sock.close()
        until(lambda: house.is_quiet)
        assert house.runner.num_steps - steps <= 4


def test_keep_alive_comments_while_silent() -> None:
    """After the first comment the headers are out, so a later failure is an event."""
    with House(next_token=failing_at(999), step_s=0.4, ping_interval_s=0.1) as house:
        response = house.post(COMPLETIONS, completion(max_tokens=2, ignore_eos=True, stream=True))
        assert response.text.startswith(": ping\n\n")
        assert response.text.count(": ping\n\n") >= 3
        assert len(events(response.text)) == 3


def test_stalled_reader_is_cut_off() -> None:
    big = "x" * 200_000
    with House(write_timeout_s=0.5, template=None) as house:
        house.context.tokenizer = _WideTokenizer(big)
        sock = house.connect()
        body = completion(max_tokens=900, ignore_eos=True, stream=True, temperature=0)
        sock.sendall(raw_request(COMPLETIONS, httpx.Request("POST", "http://x", json=body).content))
        until(lambda: house.server.admission.num_active == 1)
        until(lambda: house.is_quiet, 20)  # nobody reads: after the timeout the request is gone
        assert any(line.get("cancel_reason") == "stalled" for line in house.log_lines())
        sock.close()


class _WideTokenizer:
    """Every token is a long text, so that a socket's buffers fill at once."""

    vocab_size = 262
    eos_token_ids = special_ids = frozenset[int]()
    space_prefix = False
    longest_token = 16

    def __init__(self, text: str) -> None:
        self._bytes = text.encode()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1, 2, 3]

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes


def test_concurrent_streams_equal_their_solo_runs(house: House) -> None:
    bodies = [completion(f"client {i}", max_tokens=30, temperature=i % 2, seed=i, stream=True) for i in range(32)]
    solo = [_text(house.post(COMPLETIONS, body).text) for body in bodies]

    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=house.url, timeout=60) as client:
            answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))
            return [_text(answer.text) for answer in answers]

    assert asyncio.run(together()) == solo


def _text(stream: str) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in events(stream)[:-1])
