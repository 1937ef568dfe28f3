"""Places of a JSON schema that nothing finite satisfies, because they need themselves: `{"$ref": "#"}`.

A place is finite when what it needs is: the target of its reference, one of its alternatives, each property that an
object must have, the first items of a list. That is an and-or graph over places, and its least fixed point is found
with one counter a place (Dowling and Gallier, 1984), in time linear in the schema. Keywords that are not understood
here make no place endless. Pointers are written as in RFC 6901.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

_Needs = list[list[str]]  # each of these: one of those places


def endless_place(schema: Mapping[str, Any]) -> str | None:
    """The first place that values can come to, from the root on, and that none which ends can satisfy."""
    needs: dict[str, _Needs] = {}
    for pointer, node, target in _places(schema):
        needs |= _needs(pointer, node, target)
    open_needs = {place: len(wanted) for place, wanted in needs.items()}
    wanted_by: dict[str, list[tuple[str, int]]] = {}
    for place, wanted in needs.items():
        for number, options in enumerate(wanted):
            for option in options:
                wanted_by.setdefault(option, []).append((place, number))
    finite = {place for place, count in open_needs.items() if count == 0}
    settled: set[tuple[str, int]] = set()
    left = list(finite)
    while left:
        for place, number in wanted_by.get(left.pop(), ()):
            if (place, number) in settled:
                continue
            settled.add((place, number))
            open_needs[place] -= 1
            if open_needs[place] == 0:
                finite.add(place)
                left.append(place)
    return next((place for place in needs if place not in finite and place.startswith("#")), None)


def _places(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, str | None]]:
    """Every place that values can stand at, the root first: its pointer, schema, and where its reference leads."""
    seen = {"#"}
    left = deque(["#"])
    while left:
        pointer = left.popleft()
        node = _at(schema, pointer)
        target = _target(schema, node) if isinstance(node, Mapping) else None
        yield pointer, node, target
        if isinstance(node, Mapping):
            found = dict.fromkeys([*_children(pointer, node), *([] if target is None else [target])])
            left.extend(place for place in found if place not in seen)
            seen.update(found)


def _children(pointer: str, node: Mapping[str, Any]) -> Iterator[str]:
    for name in ("properties", "patternProperties"):
        if isinstance(node.get(name), Mapping):
            yield from (f"{pointer}/{name}/{_escaped(key)}" for key in node[name])
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(node.get(name), list | tuple):
            yield from (f"{pointer}/{name}/{index}" for index in range(len(node[name])))
    for name in ("items", "additionalProperties"):
        if isinstance(node.get(name), Mapping):
            yield f"{pointer}/{name}"


def _target(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str | None:
    """Where a reference inside the schema leads, as its pointer is written here; None for others."""
    reference = node.get("$ref")
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    steps = (unquote(step).replace("~1", "/").replace("~0", "~") for step in reference.split("/")[1:])
    pointer = "/".join(["#", *map(_escaped, steps)])
    return None if _at(schema, pointer) is None else pointer


def _needs(pointer: str, node: Any, target: str | None) -> dict[str, _Needs]:
    """What a place needs; with it what its types need, as places of their own, named with a question mark."""
    if not isinstance(node, Mapping) or "const" in node or "enum" in node:
        return {pointer: []}
    needs: _Needs = [] if target is None else [[target]]
    for name in ("anyOf", "oneOf"):
        options = node.get(name)
        if isinstance(options, list | tuple) and options:
            needs.append([f"{pointer}/{name}/{index}" for index in range(len(options))])
    every = node.get("allOf")
    if isinstance(every, list | tuple):
        needs += [[f"{pointer}/allOf/{index}"] for index in range(len(every))]
    kinds = node.get("type")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds) if isinstance(kinds, list | tuple) else []
    of_kinds = {f"?{kind}{pointer}": _needs_of_kind(kind, pointer, node) for kind in kinds}
    if not of_kinds or not all(of_kinds.values()):
        return {pointer: needs}
    return {pointer: [*needs, list(of_kinds)]} | of_kinds


def _needs_of_kind(kind: Any, pointer: str, node: Mapping[str, Any]) -> _Needs:
    if kind == "object":
        properties, required = node.get("properties"), node.get("required")
        if isinstance(properties, Mapping) and isinstance(required, list | tuple):
            names = [key for key in required if isinstance(key, str) and key in properties]
            return [[f"{pointer}/properties/{_escaped(key)}"] for key in names]
    if kind == "array":
        least, first = node.get("minItems", 0), node.get("prefixItems")
        num_first = len(first) if isinstance(first, list | tuple) else 0
        if isinstance(least, int) and least > 0:
            needs = [[f"{pointer}/prefixItems/{index}"] for index in range(min(num_first, least))]
            if least > num_first and isinstance(node.get("items"), Mapping):
                needs.append([f"{pointer}/items"])
            return needs
    return []


def _at(schema: Any, pointer: str) -> Any:
    node = schema
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping):
            node = node.get(name)
        elif isinstance(node, list | tuple) and name.isdecimal() and len(name) < 8 and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
