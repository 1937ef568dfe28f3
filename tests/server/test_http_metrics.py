"""Every exported metric is moved, under vLLM's names and buckets."""

from __future__ import annotations

import io
import json
import re
import socket
import time
from dataclasses import replace

import pytest
from house import TOKENIZER, VOCAB_SIZE, House, completion, raw_request, until

from setpoint.engine.scheduler import SchedulerLimits
from setpoint.engine.speculation.prompt_lookup import PromptLookup
from setpoint.engine.speculation.speculator import Speculator
from setpoint.engine.speculation.suffix import SessionSuffix
from setpoint.grammar import compiler as compiling
from setpoint.grammar.compiler import GrammarCompiler
from setpoint.server.logs import EventLog
from setpoint.server.metrics import Metrics, token_buckets

PATH = "/v1/completions"
GAUGES = {
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "setpoint_queue_oldest_age_seconds": "oldest_queue_age_s",
    "setpoint_engine_heartbeat_age_seconds": "heartbeat_age_s",
    "setpoint_kv_blocks_leaked": "kv_blocks_leaked",
    "setpoint_sessions": "num_sessions",
    "setpoint_kv_host_bytes": "host_tier_bytes",
}


def family(sample: str) -> str:
    return re.sub(r"(_bucket|_sum|_count|_created)?(\{.*)?$", "", sample)


def busy_hour(house: House) -> list[socket.socket]:
    """Requests that move everything a small engine can move; the connections of those still under way."""
    prompt = "a prompt that several requests share, longer than a block of the cache " * 3
    for _ in range(2):
        assert house.post(PATH, completion(prompt, max_tokens=8, ignore_eos=True)).status_code == 200
    house.post(PATH, completion("x", max_tokens=60, temperature=1, n=3, stop=["a", "e"], seed=1))
    house.post(PATH, completion("x", max_tokens=5, logit_bias={"257": 100}, temperature=0))
    house.post(PATH, completion("x", guided_regex="forced text"))
    house.post(PATH, completion(temperature=9))
    house.post(PATH, completion([0] * 1025))
    socks = [house.connect() for _ in range(8)]
    for number, sock in enumerate(socks):
        body = completion(f"{number} " + prompt, max_tokens=500, ignore_eos=True)
        sock.sendall(raw_request(PATH, json.dumps(body).encode()))
        if number == 2:  # all that may run does: the next three wait, the rest is refused
            until(lambda: house.engine.stats().num_running == 3)
    until(lambda: house.engine.stats().counters.preemptions > 0)
    socks.pop(0).close()
    time.sleep(0.05)
    return socks


def agents(house: House) -> None:
    """Two sessions that one of their prompts tells apart, and that cannot both be kept."""
    for name in ("first", "second"):
        for day in ("Monday", "Tuesday"):
            prompt = f"{name} agent: " + "look at this and that, " * 6 + day + ", go on with that" * 4
            assert house.post(PATH, completion(prompt, max_tokens=2, session_id=name)).status_code == 200


def schemas_that_nobody_sends_twice(house: House) -> None:
    """More of them than are remembered, built and refused."""
    for number in range(3):
        body = completion("x", guided_regex=f"[a-z]{number + 1}")
        assert house.post(PATH, body).status_code == 200
        assert house.post(PATH, completion("x", guided_regex=f"({number}")).status_code == 400


def test_every_metric_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_COMPILED", 2)
    monkeypatch.setattr(compiling, "MAX_REFUSED", 2)
    grammars = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    limits = SchedulerLimits(max_num_seqs=3, max_num_queued_reqs=3, session_ttl_s=0.2, session_share=0.1)
    with House(num_blocks=80, limits=limits, step_s=0.001, host_bytes=1 << 24, grammars=grammars) as house:
        before = house.metrics()
        schemas_that_nobody_sends_twice(house)
        agents(house)
        socks = busy_hour(house)
        during = house.metrics()
        until(lambda: house.engine.stats().num_waiting == 0, 30)
        until(lambda: house.is_quiet, 30)
        agents(house)  # what the pool has lost meanwhile
        until(lambda: house.engine.stats().num_sessions_expired > 0)
        after = house.metrics()
        for sock in socks:
            sock.close()
    grammars.close()
    constant = {"vllm:cache_config_info", "setpoint_build_info"}
    never_here = {"setpoint_kv_blocks_leaked", "setpoint_output_violations_total"}  # 0 is their only right value
    moved = {family(name) for page in (during, after) for name, value in page.items() if value != before.get(name, 0)}
    exported = {family(name) for name in after}
    assert exported - moved - constant - never_here == set()
    assert after['vllm:cache_config_info{block_size="16",engine="0",model_name="tiny",num_gpu_blocks="80"}'] == 1
    assert after['vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"}'] > 0
    assert after['setpoint_grammar_cache_evictions_total{cache="refused",engine="0",model_name="tiny"}'] == 1
    aborted = [value for name, value in after.items() if name.startswith("setpoint_requests_aborted_total")]
    assert sum(aborted) == 1  # the client that left, and none of the choices that a stop string ended


def test_names_and_buckets(house: House) -> None:
    house.post(PATH, completion(max_tokens=3))
    until(lambda: "vllm:request_success_total{" in house.get("/metrics").text)  # counted once the answer is out
    page = house.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {family(line) for line in page.text.splitlines() if line and not line.startswith("#")}
    for name in (
        *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total"),
        *("prompt_tokens_by_source_total", "prompt_tokens_cached_total", "generation_tokens_total"),
        *("request_success_total", "admission_rejections_total", "time_to_first_token_seconds"),
        *("inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens", "request_params_n"),
        *("request_params_max_tokens", "request_max_num_generation_tokens", "request_num_preemptions"),
        *("request_prefill_kv_computed_tokens", "iteration_tokens_total", "cache_config_info"),
    ):
        assert f"vllm:{name}" in names, name
    for dead in ("vllm:gpu_cache_usage_perc", "vllm:time_per_output_token_seconds"):
        assert dead not in page.text

    def buckets(name: str) -> list[float]:
        found = re.findall(rf'^vllm:{name}_bucket{{.*le="([^"]+)".*}}', page.text, re.MULTILINE)
        return [float(value) for value in found]

    assert buckets("time_to_first_token_seconds")[:5] == [0.001, 0.005, 0.01, 0.02, 0.04]
    assert buckets("inter_token_latency_seconds")[:6] == [0.001, 0.002, 0.004, 0.006, 0.008, 0.01]
    assert buckets("e2e_request_latency_seconds")[:3] == [0.3, 0.5, 0.8]
    assert buckets("request_params_n") == [1, 2, 5, 10, 20, float("inf")]
    assert buckets("iteration_tokens_total")[:4] == [1, 8, 16, 32]
    assert buckets("request_prompt_tokens") == [*token_buckets(1024), float("inf")]


def test_gauges_follow_the_engine(house: House) -> None:
    """Each gauge shows its own number, and no other's."""
    quiet = house.engine.stats()
    for sample, name in GAUGES.items():
        metrics = Metrics("m", 64, lambda name=name: replace(quiet, **{name: 7}), version="1", cache_info={})
        values = dict(
            line.rpartition(" ")[::2] for line in metrics.page().decode().splitlines() if not line.startswith("#")
        )
        assert float(values[f'{sample}{{engine="0",model_name="m"}}']) == 7


def test_token_buckets_end_at_the_context() -> None:
    assert token_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(99)[-1] == 50


def test_log_has_one_line_a_request_and_no_text(house: House) -> None:
    secret = "a-very-private-prompt"
    start = len(house.log_lines())
    house.post(PATH, completion(secret, max_tokens=4, ignore_eos=True), headers={"X-Request-Id": "line-1"})
    house.post(PATH, completion(secret, temperature=7), headers={"X-Request-Id": "line-2"})
    until(lambda: len([line for line in house.log_lines()[start:] if line["event"] == "request"]) >= 2)
    lines = {line.get("request_id"): line for line in house.log_lines()[start:]}
    first, second = lines["line-1"], lines["line-2"]
    assert {"ts", "level", "event", "status", "ttft_ms", "output_tokens", "finish_reason", "route"} <= set(first)
    assert (first["status"], first["output_tokens"], first["finish_reason"]) == (200, 4, "length")
    assert (second["status"], second["reason"]) == (400, "out_of_range")
    assert secret not in house.log.getvalue()


def test_log_lines_cannot_be_forged(house: House) -> None:
    evil = 'x"}\n{"event": "forged"}\r\n\x1b[31m'
    house.post(PATH, {"model": evil, "prompt": "x", evil: 1})
    house.post(PATH, completion(model=evil))
    house.get("/v1/models/%0a%7b%22event%22%3a%22forged%22%7d")
    text = house.log.getvalue()
    assert "\x1b" not in text
    assert not [line for line in house.log_lines() if line["event"] == "forged"]


def test_log_survives_a_broken_stream() -> None:
    with House() as house:
        house.log.close()
        assert house.post(PATH, completion(max_tokens=1)).status_code == 200
        house.context.log._stream = io.StringIO()


def test_log_is_rate_limited() -> None:
    stream = io.StringIO()
    log = EventLog(stream)
    for number in range(5000):
        log.write("flood", number=number)
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 1200
    assert all(len(line) < 500 for line in lines)


def test_speculation_is_counted_and_streamed_whole() -> None:
    """A model that counts to ten, again and again: soon it is guessed, several tokens an event."""
    limits = SchedulerLimits(max_drafts=8)
    drafting = Speculator([SessionSuffix(), PromptLookup()])
    digits = [ord(digit) for digit in "0123456789"]
    rule = lambda context: digits[(digits.index(context[-1]) + 1) % 10] if context[-1] in digits else digits[0]  # noqa: E731
    with House(next_token=rule, limits=limits, speculator=drafting, step_s=0.002) as house:
        answer = house.post(PATH, completion("x", max_tokens=100, ignore_eos=True))
        streamed = house.post(PATH, completion("x", max_tokens=100, ignore_eos=True, stream=True))
        page = house.metrics()
    text = "0123456789" * 10
    assert answer.json()["choices"][0]["text"] == text
    pieces = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"]) == text
    labels = '{engine="0",model_name="tiny"}'
    drafted = page[f"vllm:spec_decode_num_draft_tokens_total{labels}"]
    accepted = page[f"vllm:spec_decode_num_accepted_tokens_total{labels}"]
    assert 100 < accepted <= drafted
    by_place = [v for k, v in page.items() if k.startswith("vllm:spec_decode_num_accepted_tokens_per_pos_total")]
    by_method = [v for k, v in page.items() if k.startswith("setpoint_spec_decode_accepted_tokens_by_method_total")]
    assert sum(by_place) == sum(by_method) == accepted
    assert page[f"setpoint_spec_decode_saved_seconds{labels}"] > 0
