"""One `.safetensors` file (https://huggingface.co/docs/safetensors): header checked, weights mapped.

The `safetensors` library validates the file; the offsets are then read from the header once more, because the library
hands out no bfloat16 to numpy and copies what it hands out, while a view of the mapped file costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.loaders.mapped import MappedFile, quote

MAX_HEADER_BYTES = 16 << 20  # a tensor takes about 100 bytes; the format itself allows 100 MB
MAX_DIMENSIONS = 8
MAX_DIMENSION = (1 << 31) - 1  # kernels count rows and columns in int32
MAX_OFFSET = (1 << 63) - 1
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # the dtypes we read; names are those of quant.formats


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """Where a tensor lies, in absolute bytes. The dtype may be one we do not read."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile(MappedFile):
    """One mapped file; `entries` by name. Raises ModelNotFoundError or ModelFileError."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._data_start = 8 + self._header_bytes()
            self._validate()
            header = parse_json(self.bytes[8 : self._data_start].tobytes(), self.name, "header")
            header.pop("__metadata__", None)
            self.entries = {name: self._entry(name, fields) for name, fields in header.items()}
            self._check_extents()
        except BaseException:
            self.close()
            raise

    def raw(self, name: str) -> NDArray[np.uint8]:
        """uint8 [rows, row_bytes], a read-only view of the file; UnsupportedModelError for a dtype we do not read."""
        entry = self.entries[name]
        if entry.dtype not in ITEM_BYTES:
            supported = ", ".join(ITEM_BYTES)
            raise UnsupportedModelError(
                f"{self.name}: tensor {quote(name)} has the dtype {entry.dtype[:16]}; supported: {supported}"
            )
        return self.bytes[entry.start : entry.end].reshape(math.prod(entry.shape[:-1]), -1)

    def digest(self) -> str:
        """Of the header's bytes, the size and the modification time."""
        state = hashlib.sha256(self.bytes[: self._data_start].data)
        state.update(struct.pack("<QQ", self.size, self.modified_ns))
        return state.hexdigest()

    def _header_bytes(self) -> int:
        if self.size < 8:
            self.fail("not a safetensors file (shorter than its header size)")
        declared: int = struct.unpack_from("<Q", self.map)[0]
        if declared > MAX_HEADER_BYTES:
            self.fail(f"the header size is {declared} bytes; at most {MAX_HEADER_BYTES} are accepted")
        if declared > self.size - 8:
            self.fail("the header ends past the end of the file (truncated?)")
        return declared

    def _validate(self) -> None:
        try:
            with safe_open(self.path, framework="numpy"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0].replace(str(self.path), self.name)[:200] if str(error) else "malformed"
            self.fail(f"not a valid safetensors file: {reason}")

    def _entry(self, name: str, fields: Any) -> SafetensorsEntry:
        what = f"tensor {quote(name)}"
        if not isinstance(fields, dict) or not isinstance(fields.get("dtype"), str):
            self.fail(f"{what} has no dtype")
        shape = self._integers(fields.get("shape"), MAX_DIMENSION, f"{what}: the shape")
        offsets = self._integers(fields.get("data_offsets"), MAX_OFFSET, f"{what}: data_offsets")
        if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
            self.fail(f"{what} has {len(shape)} dimensions and {len(offsets)} data_offsets")
        start, end = (self._data_start + offset for offset in offsets)
        if not start <= end <= self.size:
            self.fail(f"{what}: data_offsets end past the end of the file (truncated?)")
        dtype = fields["dtype"]
        if dtype in ITEM_BYTES:
            if 0 in shape:
                self.fail(f"{what} has a dimension of 0")
            if math.prod(shape) * ITEM_BYTES[dtype] != end - start:
                self.fail(f"{what}: {end - start} bytes are the wrong size for {dtype} {shape}")
        return SafetensorsEntry(dtype, shape, start, end)

    def _integers(self, values: Any, high: int, what: str) -> tuple[int, ...]:
        if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
            self.fail(f"{what} must be a list of at most {MAX_DIMENSIONS} integers")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
                self.fail(f"{what} must hold integers in 0..{high}")
        return tuple(values)

    def _check_extents(self) -> None:
        """Tensors follow each other without gap or overlap up to the end of the file, as the format demands."""
        position = self._data_start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != position:
                self.fail(f"tensor {quote(name)} {'overlaps another' if entry.start < position else 'follows a gap'}")
            position = entry.end
        if position != self.size:
            self.fail(f"{self.size - position} bytes after the last tensor belong to none")


def parse_json(content: bytes, file_name: str, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, from a stranger. Raises ModelFileError."""
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, absurdly long number, duplicate
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ModelFileError(f"{file_name}: {what} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{file_name}: {what} must be a JSON object")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {quote(duplicate)}")
    return result
