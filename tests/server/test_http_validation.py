"""IV-1, IV-2, IV-4, IV-5: degenerate input, bounds, unknown names, constraints that do not exist yet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from canary import Canary, assert_clean
from house import BOS, EOS, House, chat, completion
from pydantic import BaseModel, Field

from setpoint.engine.sampling import BOUNDS
from setpoint.server.fields import ALIASES, FORBIDDEN, IGNORED, UNSUPPORTED, UNTIL_BUILT
from setpoint.server.openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WIRE_TYPES = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[httpx.Client]:
    with house.client() as shared:
        yield shared


def assert_error(response: httpx.Response, status: int, reason: str | None = None, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "reason"}
    assert error["code"] == status
    assert error["message"]
    if reason is not None:
        assert error["reason"] == reason, error
    if param is not None:
        assert error["param"] == param, error
    assert_clean(response.text)


# IV-1

DEGENERATE: list[tuple[str, Any]] = [
    *[
        (COMPLETIONS, completion(prompt, max_tokens=1))
        for prompt in (
            *("", " ", "\n", "\t \r\n", "\0", "a\0b", "\ufeff", "\ufffd", "\u202e", "\u200d", "e\u0301" * 50, "</s>"),
            *("<s></s>", "<s>" * 20, "💥" * 20, "\U0010ffff", "\x1b[31m", "%s%n", "{{7*7}}", "{% raw %}", "a" * 1000),
            *([], [""], ["", "a"], [[]], [[], []], [BOS], [EOS], [[EOS]], [0], [261], [262], [-1], [2**31], [2**63]),
            *([None], [1, "a"], ["a", 1], [[1], "a"], [[[1]]], [1.5], [True], None, 1, {}, {"a": 1}, True, ["a"] * 257),
        )
    ],
    *[
        (CHAT, chat(content, max_tokens=1))
        for content in ("", " ", "\0", "\ufeffx", None, [], [{"type": "text", "text": ""}], [{}], ["x"], 1, {})
    ],
    *[
        (CHAT, {"messages": messages, "max_tokens": 1})
        for messages in (
            *([], None, {}, "x", [None], [[]], [{}], [{"role": "user"}], [{"content": "x"}]),
            [{"role": "", "content": "x"}],
            [{"role": "robot", "content": "x"}],
            [{"role": "assistant", "content": None}],
            [{"role": "assistant", "content": "x"}],
            [{"role": "system", "content": "x"}],
            [{"role": "user", "content": "x", "name": "a b"}],
        )
    ],
    *[
        (COMPLETIONS, completion(max_tokens=value))
        for value in (0, 1, -1, 1023, 1024, 2**31, 2**63, 1e308, 1.0, "1", True, None, [])
    ],
    *[("/tokenize", body) for body in ({}, {"prompt": ""}, {"prompt": None}, {"messages": []}, {"prompt": "</s>"})],
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
    *[("/detokenize", {"tokens": tokens}) for tokens in ([], [0], [EOS], [262], [-1], [2**40], None, "a", [[1]])],
]


def test_degenerate_requests(house: House, canary: Canary, client: httpx.Client) -> None:
    assert len(DEGENERATE) >= 60
    statuses = []
    for path, body in DEGENERATE:
        response = client.post(path, content=json.dumps(body), headers=JSON)
        statuses.append(response.status_code)
        if response.status_code != 200:
            assert_error(response, 400)
    assert 200 in statuses


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b" ",
            b"null",
            b"[]",
            b"1",
            b'"x"',
            b"{",
            b"}",
            b"{]",
            b'{"a"}',
            b"\xff\xfe{}",
            b"\xef\xbb\xbf{}",
            b"{}x",
        ),
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00\\ud800"}',
        b'{"prompt": "\xc0\xaf"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": 0, "temperature": 1}',
        b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}',
        b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"prompt": "a", "metadata": ' + b"[" * 70 + b"]" * 70 + b"}",
    ],
)
def test_malformed_bodies(client: httpx.Client, body: bytes) -> None:
    response = client.post(COMPLETIONS, content=body, headers=JSON)
    assert_error(response, 400)


def test_valid_surrogate_pairs_are_text(client: httpx.Client) -> None:
    response = client.post(
        "/tokenize", content=b'{"prompt": "\\ud83d\\ude00", "add_special_tokens": false}', headers=JSON
    )
    assert bytes(response.json()["tokens"]).decode() == "😀"


def test_control_tokens_typed_as_text(client: httpx.Client) -> None:
    """IV-6 for text: parsed or refused, never an error of ours."""
    for text in ("<|im_start|>system", "<|assistant|>", "</s><s>", "<image>", "<|endoftext|>" * 20):
        assert client.post(CHAT, json=chat(text, max_tokens=1)).status_code == 200


# IV-2


def is_unbounded(schema: dict[str, Any]) -> bool:
    """Whether this node of a JSON schema, itself, lets a value grow without limit."""
    match schema.get("type"):
        case "integer" | "number":
            return not (schema.keys() & {"minimum", "exclusiveMinimum"} and schema.keys() & {"maximum"})
        case "array":
            return "maxItems" not in schema
        case "string":
            return not schema.keys() & {"maxLength", "pattern", "const", "enum"}
        case "object":
            return schema.get("additionalProperties") is not False and "maxProperties" not in schema
        case None:
            return not schema.keys() & {"anyOf", "oneOf", "allOf", "$ref", "const", "enum"}
        case _:
            return False


def unbounded(schema: dict[str, Any]) -> list[str]:
    """The places in a JSON schema without a limit: each node that describes a value is looked at."""
    found = ["/"] if is_unbounded(schema) else []
    children: dict[str, Any] = {}
    for group in ("properties", "$defs", "patternProperties"):
        children |= schema.get(group, {})
    for name in ("items", "additionalProperties", "propertyNames"):
        if isinstance(schema.get(name), dict):
            children[name] = {"type": "string", **schema[name]} if name == "propertyNames" else schema[name]
    children |= {f"any{index}": option for index, option in enumerate(schema.get("anyOf", ()))}
    for name, child in children.items():
        found += [f"/{name}{path}" for path in unbounded(child)]
    return found


@pytest.mark.parametrize("wire_type", WIRE_TYPES)
def test_every_field_is_bounded(wire_type: type[BaseModel]) -> None:
    assert unbounded(wire_type.model_json_schema()) == []


def test_the_introspection_finds_what_is_unbounded() -> None:
    class Loose(BaseModel):
        a: int = Field(ge=0)
        b: list[int]
        c: str
        d: dict[str, float]
        e: Any

    paths = {path.split("/")[1] for path in unbounded(Loose.model_json_schema())}
    assert paths == {"", "a", "b", "c", "d", "e"}


def violations() -> list[tuple[str, Any]]:
    wild: list[Any] = [2**31, 2**63, -(2**63) - 1, 1e308, -1e308, True, "1", [1], {"a": 1}, float("inf")]
    cases: list[tuple[str, Any]] = []
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        bound = BOUNDS[name]
        edges = [bound.minimum - 0.01, bound.maximum + 0.01, *([bound.minimum] if bound.exclusive_minimum else [])]
        cases += [(name, value) for value in (*edges, *wild)]
    for name in ("n", "top_k", "min_tokens", "prompt_logprobs", "stream_interval", "max_tokens", "logprobs", "best_of"):
        cases += [(name, value) for value in (-2, 1.5, *wild)]
    cases += [("priority", value) for value in (-129, 128, *wild)]
    cases += [("seed", value) for value in (2**63, -(2**63) - 1, 1.5, True, "1")]
    for name in ("stop_token_ids", "allowed_token_ids"):
        cases += [(name, value) for value in ([-1], [262], [2**31], [2**63], [1.5], [True], 1, "a", [0] * 2_000_000)]
    cases += [("stop", value) for value in ("", [""], "x" * 257, ["a"] * 17, 1, [1], {"a": "b"}, True)]
    cases += [("bad_words", value) for value in ([""], ["x" * 257], ["a"] * 129, "a", [1])]
    for bias in ({"262": 1}, {"-1": 1}, {"1": 101}, {"1": -101}, {"1": True}, {"1": "1"}, {"a": 1}, {"9" * 20: 1}, [1]):
        cases.append(("logit_bias", bias))
    cases.append(("logit_bias", {str(i): 1 for i in range(1025)}))
    cases += [("cache_salt", value) for value in ("", "x" * 129, "é", "a\nb", 1, ["a"])]
    cases += [("request_id", value) for value in ("", "x" * 129, "a b", "a/b", "é", 1)]
    cases += [("truncate_prompt_tokens", value) for value in (-2, 1025, 2**40, True)]
    cases += [("truncation_side", value) for value in ("middle", 1, "")]
    cases += [("model", value) for value in ("", "x" * 257, 1, ["tiny"])]
    flags = ("stream", "ignore_eos", "echo", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids")
    cases += [(name, value) for name in flags for value in (1, "true", [], {})]
    cases += [("stream_options", value) for value in ({"include_usage": 1}, {"x": 1}, [], 1)]
    return cases


def test_every_violation_is_refused(house: House, canary: Canary, client: httpx.Client) -> None:
    slow = 0
    for name, value in violations():
        body = json.dumps(completion(max_tokens=4) | {name: value}).replace("Infinity", "1e999")
        began = time.perf_counter()
        response = client.post(COMPLETIONS, content=body, headers=JSON)
        slow += time.perf_counter() - began > 1
        assert_error(response, 400)
        named = response.json()["error"]["param"]
        assert named is None or named.split(".")[0] in (name, "max_tokens"), (name, named)
        assert len(response.content) < 2000
    assert slow <= 4  # the bodies of megabytes


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"min_tokens": 10**9}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"rid": "a", "request_id": "b"}, "rid"),
        ({"extra_key": "a", "cache_salt": "b"}, "extra_key"),
    ],
)
def test_conflicts(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert_error(client.post(CHAT, json=chat(**fields)), 400, param=param)


# IV-4


@pytest.mark.parametrize(
    ("fields", "param", "hint"),
    [
        ({"temprature": 1}, "temprature", "temperature"),
        ({"max_token": 1}, "max_token", "max_tokens"),
        ({"topp": 1}, "topp", "top_p"),
        ({"stream_options": {"include_usag": True}, "stream": True}, "stream_options.include_usag", "include_usage"),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages.0.nam", "name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "txt": "x"}]}]},
            "messages.0.content.0.txt",
            "text",
        ),
        ({"response_format": {"type": "text", "strict": True}}, "response_format.strict", None),
        ({"zzzzzz": 1}, "zzzzzz", None),
        ({"__class__": 1}, "__class__", None),
        ({"echo": True}, "echo", None),
    ],
)
def test_unknown_fields_are_named(client: httpx.Client, fields: dict[str, Any], param: str, hint: str | None) -> None:
    response = client.post(CHAT, json=chat() | fields)
    assert_error(response, 400, "unknown_field", param)
    assert hint is None or f"'{hint}'" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["tokenize", "messages", "chat_template", "bos_token", "raise_exception", "self", "x"])
def test_template_kwargs_off_the_allowlist(client: httpx.Client, name: str) -> None:
    response = client.post(CHAT, json=chat(chat_template_kwargs={name: True}))
    assert_error(response, 400)
    assert response.json()["error"]["param"].startswith("chat_template_kwargs")


def test_aliases_are_honoured(client: httpx.Client) -> None:
    response = client.post(CHAT, json=chat(max_tokens=1, rid="my-id", extra_key="salt"))
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "my-id"


def test_cache_salt_separates_the_prefix_cache(client: httpx.Client) -> None:
    def cached(salt: str | None) -> int:
        body = chat("one long prompt for the salt test " * 4, max_tokens=1, cache_salt=salt)
        return int(client.post(CHAT, json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached("a"), cached("b"), cached(None)][0:2] == [0, 0]
    assert cached("a") > 0


# IV-5 and features that do not exist yet


CONSTRAINTS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "stsring"}}}},
    {"response_format": {"type": "structural_tag"}},
    {"response_format": {"type": "yaml"}},
    {"response_format": {}},
    {"structured_outputs": {"regex": "["}},
    {"structured_outputs": {"json": {}}},
    {"guided_json": {"type": "objct"}},
    {"guided_regex": "a++("},
    {"guided_choice": []},
    {"guided_grammar": ""},
    {"regex": "(?<=a)b"},
    {"ebnf": "root ::= nothing"},
    {"json_schema": "{}"},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"functions": [{"name": "f"}]},
    {"thinking_token_budget": 5},
    {"reasoning_effort": "high"},
    {"include_reasoning": False},
    {"logprob_token_ids": [1]},
    {"documents": [{"text": "x"}]},
]


@pytest.mark.parametrize("fields", CONSTRAINTS, ids=lambda fields: "-".join(fields))
def test_constraints_are_never_dropped(client: httpx.Client, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        response = client.post(CHAT, json=chat(max_tokens=2, stream=stream) | fields)
        assert_error(response, 400)
        assert response.json()["error"]["param"].split(".")[0] in fields


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_names(client: httpx.Client, name: str) -> None:
    for path, body in ((CHAT, chat(max_tokens=1)), (COMPLETIONS, completion(max_tokens=1))):
        response = client.post(path, json=body | {name: ["asked", "for"]})
        assert_error(response, 501 if name in UNTIL_BUILT else 400, "not_supported", name)
        assert response.status_code == 400 or response.headers["x-should-retry"] == "false"
        assert client.post(path, json=body | {name: None}).status_code == 200


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_forbidden_names(client: httpx.Client, name: str) -> None:
    assert_error(client.post(CHAT, json=chat() | {name: "x"}), 400, "not_supported", name)


def test_messages_with_missing_features(client: httpx.Client) -> None:
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
    for message in (
        {"role": "user", "content": image},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "function", "name": "f", "content": "x"},
    ):
        assert_error(client.post(CHAT, json={"messages": [message]}), 400, "not_supported")


def test_tables_do_not_overlap() -> None:
    """A name is in one place only: typed, aliased, ignored, unsupported or forbidden."""
    typed = set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)
    tables = [typed, set(ALIASES), set(IGNORED), set(UNSUPPORTED), set(FORBIDDEN)]
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_model_without_template() -> None:
    with House(template=None) as bare:
        refused = bare.post(CHAT, chat())
        assert_error(refused, 400, "not_supported")
        assert refused.json()["error"]["message"] == "This model has no chat template; use completions."
        assert bare.post(COMPLETIONS, completion(max_tokens=1)).status_code == 200
