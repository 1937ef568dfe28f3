"""The structure that a request asks for, whichever of its many names the client used."""

from __future__ import annotations

from typing import Any, Final

from setpoint.engine.constraint import Grammar
from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import RequestError
from setpoint.server.context import ServerContext
from setpoint.server.errors import ApiError
from setpoint.server.openai import GenerationFields, ResponseFormat

_KINDS: Final = {  # field of a request -> field of StructuredOutputs
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "regex": "regex",
    "ebnf": "grammar",
    "json_schema": "json",
}
_OF_TYPE: Final = {
    "json_schema": "json_schema",
    "structures": "structural_tag",
    "triggers": "structural_tag",
    "format": "structural_tag",
}


def wanted_structure(body: GenerationFields) -> StructuredOutputs | None:
    """None for plain text. Raises RequestError when there are several, or it is none that can be had."""
    wanted: list[tuple[str, dict[str, Any]]] = []
    if body.response_format is not None and body.response_format.type != "text":
        wanted.append(("response_format", _response_format(body.response_format)))
    elif body.response_format is not None:
        _refuse_others(body.response_format, "text")
    if body.structured_outputs is not None:
        wanted.append(("structured_outputs", body.structured_outputs.model_dump(by_alias=True, exclude_none=True)))
    for name, kind in _KINDS.items():
        if (value := getattr(body, name)) is not None:
            wanted.append((name, {kind: value}))
    if len(wanted) > 1:
        raise _conflict(wanted[1][0], f"and '{wanted[0][0]}' name the same thing; send one")
    if body.guided_whitespace_pattern is not None:
        if not wanted or wanted[0][0] != "guided_json":
            raise _conflict("guided_whitespace_pattern", "needs 'guided_json'")
        wanted[0][1]["whitespace_pattern"] = body.guided_whitespace_pattern
    if not wanted:
        return None
    param, fields = wanted[0]
    return StructuredOutputs.of(fields, param)


def _response_format(format: ResponseFormat) -> dict[str, Any]:
    _refuse_others(format, format.type)
    match format.type:
        case "json_object":
            return {"json_object": True}
        case "structural_tag":
            return {"structural_tag": format.model_dump(by_alias=True, exclude_none=True)}
    if format.json_schema is None:
        message = "'response_format.json_schema' is required."
        raise RequestError(message, param="response_format.json_schema", reason="malformed")
    return {"json": format.json_schema.schema_}


def _refuse_others(format: ResponseFormat, kind: str) -> None:
    """Fields that belong to another type of format."""
    for name, needs in _OF_TYPE.items():
        if needs != kind and getattr(format, name) is not None:
            raise _conflict(f"response_format.{name}", f'needs "type": "{needs}"')


def compile_structure(context: ServerContext, wanted: StructuredOutputs) -> Grammar:
    """May block for seconds, in a process that is started for it. Raises RequestError, ApiError."""
    if context.grammars is None:
        raise ApiError("not_supported", "This server has no structured output.", param=wanted.param, status=400)
    return context.grammars.compile(wanted)


def _conflict(param: str, message: str) -> RequestError:
    return RequestError(f"'{param}' {message}.", param=param, reason="conflict")
