"""Structural tags: both wire formats become one, and every bad field is named with its place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from setpoint.engine.structural_tags import MAX_FORMAT_DEPTH, MAX_TAGS
from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import RequestError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
STRUCTURE = {"begin": "<f=one>", "schema": SCHEMA, "end": "</f>"}
LEGACY: dict[str, Any] = {"type": "structural_tag", "structures": [STRUCTURE], "triggers": ["<f="]}
TAG = {"begin": "<f=one>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}
TRIGGERED: dict[str, Any] = {"type": "triggered_tags", "triggers": ["<f="], "tags": [TAG]}
FREE = {"type": "any_text"}


def checked(value: Any) -> Any:
    wanted = StructuredOutputs(structural_tag=value)
    assert wanted.kind == "structural_tag"
    return json.loads(str(wanted.structural_tag))


def test_both_wire_formats_are_one() -> None:
    assert checked(LEGACY) == checked({"format": TRIGGERED}) == TRIGGERED
    assert checked(json.dumps(LEGACY)) == checked({"type": "structural_tag", "format": TRIGGERED}) == TRIGGERED


def test_what_asks_for_nothing_is_left_out() -> None:
    assert checked({"format": TRIGGERED | {"at_least_one": False, "stop_after_first": True}}) == TRIGGERED | {
        "stop_after_first": True
    }


@pytest.mark.parametrize(
    "format",
    [
        FREE,
        {"type": "tag", "begin": "", "content": FREE, "end": ""},
        {"type": "tag", "begin": "<think>", "content": FREE, "end": "</think>"},
        {"type": "sequence", "elements": [{"type": "const_string", "value": "a"}, TRIGGERED]},
        {"type": "or", "elements": [TRIGGERED, {"type": "regex", "pattern": "[a-z]/"}]},
        {"type": "tags_with_separator", "separator": "", "tags": [TAG | {"type": "tag"}]},
        {"type": "json_schema", "json_schema": True},
        {"type": "triggered_tags", "triggers": ["<a", "<b"], "tags": [TAG | {"begin": "<a"}, TAG | {"begin": "<bc"}]},
    ],
)
def test_what_is_accepted(format: dict[str, Any]) -> None:
    assert checked({"format": format})["type"] == format["type"]


def deep(count: int) -> dict[str, Any]:
    format: dict[str, Any] = FREE
    for _ in range(count):
        format = {"type": "sequence", "elements": [format]}
    return format


def wide(count: int) -> dict[str, Any]:
    names = [f"p{i}" for i in range(count)]
    return {"type": "object", "properties": dict.fromkeys(names, True), "required": names}


def of(**fields: Any) -> dict[str, Any]:
    return {"format": TRIGGERED | fields}


BAD: list[tuple[Any, str, str]] = [
    ("{", "", "bad_constraint"),
    ("[]", "", "malformed"),
    ({}, "format", "malformed"),
    ({"a": 1}, "a", "unknown_field"),
    ({"type": "json_schema", "format": FREE}, "type", "bad_constraint"),
    (LEGACY | {"format": FREE}, "format", "unknown_field"),
    ({"structures": [STRUCTURE]}, "triggers", "malformed"),
    (LEGACY | {"structures": []}, "structures", "out_of_range"),
    (LEGACY | {"structures": [STRUCTURE] * (MAX_TAGS + 1)}, "structures", "out_of_range"),
    (LEGACY | {"structures": [STRUCTURE | {"extra": 1}]}, "structures.0.extra", "unknown_field"),
    (LEGACY | {"structures": [STRUCTURE, {"begin": "<f="}]}, "structures.1.schema", "malformed"),
    (LEGACY | {"structures": [STRUCTURE | {"schema": 5}]}, "structures.0.schema", "malformed"),
    (LEGACY | {"structures": [STRUCTURE | {"schema": {"$ref": "#"}}]}, "structures.0.schema", "bad_constraint"),
    (LEGACY | {"structures": [STRUCTURE | {"begin": ""}]}, "structures.0.begin", "bad_constraint"),
    (LEGACY | {"structures": [STRUCTURE | {"begin": "x" * 1025}]}, "structures.0.begin", "out_of_range"),
    (LEGACY | {"triggers": ["<g"]}, "triggers.0", "bad_constraint"),
    (LEGACY | {"triggers": ["<f=", "<f="]}, "triggers.0", "conflict"),
    (LEGACY | {"triggers": ["<f=", "f"]}, "triggers.1", "conflict"),
    (LEGACY | {"triggers": [""]}, "triggers.0", "bad_constraint"),
    (LEGACY | {"triggers": "<f="}, "triggers", "malformed"),
    (LEGACY | {"structures": [STRUCTURE, STRUCTURE | {"begin": "f="}]}, "triggers", "bad_constraint"),
    ({"format": {"type": "nothing"}}, "format.type", "bad_constraint"),
    ({"format": []}, "format.type", "bad_constraint"),
    (of(at_least_one=1), "format.at_least_one", "malformed"),
    (of(excludes=[]), "format.excludes", "unknown_field"),
    (of(tags=[TAG | {"type": "or"}]), "format.tags.0.type", "bad_constraint"),
    (of(tags=[TAG | {"content": FREE, "end": ""}]), "format.tags.0.content", "bad_constraint"),
    (of(tags=[TAG | {"content": TRIGGERED}]), "format.tags.0.content", "bad_constraint"),
    ({"format": {"type": "sequence", "elements": [FREE, FREE]}}, "format.elements.0", "bad_constraint"),
    ({"format": {"type": "or", "elements": []}}, "format.elements", "out_of_range"),
    ({"format": {"type": "const_string", "value": ""}}, "format.value", "bad_constraint"),
    ({"format": {"type": "regex", "pattern": "a\\"}}, "format.pattern", "bad_constraint"),
    ({"format": {"type": "regex", "pattern": 5}}, "format.pattern", "malformed"),
    ({"format": {"type": "json_schema", "json_schema": wide(5001)}}, "format.json_schema", "out_of_range"),
    (
        LEGACY | {"structures": [STRUCTURE | {"schema": wide(2501)}, STRUCTURE | {"schema": wide(2501)}]},
        "structures.1.schema",
        "out_of_range",
    ),
    ({"format": deep(MAX_FORMAT_DEPTH)}, "format" + ".elements.0" * MAX_FORMAT_DEPTH, "compile_limit"),
    ({"format": {"type": "const_string", "value": "x" * (256 << 10)}}, "", "out_of_range"),
    ({"format": {"type": "const_string", "value": "\ud800"}}, "", "bad_constraint"),
    (LEGACY | {"a": float("nan")}, "", "bad_constraint"),
]


@pytest.mark.parametrize(("value", "path", "reason"), BAD, ids=lambda value: str(value)[:50])
def test_what_is_refused_is_named(value: Any, path: str, reason: str) -> None:
    for param, prefix in (("structured_outputs", "structured_outputs.structural_tag"), ("response_format",) * 2):
        with pytest.raises(RequestError) as caught:
            StructuredOutputs.of({"structural_tag": value}, param)
        assert (caught.value.param, caught.value.reason) == (f"{prefix}.{path}".rstrip("."), reason)
        assert str(caught.value).startswith(str(caught.value.param))
        assert "\n" not in str(caught.value)


def test_options_of_json_go_with_it() -> None:
    assert StructuredOutputs(structural_tag=LEGACY, disable_any_whitespace=True).kind == "structural_tag"
