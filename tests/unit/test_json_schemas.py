"""Schemas that never end are named before anything is compiled; whatever can end is left alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.endless_schemas import endless_place
from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import RequestError

TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}, "value": {"type": "integer"}},
    "required": ["value"],
}
LIST: dict[str, Any] = {"$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}, "$ref": "#/$defs/list"}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"$ref": "#"}, "#"),
        ({"allOf": [{"$ref": "#"}]}, "#"),
        ({"anyOf": [{"$ref": "#"}, {"$ref": "#/anyOf/0"}]}, "#"),
        ({"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"$ref": "#/$defs/a"}}}, "#/anyOf/0"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "#"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "#"),
        ({"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}, "#/properties/a"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "#"),
        ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "#"),
        (
            {"type": ["object", "array"], "minItems": 1, "items": {"$ref": "#"}}
            | {"properties": {"a/b": {"$ref": "#"}}, "required": ["a/b"]},
            "#",
        ),
    ],
)
def test_what_never_ends_is_named(schema: dict[str, Any], place: str) -> None:
    assert endless_place(schema) == place
    with pytest.raises(RequestError) as caught:
        StructuredOutputs(json=schema)
    assert (caught.value.param, caught.value.reason) == ("structured_outputs.json", "bad_constraint")
    assert f"nothing finite satisfies {place}," in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        TREE,
        LIST,
        {"anyOf": [{"type": "array", "minItems": 1, "items": {"$ref": "#"}}, {"type": "null"}]},
        {"type": ["object", "string"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "object", "properties": {"?a": {"type": "string"}, "~/": {"$ref": "#"}}, "required": ["?a"]},
        {"type": "object", "required": ["elsewhere", 5, {}]},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "type": "string"},  # nothing leads there
        {"enum": [1], "$ref": "#"},
        {"$ref": "#/$defs/none"},  # for the compiler to refuse
        {"$ref": "#name"},
        {"$ref": "#/anyOf/9", "anyOf": [True]},
        {"anyOf": []},
    ],
)
def test_what_can_end_is_left_alone(schema: dict[str, Any]) -> None:
    assert endless_place(schema) is None


def test_a_long_chain_takes_no_time() -> None:
    """Each place waits for the next one, and the last is finite: linear, whatever the order."""
    links = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(4000)}
    assert endless_place({"$ref": "#/$defs/d0", "$defs": links | {"d4000": {"type": "null"}}}) is None
    assert endless_place({"$ref": "#/$defs/d0", "$defs": links | {"d4000": {"$ref": "#"}}}) == "#"


SCHEMAS = st.recursive(
    st.sampled_from([{"type": "null"}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, True]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"allOf": options}),
        st.tuples(inner, st.integers(0, 2)).map(lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1]}),
        st.tuples(inner, st.booleans()).map(
            lambda pair: {"type": "object", "properties": {"p": pair[0]}, "required": ["p"] if pair[1] else []}
        ),
    ),
    max_leaves=6,
)


def smallest(schema: dict[str, Any], node: Any, depth: int) -> bool:
    """Whether a value of at most this depth satisfies a place: the definition, tried out."""
    if not isinstance(node, dict) or node.get("type") == "null":
        return True
    if depth == 0:
        return False
    if "$ref" in node:
        target = schema if node["$ref"] == "#" else schema["$defs"][node["$ref"][-1]]
        return smallest(schema, target, depth - 1)
    if "anyOf" in node:
        return any(smallest(schema, option, depth - 1) for option in node["anyOf"])
    if "allOf" in node:
        return all(smallest(schema, option, depth - 1) for option in node["allOf"])
    if node["type"] == "array":
        return node["minItems"] == 0 or smallest(schema, node["items"], depth - 1)
    return not node["required"] or smallest(schema, node["properties"]["p"], depth - 1)


@given(root=SCHEMAS, first=SCHEMAS, second=SCHEMAS)
@settings(max_examples=scaled(150), deadline=None)
def test_it_is_the_fixed_point(root: Any, first: Any, second: Any) -> None:
    if not isinstance(root, dict):
        return
    schema = root | {"$defs": {"a": first, "b": second}}
    found = endless_place(json.loads(json.dumps(schema)))
    if found is None:
        assert smallest(schema, schema, 40)
    elif found == "#":
        assert not smallest(schema, schema, 12)
