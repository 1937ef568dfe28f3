"""What shape a client wants its output in: `StructuredOutputs`, and the bounds of every field of it, stated once.

Like `SamplingParams`, a plain frozen record that every front end builds, with the same checks and messages. Whether a
schema, expression or grammar can be honoured is found out by whoever compiles it (`setpoint.grammar`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from setpoint.engine.json_schemas import SchemaError, checked_schema
from setpoint.engine.structural_tags import checked_structural_tag, ends_in_escape
from setpoint.errors import RequestError

MAX_REGEX_CHARS: Final = 8 << 10
MAX_GRAMMAR_CHARS: Final = 64 << 10
MAX_CHOICES: Final = 1_024
MAX_CHOICE_CHARS: Final = 4_096
MAX_CHOICES_CHARS: Final = 64 << 10  # of all together
MAX_WHITESPACE_CHARS: Final = 256
KINDS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_JSON_ONLY: Final = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
_WITH_JSON: Final = ("json", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """Exactly one of the first six; the others say more about JSON. `json` and `structural_tag` are kept as text, in
    their own order of keys.

    `param` is the field that a client wrote it in, for errors about it.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Collection[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    param: str = "structured_outputs"

    def __post_init__(self) -> None:
        kinds = [name for name in KINDS if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(kinds) != 1:
            message = f"needs exactly one of {', '.join(KINDS)}, got {' and '.join(kinds) or 'none'}"
            raise self._error("", message, "conflict" if kinds else "bad_constraint")
        self._check_options(kinds[0])
        match kinds[0]:
            case "json":
                try:
                    object.__setattr__(self, "json", checked_schema(self.json))
                except SchemaError as error:
                    raise self._error("json", str(error), error.reason) from None
            case "regex":
                self._check_text("regex", self.regex, MAX_REGEX_CHARS)
                if ends_in_escape(str(self.regex)):
                    raise self._error("regex", "ends with half of an escape")
            case "grammar":
                self._check_text("grammar", self.grammar, MAX_GRAMMAR_CHARS)
            case "choice":
                object.__setattr__(self, "choice", self._checked_choices(self.choice))
            case "json_object":
                if self.json_object is not True:
                    raise self._error("json_object", "must be true")
            case _:
                checked = checked_structural_tag(self.structural_tag, self._tag_error)
                object.__setattr__(self, "structural_tag", checked)

    @classmethod
    def of(cls, value: Any, param: str = "structured_outputs") -> StructuredOutputs:
        """From the mapping that a client wrote, or the record itself."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"{param} must be an object.", param=param)
        names = {field.name for field in fields(cls)} - {"param"}
        for name in value:
            if name not in names:
                where = f"{param}.{str(name)[:64]}"
                raise RequestError(f"{where} is not a field of {param}.", param=where, reason="unknown_field")
        return cls(**value, param=param)

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name))

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two that mean the same."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "param")

    def error(self, message: str, reason: str = "bad_constraint") -> RequestError:
        """An error about what the client wrote."""
        return self._error(self.kind, message, reason)

    def _error(self, name: str, message: str, reason: str = "bad_constraint") -> RequestError:
        where = self.param if not name or self.param != "structured_outputs" else f"structured_outputs.{name}"
        return RequestError(f"{where} {message}.", param=where, reason=reason)

    def _tag_error(self, path: str, message: str, reason: str) -> RequestError:
        where = self._error("structural_tag", "").param
        where = f"{where}.{path}" if path else where
        return RequestError(f"{where} {message}.", param=where, reason=reason)

    def _check_options(self, kind: str) -> None:
        for name in _JSON_ONLY:
            value = getattr(self, name)
            if value is None or value is False:
                continue
            if kind not in _WITH_JSON:
                raise self._error(name, f"needs {' or '.join(_WITH_JSON)}", "conflict")
            if name == "whitespace_pattern":
                self._check_text(name, value, MAX_WHITESPACE_CHARS)
            elif value is not True:
                raise self._error(name, "must be true or false", "malformed")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise self._error("whitespace_pattern", "does not go with disable_any_whitespace", "conflict")

    def _check_text(self, name: str, value: Any, limit: int) -> None:
        if not isinstance(value, str):
            raise self._error(name, "must be a string", "malformed")
        if not (value if name == "whitespace_pattern" else value.strip()):
            raise self._error(name, "is empty")
        if len(value) > limit:
            raise self._error(name, f"has {len(value)} characters, at most {limit} are allowed", "out_of_range")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._error(name, "is not valid Unicode: it holds half of a surrogate pair") from None

    def _checked_choices(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
            raise self._error("choice", "must be a list of strings", "malformed")
        if not 1 <= len(value) <= MAX_CHOICES:
            raise self._error("choice", f"must hold 1 to {MAX_CHOICES} strings, got {len(value)}", "out_of_range")
        for text in value:
            self._check_text("choice", text, MAX_CHOICE_CHARS)
        if sum(map(len, value)) > MAX_CHOICES_CHARS:
            raise self._error("choice", f"holds more than {MAX_CHOICES_CHARS} characters", "out_of_range")
        return tuple(dict.fromkeys(value))
