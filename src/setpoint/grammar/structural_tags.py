"""A structural tag as a grammar in Lark's notation, with the extensions of llguidance (its docs/syntax.md).

Free text up to a trigger is one lazy lexeme, text and trigger together: it ends with the first trigger, so what
follows it is the rest of a tag. Text at the end of an output may hold the beginning of a trigger, never a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from setpoint.grammar.lark import expression, literal

_TEXT: Final = r"TEXT: /(.|\n)*/"


def structural_tag_source(format: dict[str, Any], schema_text: Callable[[dict[str, Any]], str]) -> str:
    """`format` as `engine.structural_tags` checks it; `schema_text` puts our options into a schema."""
    rules = _Rules(schema_text)
    start = rules.format(format)
    return "\n".join(["%llguidance {}", f"start: {start}", *rules.lines, _TEXT])


class _Rules:
    """Each method gives an expression, and writes the rules that it needs."""

    def __init__(self, schema_text: Callable[[dict[str, Any]], str]) -> None:
        self.lines: list[str] = []
        self._schema_text = schema_text

    def format(self, format: dict[str, Any]) -> str:
        match format["type"]:
            case "any_text":
                return "TEXT"
            case "const_string":
                return _written(format["value"])
            case "regex":
                return self._rule(expression(format["pattern"]))
            case "json_schema":
                return self._rule(f"%json {self._schema_text(format['json_schema'])}")
            case "sequence":
                return self._rule(" ".join(self.format(element) for element in format["elements"]))
            case "or":
                return self._rule(" | ".join(self.format(element) for element in format["elements"]))
            case "tag":
                return self._tag(format, format["begin"])
            case "tags_with_separator":
                return self._separated(format)
            case _:
                return self._triggered(format)

    def _rule(self, body: str, option: str = "") -> str:
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}{option}: {body}")
        return name

    def _tag(self, tag: dict[str, Any], begin: str) -> str:
        """`begin` is what is still to be written of the tag's beginning."""
        content, end = tag["content"], tag["end"]
        if content["type"] == "any_text" and end:
            inside = self._rule(f"TEXT {_written(end)}", "[lazy]")
            return self._rule(f"{_written(begin)} {inside}".strip())
        return self._rule(" ".join(part for part in (_written(begin), self.format(content), _written(end)) if part))

    def _one_of(self, tags: Sequence[dict[str, Any]], num_written: int = 0) -> str:
        return self._rule(" | ".join(self._tag(tag, tag["begin"][num_written:]) for tag in tags))

    def _separated(self, format: dict[str, Any]) -> str:
        tag = self._one_of(format["tags"])
        tags = tag
        if not format.get("stop_after_first"):
            tags = f"{tag} ({_written(format['separator'])} {tag})*"
        return self._rule(tags if format.get("at_least_one") else f"({tags})?")

    def _triggered(self, format: dict[str, Any]) -> str:
        called = []
        for trigger in format["triggers"]:
            head = self._rule(f"TEXT {_written(trigger)}", "[lazy]")
            tags = [tag for tag in format["tags"] if tag["begin"].startswith(trigger)]
            called.append(f"{head} {self._one_of(tags, len(trigger))}")
        call = self._rule(" | ".join(called))
        if format.get("at_least_one"):
            first = self._one_of(format["tags"])
            return first if format.get("stop_after_first") else self._rule(f"{first} {call}* TEXT")
        return self._rule(f"{call} | TEXT" if format.get("stop_after_first") else f"{call}* TEXT")


def _written(text: str) -> str:
    """As a literal; an empty one is left out."""
    return literal(text) if text else ""
