"""From JSON to dataclasses, strictly: every field there, none besides, the right type, within bounds."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

MAX_NUMBER = 1e15
MAX_TEXT = 256
MAX_ITEMS = 256

Record = TypeVar("Record")


class DocumentError(ValueError):
    """The document is not a record of the kind asked for; the message names the place."""


def from_document(kind: type[Record], document: object, place: str = "record") -> Record:
    """`document` as an instance of the dataclass `kind`. Numbers are finite and not negative."""
    if not isinstance(document, dict):
        raise DocumentError(f"{place}: not an object")
    declared = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if set(document) != declared:
        raise DocumentError(f"{place}: other fields than {', '.join(sorted(declared))}")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], document[name], f"{place}.{name}") for name in sorted(declared)})


def _value(kind: Any, value: object, place: str) -> Any:
    if isinstance(kind, UnionType):  # X | None
        if value is None:
            return None
        (kind,) = (choice for choice in get_args(kind) if choice is not NoneType)
    if is_dataclass(kind):
        return from_document(kind, value, place)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise DocumentError(f"{place}: not a list of at most {MAX_ITEMS}")
        return tuple(_value(get_args(kind)[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if kind is float and type(value) in (int, float):
        number = float(value) if abs(value) <= MAX_NUMBER else math.inf  # type: ignore[arg-type]
        if not 0 <= number <= MAX_NUMBER:
            raise DocumentError(f"{place}: not in 0..{MAX_NUMBER:g}")
        return number
    if type(value) is not kind:
        raise DocumentError(f"{place}: not of type {kind.__name__}")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise DocumentError(f"{place}: longer than {MAX_TEXT} characters")
    if kind is int and not 0 <= value <= MAX_NUMBER:  # type: ignore[operator]
        raise DocumentError(f"{place}: not in 0..{MAX_NUMBER:g}")
    return value
