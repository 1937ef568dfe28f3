"""What a client may ask for as structure: the bounds, and the field that an error names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from setpoint.engine.json_schemas import MAX_SCHEMA_DEPTH
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import RequestError


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def wide(count: int, num_optional: int = 0) -> dict[str, Any]:
    names = [f"p{i}" for i in range(count)]
    return {"properties": dict.fromkeys(names, True), "required": names[num_optional:]}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"json": {"type": "object"}}, "json"),
        ({"json": '{"type": "object"}'}, "json"),
        ({"json": nested(MAX_SCHEMA_DEPTH)}, "json"),
        ({"json": wide(5000)}, "json"),
        ({"json": wide(5000, num_optional=1000)}, "json"),
        ({"json": wide(1000, num_optional=1000)}, "json"),
        ({"json": {"type": "object"}, "whitespace_pattern": " ?"}, "json"),
        ({"json": {"type": "object"}, "disable_any_whitespace": True}, "json"),
        ({"json_object": True, "disable_additional_properties": False}, "json_object"),
        ({"regex": "a+" * 4096}, "regex"),
        ({"choice": ["a", "b", "a"]}, "choice"),
        ({"choice": [str(i) for i in range(1024)]}, "choice"),
        ({"grammar": 'start: "a"', "json": None, "regex": None}, "grammar"),
    ],
)
def test_what_is_accepted(fields: dict[str, Any], kind: str) -> None:
    wanted = StructuredOutputs.of(fields)
    assert wanted.kind == kind
    assert StructuredOutputs.of(wanted) is wanted
    assert SamplingParams(structured_outputs=fields).structured_outputs == wanted


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({}, "structured_outputs", "bad_constraint"),
        ({"json": None}, "structured_outputs", "bad_constraint"),
        ({"json_object": False}, "structured_outputs", "bad_constraint"),
        ({"json_object": 1}, "structured_outputs.json_object", "bad_constraint"),
        ({"json": {"type": "object"}, "regex": "a"}, "structured_outputs", "conflict"),
        ({"jsn": {}}, "structured_outputs.jsn", "unknown_field"),
        ({"json": {}}, "structured_outputs.json", "bad_constraint"),
        ({"json": "{}"}, "structured_outputs.json", "bad_constraint"),
        ({"json": "{"}, "structured_outputs.json", "bad_constraint"),
        ({"json": '{"a": NaN}'}, "structured_outputs.json", "bad_constraint"),
        ({"json": {"a": float("inf")}}, "structured_outputs.json", "bad_constraint"),
        ({"json": {"a": object()}}, "structured_outputs.json", "bad_constraint"),
        ({"json": {"a": "\ud800"}}, "structured_outputs.json", "bad_constraint"),
        ({"json": "[1]"}, "structured_outputs.json", "malformed"),
        ({"json": 5}, "structured_outputs.json", "malformed"),
        ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, "structured_outputs.json", "compile_limit"),
        ({"json": json.dumps(nested(400))}, "structured_outputs.json", "compile_limit"),
        ({"json": "[" * 100_000}, "structured_outputs.json", "compile_limit"),
        ({"json": wide(5001)}, "structured_outputs.json", "out_of_range"),
        ({"json": wide(1001, num_optional=1001)}, "structured_outputs.json", "out_of_range"),
        ({"json": {"items": wide(5000, num_optional=4999)}}, "structured_outputs.json", "out_of_range"),
        ({"json": {"description": "x" * (256 << 10)}}, "structured_outputs.json", "out_of_range"),
        ({"json": {"type": "object", "x-guidance": {"lenient": True}}}, "structured_outputs.json", "bad_constraint"),
        ({"regex": ""}, "structured_outputs.regex", "bad_constraint"),
        ({"regex": " \n"}, "structured_outputs.regex", "bad_constraint"),
        ({"regex": "a" * 8193}, "structured_outputs.regex", "out_of_range"),
        ({"regex": "a\\"}, "structured_outputs.regex", "bad_constraint"),
        ({"regex": "\\\\\\"}, "structured_outputs.regex", "bad_constraint"),
        ({"regex": ["a"]}, "structured_outputs.regex", "malformed"),
        ({"regex": "\udc00"}, "structured_outputs.regex", "bad_constraint"),
        ({"grammar": ""}, "structured_outputs.grammar", "bad_constraint"),
        ({"grammar": "a" * (64 << 10) + "b"}, "structured_outputs.grammar", "out_of_range"),
        ({"choice": []}, "structured_outputs.choice", "out_of_range"),
        ({"choice": ["a", ""]}, "structured_outputs.choice", "bad_constraint"),
        ({"choice": "abc"}, "structured_outputs.choice", "malformed"),
        ({"choice": [1]}, "structured_outputs.choice", "malformed"),
        ({"choice": [str(i) for i in range(1025)]}, "structured_outputs.choice", "out_of_range"),
        ({"choice": ["x" * 4096] * 17}, "structured_outputs.choice", "out_of_range"),
        ({"structural_tag": {"a": 1}}, "structured_outputs.structural_tag.a", "unknown_field"),
        ({"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern", "conflict"),
        ({"json_object": True, "whitespace_pattern": ""}, "structured_outputs.whitespace_pattern", "bad_constraint"),
        ({"json_object": True, "disable_any_whitespace": 1}, "structured_outputs.disable_any_whitespace", "malformed"),
        (
            {"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True},
            "structured_outputs.whitespace_pattern",
            "conflict",
        ),
        ("json", "structured_outputs", "out_of_range"),
    ],
)
def test_what_is_refused(fields: Any, param: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(structured_outputs=fields)
    assert (caught.value.param, caught.value.reason) == (param, reason)
    assert param in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_name_the_field_that_the_client_used() -> None:
    with pytest.raises(RequestError) as caught:
        StructuredOutputs.of({"regex": ""}, "guided_regex")
    assert caught.value.param == "guided_regex"


def test_the_order_of_keys_is_kept() -> None:
    first, second = ({"json": {"properties": dict.fromkeys(order, True)}} for order in ("ab", "ba"))
    assert StructuredOutputs.of(first).key != StructuredOutputs.of(second).key
