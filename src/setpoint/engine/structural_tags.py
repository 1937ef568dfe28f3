"""Structural tags: text that is free until a trigger, then a tag whose content has a structure, then free again.

Two wire formats are read, both of xgrammar, as vLLM and SGLang pass them on; what comes out is always the second:
    {"triggers": [...], "structures": [{"begin", "schema", "end"}, ...]}
    {"format": {"type": "triggered_tags", "triggers": [...], "tags": [{"begin", "content", "end"}, ...]}}
A format is one of FORMATS, and may hold others. What could not be told from free text is refused: text without a
bound stands at the end of the output, or in a tag that has an end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from setpoint.engine.json_schemas import (
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_PROPERTIES,
    SchemaError,
    as_json,
    checked_schema,
    num_properties,
)

MAX_TAGS: Final = 128
MAX_TRIGGERS: Final = 64
MAX_TAG_CHARS: Final = 1_024  # of a trigger, a beginning, an end, a separator
MAX_STRING_CHARS: Final = 8 << 10  # of a constant string or an expression
MAX_ELEMENTS: Final = 64
MAX_FORMATS: Final = 512
MAX_FORMAT_DEPTH: Final = 16
FORMATS: Final = (
    "any_text",
    "const_string",
    "json_schema",
    "or",
    "regex",
    "sequence",
    "tag",
    "tags_with_separator",
    "triggered_tags",
)
Fail = Callable[[str, str, str], Exception]  # path below the field, message, reason


def checked_structural_tag(value: Any, fail: Fail) -> str:
    """The format as JSON text. Raises what `fail` makes."""
    try:
        document, _ = as_json(value, MAX_SCHEMA_BYTES)
    except SchemaError as error:
        raise fail("", str(error), error.reason) from None
    return json.dumps(_Reader(fail).document(document), ensure_ascii=False, separators=(",", ":"))


def ends_in_escape(pattern: str) -> bool:
    """With a backslash that escapes nothing. Not every compiler minds; some drop it."""
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1


class _Reader:
    def __init__(self, fail: Fail) -> None:
        self._fail = fail
        self._num_formats = 0
        self._num_properties = 0

    def document(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping) and "structures" in value:
            fields = self._fields(value, "", ("structures", "triggers"), ("type",))
            self._type(fields, "structural_tag")
            tags = [
                self._structure(item, f"structures.{index}")
                for index, item in enumerate(self._list(fields["structures"], "structures", MAX_TAGS))
            ]
            return self._triggered(tags, fields["triggers"], "triggers", {})
        fields = self._fields(value, "", ("format",), ("type",))
        self._type(fields, "structural_tag")
        return self._format(fields["format"], "format", 1, place="last")

    def _structure(self, value: Any, path: str) -> dict[str, Any]:
        fields = self._fields(value, path, ("begin", "schema", "end"))
        return {
            "begin": self._text(fields["begin"], f"{path}.begin"),
            "content": {"type": "json_schema", "json_schema": self._schema(fields["schema"], f"{path}.schema")},
            "end": self._text(fields["end"], f"{path}.end", may_be_empty=True),
        }

    def _format(self, value: Any, path: str, depth: int, *, place: str) -> dict[str, Any]:
        """`place` is "last" in the output, the whole content of a "tag" that has an end, or "within"."""
        self._num_formats += 1
        if depth > MAX_FORMAT_DEPTH:
            raise self._fail(path, f"is nested deeper than {MAX_FORMAT_DEPTH}", "compile_limit")
        if self._num_formats > MAX_FORMATS:
            raise self._fail(path, f"is one format too many, at most {MAX_FORMATS} are allowed", "out_of_range")
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind not in FORMATS:
            raise self._fail(f"{path}.type", f"must be one of {', '.join(FORMATS)}", "bad_constraint")
        if place != "last" and (kind == "triggered_tags" or (kind == "any_text" and place != "tag")):
            end = "" if kind == "triggered_tags" else ", or be the content of a tag that has an end"
            raise self._fail(path, f"is free text without a bound: it must come last{end}", "bad_constraint")
        read: Callable[[Any, str, int, str], dict[str, Any]] = getattr(self, f"_{kind}")
        return {"type": kind} | read(value, path, depth, place)

    def _any_text(self, value: Any, path: str, depth: int, place: str) -> dict[str, Any]:
        self._fields(value, path, ("type",))
        return {}

    def _const_string(self, value: Any, path: str, depth: int, place: str) -> dict[str, Any]:
        fields = self._fields(value, path, ("type", "value"))
        return {"value": self._text(fields["value"], f"{path}.value", limit=MAX_STRING_CHARS)}

    def _regex(self, value: Any, path: str, depth: int, place: str) -> dict[str, Any]:
        fields = self._fields(value, path, ("type", "pattern"))
        pattern = self._text(fields["pattern"], f"{path}.pattern", limit=MAX_STRING_CHARS)
        if ends_in_escape(pattern):
            raise self._fail(f"{path}.pattern", "ends with half of an escape", "bad_constraint")
        return {"pattern": pattern}

    def _json_schema(self, value: Any, path: str, depth: int, place: str) -> dict[str, Any]:
        fields = self._fields(value, path, ("type", "json_schema"))
        return {"json_schema": self._schema(fields["json_schema"], f"{path}.json_schema")}

    def _sequence(self, value: Any, path: str, depth: int, place: str) -> dict[str, Any]:
        fields = self._fields(value, path, ("type", "elements"))
        elements = self._list(fields["elements"], f"{path}.elements", MAX_ELEMENTS)
        last = len(elements) - 1
        places = ["last" if index == last and place == "last" else "within" for index in range(len(elements))]
        return {"elements": self._formats(elements, f"{path}.elements", depth, places)}

    def _or(self, value: Any, path: str, depth: int, place: str) -> dict[str, Any]:
        fields = self._fields(value, path, ("type", "elements"))
        elements = self._list(fields["elements"], f"{path}.elements", MAX_ELEMENTS)
        places = ["last" if place == "last" else "within"] * len(elements)
        return {"elements": self._formats(elements, f"{path}.elements", depth, places)}

    def _formats(self, elements: list[Any], path: str, depth: int, places: list[str]) -> list[dict[str, Any]]:
        return [
            self._format(element, f"{path}.{index}", depth + 1, place=where)
            for index, (element, where) in enumerate(zip(elements, places, strict=True))
        ]

    def _tag(self, value: Any, path: str, depth: int, place: str) -> dict[str, Any]:
        fields = self._fields(value, path, ("begin", "content", "end"), ("type",))
        self._type(fields, "tag", path)
        end = self._text(fields["end"], f"{path}.end", may_be_empty=True)
        inside = "tag" if end else "last" if place == "last" else "within"
        return {
            "begin": self._text(fields["begin"], f"{path}.begin", may_be_empty=True),
            "content": self._format(fields["content"], f"{path}.content", depth + 1, place=inside),
            "end": end,
        }

    def _triggered_tags(self, value: Any, path: str, depth: int, place: str) -> dict[str, Any]:
        names = ("at_least_one", "stop_after_first")
        fields = self._fields(value, path, ("type", "triggers", "tags"), names)
        tags = self._tags(fields, path, depth)
        options = self._options(fields, path, names)
        return self._triggered(tags, fields["triggers"], f"{path}.triggers", options)

    def _tags_with_separator(self, value: Any, path: str, depth: int, place: str) -> dict[str, Any]:
        names = ("at_least_one", "stop_after_first")
        fields = self._fields(value, path, ("type", "tags", "separator"), names)
        separator = self._text(fields["separator"], f"{path}.separator", may_be_empty=True)
        return {"tags": self._tags(fields, path, depth), "separator": separator} | self._options(fields, path, names)

    def _tags(self, fields: Mapping[str, Any], path: str, depth: int) -> list[dict[str, Any]]:
        items = self._list(fields["tags"], f"{path}.tags", MAX_TAGS)
        return [self._tag(item, f"{path}.tags.{index}", depth, "within") for index, item in enumerate(items)]

    def _triggered(
        self, tags: list[dict[str, Any]], triggers: Any, path: str, options: dict[str, bool]
    ) -> dict[str, Any]:
        """One trigger for each tag, and none that another one forestalls."""
        items = self._list(triggers, path, MAX_TRIGGERS)
        texts = [self._text(item, f"{path}.{index}") for index, item in enumerate(items)]
        for index, text in enumerate(texts):
            if any(text in other for place, other in enumerate(texts) if place != index):
                raise self._fail(f"{path}.{index}", "is part of another trigger, which it forestalls", "conflict")
            if not any(tag["begin"].startswith(text) for tag in tags):
                raise self._fail(f"{path}.{index}", "begins no tag", "bad_constraint")
        for number, tag in enumerate(tags):
            if not any(tag["begin"].startswith(text) for text in texts):
                raise self._fail(path, f"holds no beginning of the begin of tag {number}", "bad_constraint")
        return {"type": "triggered_tags", "triggers": texts, "tags": tags} | options

    def _options(self, fields: Mapping[str, Any], path: str, names: tuple[str, ...]) -> dict[str, bool]:
        for name in names:
            if not isinstance(fields.get(name, False), bool):
                raise self._fail(f"{path}.{name}", "must be true or false", "malformed")
        return {name: True for name in names if fields.get(name)}

    def _schema(self, value: Any, path: str) -> Any:
        try:
            schema = json.loads(checked_schema(value, allow_anything=True))
        except SchemaError as error:
            raise self._fail(path, str(error), error.reason) from None
        self._num_properties += num_properties(schema)
        if self._num_properties > MAX_SCHEMA_PROPERTIES:
            message = f"and the schemas before it have more than {MAX_SCHEMA_PROPERTIES} properties"
            raise self._fail(path, message, "out_of_range")
        return schema

    def _fields(
        self, value: Any, path: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self._fail(path, "must be an object", "malformed")
        dot = f"{path}." if path else ""
        for name in value:
            if name not in needed and name not in optional:
                known = ", ".join((*needed, *optional))
                raise self._fail(f"{dot}{str(name)[:64]}", f"is not a field here; known are {known}", "unknown_field")
        for name in needed:
            if name not in value:
                raise self._fail(f"{dot}{name}", "is missing", "malformed")
        return value

    def _type(self, fields: Mapping[str, Any], kind: str, path: str = "") -> None:
        if fields.get("type", kind) != kind:
            raise self._fail(f"{path}.type" if path else "type", f"must be {kind!r}", "bad_constraint")

    def _list(self, value: Any, path: str, limit: int) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise self._fail(path, "must be a list", "malformed")
        if not 1 <= len(value) <= limit:
            raise self._fail(path, f"must hold 1 to {limit} entries, got {len(value)}", "out_of_range")
        return list(value)

    def _text(self, value: Any, path: str, *, limit: int = MAX_TAG_CHARS, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            raise self._fail(path, "must be a string", "malformed")
        if not value and not may_be_empty:
            raise self._fail(path, "is empty", "bad_constraint")
        if len(value) > limit:
            raise self._fail(path, f"has {len(value)} characters, at most {limit} are allowed", "out_of_range")
        return value
