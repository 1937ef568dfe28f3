"""Structured output over HTTP: every name of it, whole and streamed, and never text without it."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest
from house import MODEL, TOKENIZER, House, chat, completion, events

from setpoint.grammar.compiler import COMPILE_LIMIT_S

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
CALLS: dict[str, Any] = {
    "type": "structural_tag",
    "structures": [{"begin": "x>", "schema": {"enum": [None, 1, "a"]}, "end": "!"}],
    "triggers": ["x"],
}
LONG = {"max_tokens": 400, "temperature": 1.0}


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def is_person(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "age"} and len(value["name"]) <= 6 and 0 <= value["age"] <= 99


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
        {"guided_json": SCHEMA},
        {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
        {"json_schema": json.dumps(SCHEMA)},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_every_name_of_a_schema(house: House, fields: dict[str, Any]) -> None:
    for seed in range(5):
        assert is_person(content(house.post(CHAT, chat(seed=seed, **LONG, **fields))))
        assert is_person(content(house.post(COMPLETIONS, completion(seed=seed, **LONG, **fields))))


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"structured_outputs": {"regex": "(yes|no)!"}}, {"yes!", "no!"}),
        ({"guided_regex": "[ab]c"}, {"ac", "bc"}),
        ({"regex": "x{3}"}, {"xxx"}),
        ({"structured_outputs": {"choice": ["the one", "the other"]}}, {"the one", "the other"}),
        ({"guided_choice": ["é", "漢"]}, {"é", "漢"}),
        ({"structured_outputs": {"grammar": 'start: "a" ("b" | "c")'}}, {"ab", "ac"}),
        ({"guided_grammar": 'root ::= "p" | "q"'}, {"p", "q"}),
        ({"ebnf": 'root ::= "p" [0-1]'}, {"p0", "p1"}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value)[:50],
)
def test_other_structures(house: House, fields: dict[str, Any], texts: set[str]) -> None:
    assert {content(house.post(CHAT, chat(seed=seed, **LONG, **fields))) for seed in range(12)} <= texts
    assert content(house.post(COMPLETIONS, completion(**LONG, **fields))) in texts


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": CALLS},
        {"structured_outputs": {"structural_tag": CALLS}},
        {"structured_outputs": {"structural_tag": json.dumps(CALLS)}},
        {
            "response_format": {
                "type": "structural_tag",
                "format": {
                    "type": "triggered_tags",
                    "triggers": ["x"],
                    "tags": [
                        {
                            "begin": "x>",
                            "content": {"type": "json_schema", "json_schema": {"enum": [None, 1, "a"]}},
                            "end": "!",
                        }
                    ],
                },
            }
        },
    ],
    ids=["format-legacy", "field-legacy", "field-text", "format-new"],
)
def test_structural_tags(house: House, fields: dict[str, Any]) -> None:
    """Every x of a text that is otherwise random begins a tag that is whole, or cut by the length of the output."""
    tags = [">null!", ">1!", '>"a"!']
    num_found = 0
    for seed in range(6):
        body = completion(seed=seed, max_tokens=300, temperature=1.0, logit_bias={"120": 4}, **fields)
        answer = house.post(COMPLETIONS, body)
        assert answer.status_code == 200, answer.text
        *parts, last = answer.json()["choices"][0]["text"].split("x")
        assert all(part.startswith(tuple(tags)) for part in parts[1:]), parts
        assert not parts or any(tag.startswith(last) or last.startswith(tag) for tag in tags), last
        num_found += len(parts)
    assert num_found > 0


def test_json_object(house: House) -> None:
    response = house.post(CHAT, chat(response_format={"type": "json_object"}, **LONG))
    choice = response.json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_a_stream_says_the_same(house: House) -> None:
    body = chat(response_format=FORMAT, seed=7, n=2, **LONG)
    whole = house.post(CHAT, body).json()["choices"]
    with house.client() as client:
        parts = events(client.post(CHAT, json=body | {"stream": True}).text)
    for choice in whole:
        deltas = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == choice["index"]]
        assert "".join(delta["delta"].get("content") or "" for delta in deltas) == choice["message"]["content"]
        assert deltas[-1]["finish_reason"] == choice["finish_reason"] == "stop"


def test_logprobs_cover_every_token(house: House) -> None:
    """They switch forced tokens off, and change none."""
    plain = content(house.post(CHAT, chat(response_format=FORMAT, seed=3, **LONG)))
    response = house.post(CHAT, chat(response_format=FORMAT, seed=3, logprobs=True, top_logprobs=2, **LONG))
    assert content(response) == plain
    tokens = response.json()["choices"][0]["logprobs"]["content"]
    assert len(tokens) == response.json()["usage"]["completion_tokens"]


def test_length_is_not_success(house: House) -> None:
    response = house.post(CHAT, chat(response_format=FORMAT, max_tokens=3)).json()
    assert response["choices"][0]["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == 3


def test_the_openai_client(house: House) -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    with house.openai() as client:
        done = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], response_format=FORMAT, **LONG
        )
        assert Person.model_validate_json(done.choices[0].message.content or "")


def test_usage_counts_forced_tokens_too(house: House) -> None:
    response = house.post(CHAT, chat(guided_choice=["hello there"], return_token_ids=True)).json()
    tokens = response["choices"][0]["token_ids"]
    assert TOKENIZER.decode(tokens) == "hello there"
    assert response["usage"]["completion_tokens"] == len(tokens)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "conflict"),
        ({"structured_outputs": {"regex": "a"}, "regex": "a"}, "regex", "conflict"),
        ({"guided_json": SCHEMA, "json_schema": "{}"}, "json_schema", "conflict"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "conflict"),
        ({"structured_outputs": {}}, "structured_outputs", "bad_constraint"),
        ({"structured_outputs": {"regex": None}}, "structured_outputs", "bad_constraint"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", "unknown_field"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "out_of_range"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag.format", "malformed"),
        (
            {"structured_outputs": {"structural_tag": CALLS | {"triggers": ["y"]}}},
            "structured_outputs.structural_tag.triggers.0",
            "bad_constraint",
        ),
        ({"response_format": CALLS | {"format": {"type": "any_text"}}}, "response_format.format", "unknown_field"),
        ({"response_format": CALLS | {"triggers": "y"}}, "response_format.triggers", "malformed"),
        ({"response_format": FORMAT | {"triggers": ["y"]}}, "response_format.triggers", "conflict"),
        ({"response_format": {"type": "text", "format": {"type": "any_text"}}}, "response_format.format", "conflict"),
        ({"response_format": {"type": "structural_tags"}}, "response_format.type", "out_of_range"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json", "bad_constraint"),
        ({"structured_outputs": {"regex": "a" * 8193}}, "structured_outputs.regex", "out_of_range"),
        ({"guided_regex": ""}, "guided_regex", "bad_constraint"),
        ({"guided_regex": "("}, "guided_regex", "bad_constraint"),
        ({"guided_grammar": ""}, "guided_grammar", "bad_constraint"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "conflict"),
        ({"json_schema": "{}"}, "json_schema", "bad_constraint"),
        ({"json_schema": {}}, "json_schema", "malformed"),
        ({"guided_json": 5}, "guided_json", "malformed"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "malformed"),
        (
            {"response_format": {"type": "json_object", "json_schema": FORMAT["json_schema"]}},
            "response_format.json_schema",
            "conflict",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": SCHEMA}}},
            "response_format.json_schema.name",
            "out_of_range",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "malformed",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
            "response_format",
            "bad_constraint",
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format.format", "malformed"),
        ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "not_supported"),
        ({"guided_choice": ["a"], "allowed_token_ids": [98]}, "structured_outputs", "conflict"),
        ({"guided_choice": ["a"], "min_tokens": 2}, "min_tokens", "conflict"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_had_is_refused(house: House, fields: dict[str, Any], param: str, reason: str) -> None:
    for path, body in ((CHAT, chat(max_tokens=5)), (COMPLETIONS, completion(max_tokens=5))):
        for stream in (False, True):
            response = house.post(path, body | fields | {"stream": stream})
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert (error["param"], error["reason"]) == (param, reason)


def test_a_bomb_leaves_the_event_loop_alone(house: House) -> None:
    """RX-4: while a grammar that cannot be built in time is tried, others are answered at once."""
    bomb = {"regex": "((((a{1,300}){1,300}){1,300}b){1,300}){1,300}"}
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(house.post(CHAT, chat(max_tokens=2, **bomb))))
    thread.start()
    with house.client() as client:
        while thread.is_alive():
            assert client.get("/livez").status_code == 200
            assert client.post("/tokenize", json={"prompt": "hello"}).status_code == 200
    thread.join()
    assert answers[0].status_code in (200, 400)
    again = house.post(CHAT, chat(max_tokens=2, **bomb))
    assert (again.status_code, again.json()) == (answers[0].status_code, again.json())


def test_a_flood_of_bombs_leaves_others_alone(house: House) -> None:
    """RX-4: hostile schemas, none sent twice, from several clients; pings and a stream go on as ever.

    `benchmarks/schema_flood.py` measures by how much they slow down; here they must only not wait for a compilation.
    """

    def send(client: int) -> None:
        for number in range(3):
            name = f"{client}-{number}"
            nested = f"((((a{{1,{300 + 10 * client + number}}}){{1,300}}){{1,300}}b){{1,300}}){{1,300}}"
            pairs = [{"anyOf": [{"properties": {f"{name}{i}": {"type": t}}} for t in "ab"]} for i in range(24)]
            doubling = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(300))
            for bomb in (
                {"guided_regex": nested},
                {"guided_json": {"type": "object", "allOf": pairs}},
                {"guided_json": {"type": "object", "properties": {name: {"$ref": f"#/properties/{name}"}}}},
                {"guided_grammar": f'start: r0\nr300: "{name}"\n{doubling}'},
                {"guided_json": {"enum": [f"{name}-{i}" for i in range(5000)]}},
            ):
                statuses.append(house.post(COMPLETIONS, completion(max_tokens=2, **bomb)).status_code)

    story = completion("the story", max_tokens=200, stream=True, seed=1)
    expected = text_of(house.post(COMPLETIONS, story))
    statuses: list[int] = []
    threads = [threading.Thread(target=send, args=(client,)) for client in range(4)]
    for thread in threads:
        thread.start()
    longest = 0.0
    with house.client() as client:
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            assert client.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - began)
            assert text_of(client.post(COMPLETIONS, json=story)) == expected
    assert len(statuses) == 60
    assert set(statuses) == {200, 400}
    assert longest < COMPILE_LIMIT_S


def text_of(stream: httpx.Response) -> str:
    return "".join(part["choices"][0]["text"] for part in events(stream.text) if part != "[DONE]")


def test_no_violation_was_counted(house: House) -> None:
    assert {value for name, value in house.metrics().items() if name.startswith("setpoint_output_violations")} == {0.0}
