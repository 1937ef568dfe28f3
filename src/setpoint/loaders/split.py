"""Opens a GGUF model that may be split into `NAME-00001-of-0000N.gguf` parts, given the path of any of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from setpoint.errors import ModelFileError
from setpoint.loaders.gguf import GGUFFile
from setpoint.loaders.mapped import quote

MAX_PARTS = 4096
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)


def part_path(path: Path, number: int, count: int) -> Path:
    """The path of part `number` (from 1) of `count`, for the unsplit name `path`."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{number:05d}-of-{count:05d}.gguf")


def open_parts(path: Path) -> list[GGUFFile]:
    """All parts in order; the first holds the metadata. Raises ModelFileError naming a part that is missing."""
    parts: list[GGUFFile] = []
    try:
        for part in _paths(path):
            parts.append(GGUFFile(part))
        _check(parts)
    except BaseException:
        for opened in parts:
            opened.close()
        raise
    return parts


def _paths(path: Path) -> list[Path]:
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= MAX_PARTS:
        raise ModelFileError(f"{path.name}: part {number} of {count} makes no sense; at most {MAX_PARTS} parts")
    if not path.is_file():
        return [path]  # the error about the path that was asked for
    paths = [part_path(path.with_name(match["stem"] + ".gguf"), index, count) for index in range(1, count + 1)]
    for part in paths:
        if not part.is_file():
            raise ModelFileError(f"{path.name}: the part {part.name} is missing; put all {count} in one directory")
    return paths


def _check(parts: Sequence[GGUFFile]) -> None:
    """`split.count`, `split.no` and `split.tensors.count` agree with what was opened; no tensor occurs twice."""
    for index, part in enumerate(parts):
        count = _integer(part, "split.count", default=1 if len(parts) == 1 else None)
        if count in (0, 1) and len(parts) == 1:
            return
        if len(parts) == 1:
            part.fail(f"this is one of {count} parts; keep the name it was published with (-00001-of-{count:05d}.gguf)")
        if count != len(parts):
            part.fail(f"metadata 'split.count' is {count}, but the name says {len(parts)}")
        if _integer(part, "split.no") != index:
            part.fail(f"metadata 'split.no' is {part.metadata['split.no']}; expected {index}")
    seen: dict[str, str] = {}
    for part in parts:
        for name in part.tensors:
            if name in seen:
                part.fail(f"tensor {quote(name)} occurs twice (duplicate name), also in {seen[name]}")
            seen[name] = part.name
    expected = _integer(parts[0], "split.tensors.count")
    if expected != len(seen):
        parts[0].fail(f"metadata 'split.tensors.count' is {expected}, but the parts hold {len(seen)}")


def _integer(part: GGUFFile, key: str, default: int | None = None) -> int:
    value = part.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        part.fail(f"metadata '{key}' must be an integer")
    return value
