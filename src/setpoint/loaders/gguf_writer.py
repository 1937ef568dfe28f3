"""Writes GGUF version 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): converted and quantized models.

The types of metadata follow from the Python values: bool, int (the smallest of uint32, int32, uint64, int64 that holds
it), float (float32), str, and non-empty lists of one of them. A numpy scalar or 1-D array keeps its own type.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from setpoint.loaders import gguf
from setpoint.loaders.split import part_path
from setpoint.quant.formats import FORMATS, bytes_per_row

Raw = NDArray[np.uint8]  # [rows, row_bytes]
# Name, row-major shape, format, contents; a function makes them when their turn comes, so that only one is in memory.
NamedTensor = tuple[str, tuple[int, ...], str, Raw | Callable[[], Raw]]

_KIND_BY_DTYPE = {dtype: kind for kind, dtype in gguf.DTYPES.items() if kind != gguf.BOOL} | {
    np.dtype(np.bool_): gguf.BOOL
}


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Iterable[NamedTensor],
    *,
    alignment: int = gguf.DEFAULT_ALIGNMENT,
    tensors_per_part: int | None = None,
) -> list[Path]:
    """Write one file, or parts of at most `tensors_per_part` tensors; returns the paths, the first opens the model.

    Each file appears complete (temporary name, then renamed). Raises ValueError for what the format cannot hold.
    """
    entries = list(tensors)
    header = dict(metadata)
    if alignment != gguf.DEFAULT_ALIGNMENT:
        header["general.alignment"] = np.uint32(alignment)
    if tensors_per_part is None:
        _write_file(path, header, entries, alignment)
        return [path]
    groups = [entries[i : i + tensors_per_part] for i in range(0, len(entries), tensors_per_part)] or [[]]
    paths = [part_path(path, number, len(groups)) for number in range(1, len(groups) + 1)]
    for index, (part, group) in enumerate(zip(paths, groups, strict=True)):
        own = {key: value for key, value in header.items() if index == 0 or key == "general.alignment"}
        own |= {"split.no": np.uint16(index), "split.count": np.uint16(len(groups))}
        own |= {"split.tensors.count": np.int32(len(entries))}
        _write_file(part, own, group, alignment)
    return paths


def _write_file(path: Path, metadata: Mapping[str, Any], tensors: Sequence[NamedTensor], alignment: int) -> None:
    header = bytearray(gguf.MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + encode_value(value)
    offset = 0
    for name, shape, weight_format, _ in tensors:
        header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", FORMATS[weight_format].ggml_type, offset)
        num_bytes = _num_bytes(name, shape, weight_format)
        offset += num_bytes + -num_bytes % alignment
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as stream:
            _write_padded(stream, header, alignment)
            for name, shape, weight_format, contents in tensors:
                raw = contents() if callable(contents) else contents
                if raw.dtype != np.uint8 or raw.nbytes != _num_bytes(name, shape, weight_format):
                    kind = f"{raw.nbytes} bytes of {raw.dtype}"
                    raise ValueError(f"tensor {name!r}: {kind} are not {shape} of {weight_format}")
                _write_padded(stream, np.ascontiguousarray(raw).data, alignment)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_padded(stream: BinaryIO, content: bytearray | memoryview, alignment: int) -> None:
    stream.write(content)
    num_bytes = content.nbytes if isinstance(content, memoryview) else len(content)
    stream.write(b"\0" * (-num_bytes % alignment))


def _num_bytes(name: str, shape: tuple[int, ...], weight_format: str) -> int:
    if not 1 <= len(shape) <= gguf.MAX_DIMENSIONS or len(name.encode()) > gguf.MAX_NAME_BYTES:
        raise ValueError(f"GGUF cannot hold the tensor {name!r} of shape {shape}")
    return int(np.prod(shape[:-1], dtype=np.int64)) * bytes_per_row(weight_format, shape[-1])


def encode_value(value: Any) -> bytes:
    """Type and value, as they follow a metadata key."""
    if isinstance(value, np.ndarray):
        kind = _KIND_BY_DTYPE[value.dtype]
        return struct.pack("<IIQ", gguf.ARRAY, kind, value.size) + value.tobytes()
    if isinstance(value, np.generic):
        return struct.pack("<I", _KIND_BY_DTYPE[value.dtype]) + value.tobytes()
    if isinstance(value, str):
        return struct.pack("<I", gguf.STRING) + _text(value)
    if isinstance(value, (list, tuple)):
        return _encode_list(value)
    return encode_value(_scalar(value))


def _encode_list(values: Sequence[Any]) -> bytes:
    if not values:
        raise ValueError("an empty list has no element type; pass an empty numpy array")
    if isinstance(values[0], str):
        return struct.pack("<IIQ", gguf.ARRAY, gguf.STRING, len(values)) + b"".join(map(_text, values))
    if isinstance(values[0], (bool, float)):
        return encode_value(np.array(values, np.bool_ if isinstance(values[0], bool) else np.float32))
    return encode_value(np.array(values, np.int32 if max(map(abs, values)) < 1 << 31 else np.int64))


def _scalar(value: Any) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    if isinstance(value, int):
        for kind in (np.uint32, np.int32, np.uint64, np.int64):
            if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
                return kind(value)
    raise ValueError(f"GGUF metadata cannot hold {type(value).__name__} {value!r}")


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
