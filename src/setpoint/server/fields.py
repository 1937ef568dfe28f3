"""Fields outside the wire types: aliases, harmless names, and known features that are refused until they exist.

A client must never believe that something was applied when it was not. So each name is honoured (the wire types),
renamed (`ALIASES`), named in the answer as unused (`IGNORED`), refused (`UNSUPPORTED`, `FORBIDDEN`), or unknown: 400.
Values that ask for nothing, like `tools: []`, are accepted everywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from setpoint.server.errors import ApiError
from setpoint.server.openai import (
    ChatRequest,
    CompletionRequest,
    Document,
    JsonSchemaFormat,
    Message,
    ResponseFormat,
    SloFields,
    StreamOptions,
    Structure,
    StructuredOutputsFields,
    TextPart,
    Wire,
)

ALIASES: Final = {"rid": "request_id", "extra_key": "cache_salt"}
# `user` is a label that nothing uses yet; the answer says so.
IGNORED: Final = frozenset({"metadata", "service_tier", "safety_identifier", "store", "user"})

# name -> values that ask for nothing (null always does)
UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "tools": ([],),
    "functions": ([],),
    "function_call": ("none",),
    "guided_decoding_backend": (),
    "logprob_token_ids": ([],),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "watermarking": (),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": (),
    "mm_processor_kwargs": ({},),
    "spaces_between_special_tokens": (True,),
}
UNTIL_BUILT: Final = frozenset({"use_beam_search", "length_penalty", "watermarking", "repetition_detection"})  # 501
FORBIDDEN: Final = {
    "chat_template": "templates in requests are off on this server",
    "prompt_embeds": "tensors from clients are not accepted",
    "custom_logit_processor": "code from clients is not accepted",
    "logits_processors": "code from clients is not accepted",
    "kv_transfer_params": "it belongs to a cluster's own traffic",
    "media_io_kwargs": "limits on media are set by the server",
    "tool_parser": "parsers from clients are not accepted",
    "reasoning_parser": "parsers from clients are not accepted",
    "trust_remote_code": "code from models is never run",
}
# Names that official clients add to messages they send back, and what they hold when nothing is meant.
_MESSAGE_EXTRAS: Final = ("refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id")
_PART_TYPES: Final = ("image_url", "input_audio", "audio_url", "video_url", "file", "input_image", "refusal")
_NESTED: Final = (
    *(Message, TextPart, StreamOptions, Document),
    *(ResponseFormat, JsonSchemaFormat, Structure, StructuredOutputsFields, SloFields),
)

WireT = TypeVar("WireT", bound=Wire)


def parse(payload: dict[str, Any], wire_type: type[WireT]) -> tuple[WireT, list[str]]:
    """The typed request and the names that were accepted without effect. Raises ApiError 400, 501."""
    payload = dict(payload)
    for alias, name in ALIASES.items():
        if alias in payload and name in wire_type.model_fields:
            if name in payload:
                raise ApiError("conflict", f"'{alias}' and '{name}' name the same thing; send one.", param=alias)
            payload[name] = payload.pop(alias)
    ignored = [name for name in payload if name in IGNORED]
    for name in ignored:
        del payload[name]
    _refuse_features(payload, wire_type)
    if isinstance(payload.get("messages"), list):
        payload["messages"] = [_message(index, value) for index, value in enumerate(payload["messages"])]
    try:
        return wire_type.model_validate(payload), ignored
    except ValidationError as error:
        raise _wire_error(error, payload, wire_type) from None


def _refuse_features(payload: dict[str, Any], wire_type: type[Wire]) -> None:
    for name in [name for name in payload if name not in wire_type.model_fields]:
        value = payload[name]
        if name in UNSUPPORTED or name in FORBIDDEN:
            if value is not None and not any(_same(value, neutral) for neutral in UNSUPPORTED.get(name, ())):
                if name in FORBIDDEN:
                    raise ApiError("not_supported", f"'{name}' is refused: {FORBIDDEN[name]}.", param=name, status=400)
                raise _not_supported(name)
            del payload[name]
    if wire_type is ChatRequest:
        effort, choice = payload.get("reasoning_effort"), payload.get("tool_choice")
        if effort in ("minimal", "low", "medium", "high", "xhigh", "max"):
            message = "This model has no reasoning levels; leave 'reasoning_effort' out."
            raise ApiError("not_supported", message, param="reasoning_effort", status=400)
        if choice in ("auto", "required") or isinstance(choice, dict):
            raise ApiError("conflict", "'tool_choice' needs 'tools'.", param="tool_choice")
        if payload.get("include_reasoning") is False:
            raise _not_supported("include_reasoning")


def _message(index: int, value: Any) -> Any:
    """A message without the empty extras of official clients; raises ApiError for the features they belong to."""
    if not isinstance(value, dict):
        return value
    value = dict(value)
    if value.get("role") in ("tool", "function"):
        raise _not_supported(f"messages.{index}.role")
    for name in _MESSAGE_EXTRAS:
        if name in value:
            if value[name] not in (None, [], {}):
                raise _not_supported(f"messages.{index}.{name}")
            del value[name]
    content = value.get("content")
    if isinstance(content, list):
        for position, part in enumerate(content):
            if isinstance(part, dict) and part.get("type") in _PART_TYPES:
                raise _not_supported(f"messages.{index}.content.{position}.type")
    return value


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _not_supported(param: str) -> ApiError:
    message = f"'{param}' asks for a feature that this server does not have yet."
    return ApiError("not_supported", message, param=param, status=501 if param in UNTIL_BUILT else 400)


def _wire_error(error: ValidationError, payload: dict[str, Any], wire_type: type[Wire]) -> ApiError:
    """The first violation that says most: an unknown name, then a bound, then a type."""
    details = error.errors(include_url=False, include_context=False, include_input=False)

    def weight(detail: Any) -> int:
        kind = str(detail["type"])
        return 0 if kind == "extra_forbidden" else 2 if kind.endswith("_type") or kind == "missing" else 1

    detail = min(details, key=weight)
    param, kind = _param(detail["loc"], payload), str(detail["type"])
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        near = difflib.get_close_matches(name, _known_names(wire_type), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        return ApiError("unknown_field", f"Unknown field '{name[:64]}'{hint}", param=param)
    if kind == "missing":
        return ApiError("malformed", f"'{param}' is required.", param=param)
    reason = "malformed" if kind.endswith("_type") else "out_of_range"
    return ApiError(reason, f"'{param}': {detail['msg']}.", param=param)


def _known_names(wire_type: type[Wire]) -> list[str]:
    nested = _NESTED if wire_type in (ChatRequest, CompletionRequest) else ()
    names = {field.alias or name for kind in (wire_type, *nested) for name, field in kind.model_fields.items()}
    return sorted(names | set(UNSUPPORTED) | IGNORED)


def _param(location: tuple[int | str, ...], payload: Any) -> str:
    """The location as a path in the payload; names that the type system put in (union members) are left out."""
    path: list[str] = []
    for step in location:
        is_member = isinstance(payload, dict) and step in payload
        is_item = isinstance(payload, list) and isinstance(step, int) and step < len(payload)
        if is_member or is_item:
            payload = payload[step]
        elif not isinstance(payload, dict) or step != location[-1]:
            continue
        path.append(str(step)[:64])
    return ".".join(path)
