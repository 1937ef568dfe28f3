"""A request body as JSON, stricter than most parsers: what two parsers could read differently is refused.

Refused: anything but an object at the top, invalid or byte-order-marked UTF-8, NaN and Infinity, duplicate keys
(one of them would be dropped silently), lone surrogates, nesting deeper than 64.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

import orjson

from setpoint.server.errors import ApiError

MAX_DEPTH: Final = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    pass


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; raises ApiError 400. Linear in the body's size."""
    try:
        if _SURROGATE.search(body):
            orjson.loads(body)  # knows which surrogates have a partner
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except _Refused as error:
        raise ApiError("malformed", f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise ApiError("malformed", f"The body is nested deeper than {MAX_DEPTH} levels.") from None
    except ValueError:  # bad syntax, bad UTF-8, lone surrogates, integers of thousands of digits
        raise ApiError("malformed", "The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise ApiError("malformed", "The body must be a JSON object.")
    _check_depth(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Refused("an object has the same key twice")
    return result


def _refuse(constant: str) -> NoReturn:
    raise _Refused(f"{constant} is not a number")


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ApiError("malformed", f"The body is nested deeper than {MAX_DEPTH} levels.")
