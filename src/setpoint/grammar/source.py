"""What a client asked for as the source of a grammar: (form, text), forms being those of `guidance.FORMS`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.grammar.lark import literal
from setpoint.grammar.structural_tags import structural_tag_source

MAX_NESTING: Final = 64  # of brackets
# Between the tokens of JSON: nothing, a space, or a new line and its indentation. Without a bound, small models
# write spaces until their tokens run out.
WHITESPACE: Final = r"\x20|\r?\n[\x20\t]{0,40}"
_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES: Final = frozenset({"const", "enum", "default", "examples"})


def grammar_source(wanted: StructuredOutputs) -> tuple[str, str]:
    """Raises RequestError where brackets are nested too deeply."""
    match wanted.kind:
        case "json":
            return "json", _schema(wanted, json.loads(str(wanted.json)))
        case "json_object":
            return "json", _schema(wanted, {"type": "object"})
        case "choice":
            # One expression: as alternatives of a rule, a thousand of them would be followed side by side.
            return "choice", "start: CHOICE\nCHOICE: " + " | ".join(literal(choice) for choice in wanted.choice or ())
        case "structural_tag":
            tag = json.loads(str(wanted.structural_tag))
            return "structural_tag", structural_tag_source(tag, lambda schema: _schema(wanted, schema))
        case kind:
            text = str(wanted.regex if kind == "regex" else wanted.grammar)
            _check_nesting(wanted, text)
            return kind, text


def _schema(wanted: StructuredOutputs, schema: dict[str, Any]) -> str:
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False}
    if wanted.disable_any_whitespace:
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = wanted.whitespace_pattern or WHITESPACE
    if wanted.disable_additional_properties:
        _close(schema)
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False, separators=(",", ":"))


def _close(schema: Any) -> None:
    """No object has more properties than its schema names, unless the schema says so itself."""
    left = [schema]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, dict):
            if isinstance(node.get("properties"), dict) and "additionalProperties" not in node:
                node["additionalProperties"] = False
            for name, child in node.items():  # the keys of some children are names, not keywords
                is_map = name in _MAPS and isinstance(child, dict)
                left += list(child.values()) if is_map else [] if name in _VALUES else [child]


def _check_nesting(wanted: StructuredOutputs, text: str) -> None:
    depth = 0
    for bracket in _brackets(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        if depth > MAX_NESTING:
            raise wanted.error(f"is nested deeper than {MAX_NESTING}", "compile_limit")


def _brackets(text: str) -> Iterable[str]:
    """Those that are not escaped; those in strings count, which only makes the limit stricter."""
    characters = iter(text)
    for character in characters:
        if character == "\\":
            next(characters, None)
        elif character in "()[]{}":
            yield character
