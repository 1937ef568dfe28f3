"""Chat completions: the shape of answers, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from house import EOS, MODEL, TOKENIZER, House, chat, events, story, story_text

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def teller() -> Iterator[House]:
    with House(next_token=story) as house:
        yield house


def num_prompt(house: House, body: dict[str, Any]) -> int:
    return int(house.post("/tokenize", {"messages": body["messages"]}).json()["count"])


def test_whole_answer(teller: House) -> None:
    body = chat("tell me", max_tokens=30)
    response = teller.post(CHAT, body)
    answer = response.json()
    prompt = num_prompt(teller, body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)
    assert isinstance(answer["created"], int)
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": story_text(prompt, 30)}
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "length", None)
    assert choice["logprobs"] is None
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 30,
        "total_tokens": prompt + 30,
        "prompt_tokens_details": {"cached_tokens": answer["usage"]["prompt_tokens_details"]["cached_tokens"]},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_cached_tokens_are_reported(teller: House) -> None:
    body = chat("a prompt that fills several blocks of the cache, so that a second run finds them" * 2, max_tokens=4)
    first = teller.post(CHAT, body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    second = teller.post(CHAT, body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert second > first
    assert second % 16 == 0


def test_stream_order(teller: House) -> None:
    body = chat("tell me", max_tokens=30, stream=True, stream_options={"include_usage": True})
    response = teller.post(CHAT, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert response.text.count("[DONE]") == 1
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 30
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == story_text(usage["usage"]["prompt_tokens"], 30)


def test_no_usage_unless_asked(teller: House) -> None:
    chunks = events(teller.post(CHAT, chat(max_tokens=3, stream=True)).text)[:-1]
    assert all("usage" not in chunk for chunk in chunks)


def test_continuous_usage_grows(teller: House) -> None:
    body = chat(max_tokens=9, stream=True, stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(teller.post(CHAT, body).text)[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 9


def test_stream_interval_groups_tokens(teller: House) -> None:
    one = events(teller.post(CHAT, chat(max_tokens=32, stream=True)).text)
    eight = events(teller.post(CHAT, chat(max_tokens=32, stream=True, stream_interval=8)).text)
    assert len(eight) == 1 + 4 + 1
    assert len(one) > len(eight)


def test_several_choices(house: House) -> None:
    body = chat(n=3, temperature=1, seed=5, max_tokens=12)
    choices = house.post(CHAT, body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in choices}) == 3
    chunks = events(house.post(CHAT, {**body, "stream": True}).text)[:-1]
    for index, choice in enumerate(choices):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]]


def test_seed_repeats(house: House) -> None:
    body = chat(temperature=1, seed=11, max_tokens=20)
    first, second = (house.post(CHAT, body).json()["choices"] for _ in range(2))
    assert first == second
    assert house.post(CHAT, {**body, "seed": 12}).json()["choices"] != first


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string(teller: House, stream: bool, include: bool) -> None:
    body = chat("x", max_tokens=200, stop=["never", "upon a"], include_stop_str_in_output=include, stream=stream)
    prompt = num_prompt(teller, body)
    full = story_text(prompt, 200)
    expected = full[: full.index("upon a") + (6 if include else 0)]
    response = teller.post(CHAT, {**body, **({"stream_options": {"include_usage": True}} if stream else {})})
    if stream:
        *chunks, usage, _ = events(response.text)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        last, used = chunks[-1]["choices"][0], usage["usage"]
    else:
        answer = response.json()
        last, used = answer["choices"][0], answer["usage"]
        text = last["message"]["content"]
    assert text == expected
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "upon a")
    end = (full[: full.index("upon a") + 6]).encode()
    assert used["completion_tokens"] == len(end)


def test_end_token_is_not_shown() -> None:
    def short(context: list[int]) -> int:
        return EOS if len(context) % 40 == 39 else ord("a") + len(context) % 5

    with House(next_token=short) as house:
        for extra, shown in (({}, ""), ({"skip_special_tokens": False}, "")):
            answer = house.post(CHAT, chat("x", max_tokens=80, **extra)).json()
            choice = answer["choices"][0]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
            assert "</s>" not in choice["message"]["content"]
            assert answer["usage"]["completion_tokens"] == len(choice["message"]["content"]) + 1 + len(shown)


def test_stop_token_id_is_named(teller: House) -> None:
    choice = teller.post(CHAT, chat(max_tokens=200, stop_token_ids=[ord("!")])).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord("!"))
    assert "!" not in choice["message"]["content"]


def test_ignore_eos(house: House) -> None:
    body = chat(max_tokens=4, allowed_token_ids=[EOS, ord("a")], logit_bias={str(EOS): 100}, temperature=0)
    assert house.post(CHAT, body).json()["usage"]["completion_tokens"] == 1
    assert house.post(CHAT, {**body, "ignore_eos": True}).json()["usage"]["completion_tokens"] == 4
    assert house.post(CHAT, {**body, "min_tokens": 3}).json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(house: House, stream: bool) -> None:
    body = chat(max_tokens=7, temperature=0, ignore_eos=True, logprobs=True, top_logprobs=3, stream=stream)
    response = house.post(CHAT, body)
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in events(response.text)[:-1]]
        content = [entry for part in parts if part for entry in part["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 7
    for entry in content:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]


def test_logprobs_without_top(house: House) -> None:
    answer = house.post(CHAT, chat(max_tokens=2, temperature=0, logprobs=True, top_logprobs=None)).json()
    assert [entry["top_logprobs"] for entry in answer["choices"][0]["logprobs"]["content"]] == [[], []]


def test_tokens_as_ids_and_token_ids(house: House) -> None:
    body = chat(max_tokens=5, temperature=0, ignore_eos=True, logprobs=True)
    body |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = house.post(CHAT, body).json()
    token_ids = answer["choices"][0]["token_ids"]
    names = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert names == [f"token_id:{token}" for token in token_ids]
    assert answer["prompt_token_ids"] == house.post("/tokenize", {"messages": body["messages"]}).json()["tokens"]
    chunks = events(house.post(CHAT, {**body, "stream": True}).text)[:-1]
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())] == token_ids
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]


def test_prompt_logprobs(house: House) -> None:
    answer = house.post(CHAT, chat("hello", max_tokens=1, prompt_logprobs=2, return_token_ids=True)).json()
    entries = answer["prompt_logprobs"]
    assert len(entries) == len(answer["prompt_token_ids"])
    assert entries[0] is None
    for entry, token in zip(entries[1:], answer["prompt_token_ids"][1:], strict=True):
        assert entry[str(token)]["rank"] >= 1


def test_message_forms_make_the_same_prompt(house: House) -> None:
    forms: list[dict[str, Any]] = [
        {"role": "user", "content": "one\ntwo"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "one\ntwo", "refusal": None, "tool_calls": [], "annotations": None},
    ]
    tokens = [house.post("/tokenize", {"messages": [form]}).json()["tokens"] for form in forms]
    assert tokens[0] == tokens[1] == tokens[2]
    developer, system = (
        house.post("/tokenize", {"messages": [{"role": role, "content": "x"}]}).json()["tokens"]
        for role in ("developer", "system")
    )
    assert developer == system


def test_template_kwargs_reach_the_template(house: House) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"enable_thinking": True}}
    tokens = house.post("/tokenize", body).json()["tokens"]
    assert "<think>" in TOKENIZER.decode(tokens)


def test_ignored_params_are_named(house: House) -> None:
    response = house.post(CHAT, chat(max_tokens=1, store=True, metadata={"a": "b"}, user="me"))
    assert response.status_code == 200
    names = {name.strip() for name in response.headers["x-setpoint-ignored-params"].split(",")}
    assert names == {"store", "metadata", "user"}
    assert "x-setpoint-ignored-params" not in house.post(CHAT, chat(max_tokens=1)).headers


def test_neutral_values_of_missing_features_are_accepted(house: House) -> None:
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "use_beam_search": False}
    neutral |= {"guided_json": None, "functions": None, "modalities": ["text"], "reasoning_effort": "none"}
    assert house.post(CHAT, chat(max_tokens=1, **neutral)).status_code == 200


def test_request_id(house: House) -> None:
    given = house.post(CHAT, chat(max_tokens=1), headers={"X-Request-Id": "abc-1.2:3"})
    assert given.headers["x-request-id"] == "abc-1.2:3"
    for bad in ("a b", "x" * 129, "10.0.0.1/evil", "é".encode("latin-1"), ""):
        answer = house.post(CHAT, chat(max_tokens=1), headers={"X-Request-Id": bad})
        assert answer.status_code == 200
        assert len(answer.headers["x-request-id"]) == 32
    assert house.post(CHAT, chat(max_tokens=1, request_id="mine")).headers["x-request-id"] == "mine"


def test_truncation(house: House) -> None:
    long = [{"role": "user", "content": "x" * 3000}]
    refused = house.post(CHAT, {"messages": long})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["message"].startswith("This model's maximum context length is 1024 tokens")
    assert (error["reason"], error["param"]) == ("context_length_exceeded", "messages")
    for side in ("left", "right"):
        body = {"messages": long, "max_tokens": 2, "truncate_prompt_tokens": 50, "truncation_side": side}
        assert house.post(CHAT, body).json()["usage"]["prompt_tokens"] == 50
    rest = {"messages": long, "max_tokens": 4, "truncate_prompt_tokens": -1}
    assert house.post(CHAT, rest).json()["usage"]["prompt_tokens"] == 1020


def test_max_tokens_defaults_to_the_rest_of_the_context() -> None:
    with House(next_token=story) as house:
        assert house.post(CHAT, chat("x")).json()["usage"]["total_tokens"] == 1024


def test_response_metrics_are_opt_in() -> None:
    with House(next_token=story, response_metrics=True) as house:
        metrics = house.post(CHAT, chat(max_tokens=5)).json()["metrics"]
        assert set(metrics) == {"queue_time_ms", "time_to_first_token_ms", "mean_itl_ms"}
        assert all(value >= 0 for value in metrics.values())
