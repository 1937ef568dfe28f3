"""GGUF files put together byte by byte, so that tests can lie about any number in them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TYPE_F32, TYPE_F16, TYPE_Q4_0, TYPE_Q8_0 = 0, 1, 2, 8


def text(value: str | bytes, *, size: int | None = None) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content) if size is None else size) + content


def key_value(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(
    name: str | bytes, dims: Sequence[int], type_id: int = TYPE_F32, offset: int = 0, *, n_dims: int | None = None
) -> bytes:
    """`dims` in the file's order: fastest first."""
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, type_id, offset)


def assemble(
    values: Sequence[bytes],
    tensors: Sequence[bytes] = (),
    content: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_values: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(values) if num_values is None else num_values,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(tensors)
    return header + b"\0" * (-len(header) % alignment) + content


ARCHITECTURE = key_value("general.architecture", STRING, text("llama"))


def small_file() -> bytes:
    """A valid file with a value of every type and two tensors; every one of its bytes counts."""
    values = [
        ARCHITECTURE,
        key_value("a.u8", U8, b"\x01"),
        key_value("a.i16", I16, b"\xff\xff"),
        key_value("a.u32", U32, struct.pack("<I", 7)),
        key_value("a.f32", F32, struct.pack("<f", 1e-6)),
        key_value("a.bool", BOOL, b"\x01"),
        key_value("a.i64", I64, struct.pack("<q", -7)),
        key_value("a.f64", F64, struct.pack("<d", 0.1)),
        key_value("a.strings", ARRAY, array(STRING, 2, text("ab") + text(""))),
        key_value("a.numbers", ARRAY, array(F32, 3, struct.pack("<3f", 1, 2, 3))),
    ]
    tensors = [tensor("x", [8]), tensor("y", [32, 2], TYPE_Q8_0, 32)]
    return assemble(values, tensors, bytes(range(32)) + bytes(68))
