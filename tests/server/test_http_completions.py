"""Completions: prompt forms, echo, the legacy logprobs, detokenize, models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from house import BOS, MODEL, House, completion, events, story, story_text

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def teller() -> Iterator[House]:
    with House(next_token=story) as house:
        yield house


def test_shape_and_default_of_16_tokens(teller: House) -> None:
    answer = teller.post(PATH, completion("abc")).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    [choice] = answer["choices"]
    assert choice["text"] == story_text(4, 16)
    assert answer["usage"]["completion_tokens"] == 16


def test_prompt_forms_agree(house: House) -> None:
    ids = house.post("/tokenize", {"prompt": "hello"}).json()["tokens"]
    assert ids[0] == BOS
    forms = ["hello", ids, ["hello"], [ids]]
    texts = [house.post(PATH, completion(form, temperature=0)).json()["choices"][0]["text"] for form in forms]
    assert len(set(texts)) == 1
    bare = house.post(PATH, completion("hello", temperature=0, add_special_tokens=False)).json()
    assert bare["usage"]["prompt_tokens"] == len(ids) - 1


def test_several_prompts_and_choices_keep_their_order(house: House) -> None:
    body = completion(["one", "two", "three"], n=2, temperature=1, seed=3, max_tokens=8, echo=False)
    choices = house.post(PATH, body).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    alone = house.post(PATH, {**body, "prompt": "two"}).json()["choices"]
    assert [choice["text"] for choice in choices[2:4]] == [choice["text"] for choice in alone]
    chunks = events(house.post(PATH, {**body, "stream": True}).text)[:-1]
    for choice in choices:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]


def test_echo(teller: House) -> None:
    choice = teller.post(PATH, completion("abc", echo=True, max_tokens=5)).json()["choices"][0]
    assert choice["text"] == "abc" + story_text(4, 5)
    from_ids = teller.post(PATH, completion([97, 98, 99], echo=True, max_tokens=5)).json()["choices"][0]
    assert from_ids["text"] == "abc" + story_text(3, 5)
    chunks = events(teller.post(PATH, completion("abc", echo=True, max_tokens=5, stream=True)).text)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(house: House, stream: bool) -> None:
    body = completion("hello", logprobs=2, max_tokens=4, temperature=0, ignore_eos=True, stream=stream)
    response = house.post(PATH, body)
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in events(response.text)[:-1]]
        lists = {key: [value for part in parts if part for value in part[key]] for key in parts[0]}
    else:
        lists = response.json()["choices"][0]["logprobs"]
    assert set(lists) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in lists.values()} == {4}
    assert lists["text_offset"][0] == 0
    assert lists["text_offset"] == sorted(lists["text_offset"])
    for name, logprob, top in zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True):
        assert top[name] == logprob


def test_echo_with_logprobs_covers_the_prompt(house: House) -> None:
    prompt = house.post("/tokenize", {"prompt": "hello"}).json()["tokens"]
    body = completion(prompt, echo=True, logprobs=1, max_tokens=2, temperature=0, ignore_eos=True)
    lists = house.post(PATH, body).json()["choices"][0]["logprobs"]
    assert len(lists["tokens"]) == len(prompt) + 2
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    assert all(value < 0 for value in lists["token_logprobs"][1:])


def test_prompt_logprobs(house: House) -> None:
    body = completion([5, 6, 7], prompt_logprobs=0, max_tokens=1)
    entries = house.post(PATH, body).json()["choices"][0]["prompt_logprobs"]
    assert [list(entry or {}) for entry in entries] == [[], ["6"], ["7"]]


def test_token_ids(house: House) -> None:
    choice = house.post(PATH, completion([5, 6], max_tokens=3, ignore_eos=True, return_token_ids=True)).json()
    assert choice["choices"][0]["prompt_token_ids"] == [5, 6]
    assert len(choice["choices"][0]["token_ids"]) == 3


def test_tokenize_and_back(house: House) -> None:
    text = "naïve 世界 👩‍👩‍👧 </s> end"
    answer = house.post("/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 1024
    assert house.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert house.post("/tokenize", {"prompt": "a"}).json()["tokens"] == [BOS, ord("a")]
    assert house.post("/tokenize", {"prompt": "a"}).json()["token_strs"] is None


def test_models(house: House) -> None:
    listed = house.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == [MODEL, "tiny-alias"]
    assert set(listed["data"][0]) >= {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
    assert house.get(f"/v1/models/{MODEL}").json() == listed["data"][0]
    assert house.get("/v1/models/other").status_code == 404
    assert house.post(PATH, completion(model="tiny-alias")).json()["model"] == MODEL
    missing = house.post(PATH, completion(model="other"))
    assert missing.status_code == 404
    assert missing.json()["error"]["reason"] == "model_not_found"


def test_version_and_info(house: House) -> None:
    assert set(house.get("/version").json()) == {"version"}
    info = house.get("/server_info").json()
    assert info["model"] == MODEL
    assert info["limits"]["max_body_bytes"] == 16 << 20
