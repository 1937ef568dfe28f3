"""JSON schemas from clients: their bounds, checked before anything is compiled.

Whether a schema means anything is found out by whoever compiles it (`setpoint.grammar`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from setpoint.engine.endless_schemas import endless_place

MAX_SCHEMA_BYTES: Final = 256 << 10
MAX_SCHEMA_PROPERTIES: Final = 5_000
MAX_OPTIONAL_PROPERTIES: Final = 1_000  # of one object: after any of them any later one may come, at every token
MAX_SCHEMA_DEPTH: Final = 64
_COUNTED: Final = ("properties", "patternProperties")
_MAX_NAMED: Final = 120  # characters of a place in a message


class SchemaError(ValueError):
    """Why a schema is refused; `reason` as in RequestError."""

    def __init__(self, message: str, reason: str = "bad_constraint") -> None:
        super().__init__(message)
        self.reason = reason


def checked_schema(value: Any, *, allow_anything: bool = False) -> str:
    """The schema as text in its own order of keys. Text is parsed by the same rules as a request's body.

    `allow_anything`: true and {} are schemas too. Raises SchemaError.
    """
    value, text = as_json(value, MAX_SCHEMA_BYTES)
    if value is True and allow_anything:
        return "{}"
    if not isinstance(value, Mapping):
        raise SchemaError("must be an object", "malformed")
    if not value and not allow_anything:
        raise SchemaError("is empty, which allows anything; json_object asks for any object")
    _check_shape(value)
    endless = endless_place(value)
    if endless is not None:
        raise SchemaError(f"never ends: nothing finite satisfies {endless[:_MAX_NAMED]}, which leads back to itself")
    return text


def as_json(value: Any, max_bytes: int) -> tuple[Any, str]:
    """A value that a client sent as JSON or as its text: parsed, and as compact text. Raises SchemaError."""
    try:
        if isinstance(value, str):
            if len(value) > max_bytes:
                raise SchemaError(f"exceeds {max_bytes} bytes", "out_of_range")
            value = json.loads(value, parse_constant=_refuse_constant)
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        size = len(text.encode())
    except RecursionError:
        raise SchemaError(f"is nested deeper than {MAX_SCHEMA_DEPTH}", "compile_limit") from None
    except SchemaError:
        raise
    except (TypeError, ValueError):
        raise SchemaError("is not JSON in valid Unicode") from None
    if size > max_bytes:
        raise SchemaError(f"has {size} bytes, at most {max_bytes} are allowed", "out_of_range")
    return value, text


def num_properties(schema: Any) -> int:
    """Of the whole schema; a name counts wherever it is declared."""
    return sum(
        len(node[name])
        for _, node in _nodes(schema)
        if isinstance(node, Mapping)
        for name in _COUNTED
        if isinstance(node.get(name), Mapping)
    )


def _check_shape(schema: Mapping[str, Any]) -> None:
    for depth, _ in _nodes(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise SchemaError(f"is nested deeper than {MAX_SCHEMA_DEPTH}", "compile_limit")
    count = num_properties(schema)
    if count > MAX_SCHEMA_PROPERTIES:
        raise SchemaError(f"has {count} properties, at most {MAX_SCHEMA_PROPERTIES} are allowed", "out_of_range")
    for _, node in _nodes(schema):
        optional = _num_optional(node)
        if optional > MAX_OPTIONAL_PROPERTIES:
            most = f"at most {MAX_OPTIONAL_PROPERTIES} are allowed (required ones do not count)"
            raise SchemaError(f"has an object of {optional} optional properties, {most}", "out_of_range")
    if "x-guidance" in schema:
        raise SchemaError("x-guidance is not accepted; use the fields of structured_outputs")


def _num_optional(node: Any) -> int:
    properties = node.get("properties") if isinstance(node, Mapping) else None
    if not isinstance(properties, Mapping) or len(properties) <= MAX_OPTIONAL_PROPERTIES:
        return 0
    required = node.get("required")
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list | tuple) else set()
    return len(properties.keys() - names)


def _nodes(schema: Any) -> Iterator[tuple[int, Any]]:
    """Every object and list of the schema, with its depth; stops at the first one that is too deep."""
    left = [(1, schema)]
    while left:
        depth, node = left.pop()
        yield depth, node
        if depth > MAX_SCHEMA_DEPTH:
            return
        children = node.values() if isinstance(node, Mapping) else node
        left += [(depth + 1, child) for child in children if isinstance(child, Mapping | list | tuple)]


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
