"""Reads GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) that a stranger wrote.

Three rules keep it safe. A number from the file is compared with the bytes that are left before it is used, in Python
integers, which cannot overflow. Nothing is allocated from a declared size: arrays and weights stay in the mapped file
until somebody asks for them. Every fault is a `ModelFileError`, one line, with the file's name and never its directory.

Text is strict UTF-8 everywhere, tokens included: vocabularies of the families we serve spell raw bytes in UTF-8
(byte-level BPE, `<0x0A>`), and a token that reads back differently is worse than a refusal.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from setpoint.errors import UnsupportedModelError
from setpoint.loaders.mapped import MappedFile, quote
from setpoint.quant.formats import FORMAT_BY_GGML_TYPE, FORMATS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's
MAX_NAME_BYTES = 63  # ggml's
MAX_DIMENSIONS = 4  # ggml's
MAX_DIMENSION = (1 << 31) - 1  # kernels count rows and columns in int32
MAX_ENTRIES = 1 << 14  # metadata keys, and tensors; the largest published models have a few thousand
MAX_ARRAY_STRINGS = 1 << 22
MAX_TEXT_BYTES = 1 << 20  # longer text is left in the file, as an array of bytes
TEXT_BUDGET_BYTES = 1 << 22  # for all the text of one file together

MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

# Value types by id: the little-endian layout of one element, as struct and numpy both spell it.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
_LAYOUT = {UINT8: "<u1", INT8: "<i1", UINT16: "<u2", INT16: "<i2", UINT32: "<u4", INT32: "<i4", FLOAT32: "<f4"}
_LAYOUT |= {BOOL: "<u1", UINT64: "<u8", INT64: "<i8", FLOAT64: "<f8"}
DTYPES: dict[int, np.dtype[Any]] = {kind: np.dtype(layout) for kind, layout in _LAYOUT.items()}
_SCALARS = {UINT8: "<B", INT8: "<b", UINT16: "<H", INT16: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<B"}
_SCALARS |= {UINT64: "<Q", INT64: "<q", FLOAT64: "<d"}
_STRUCTS = {kind: struct.Struct(layout) for kind, layout in _SCALARS.items()}

# Formats that ggml defines and we do not read: the difference between "unsupported" and "malformed".
_OTHER_FORMATS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """An array that stays in the file until it is read; its extent has been checked."""

    file: GGUFFile
    key: str
    kind: int  # value type of the elements; never ARRAY
    count: int
    start: int

    def __len__(self) -> int:
        return self.count

    def numbers(self) -> NDArray[Any]:
        """A read-only view of the elements. Raises ModelFileError when they are strings."""
        if self.kind == STRING:
            self.file.fail(f"metadata {quote(self.key)} must be an array of numbers")
        dtype = DTYPES[self.kind]
        return self.file.bytes[self.start : self.start + self.count * dtype.itemsize].view(dtype)

    def strings(self) -> list[str]:
        """All elements, decoded. Raises ModelFileError when they are not strings or not UTF-8."""
        if self.kind != STRING:
            self.file.fail(f"metadata {quote(self.key)} must be an array of strings")
        from setpoint import _native  # here: files are also written, and their layout known, where nothing is compiled

        strings = _native.read_strings(self.file.bytes, self.start, self.count)
        if len(strings) < self.count:
            self.file.fail(f"metadata {quote(self.key)} entry {len(strings)} is not valid UTF-8")
        return strings


Value = bool | int | float | str | GGUFArray


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `rows` x `row_bytes` bytes from the absolute `offset`; `shape` is row-major."""

    name: str
    shape: tuple[int, ...]
    format: str
    rows: int
    row_bytes: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.row_bytes


class GGUFFile(MappedFile):
    """One mapped file: `metadata` in file order (32-bit floats as the shortest decimal), `tensors` by GGUF name.

    Raises ModelNotFoundError, ModelFileError, or UnsupportedModelError for a weight format we do not read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.metadata: dict[str, Value] = {}
            self.kinds: dict[str, int] = {}
            self._text_budget = TEXT_BUDGET_BYTES
            self._position = 0
            num_tensors = self._read_header()
            self.alignment = self._read_alignment()
            self.tensors = self._read_tensors(num_tensors)
        except BaseException:
            self.close()
            raise

    def raw(self, entry: TensorEntry) -> NDArray[np.uint8]:
        """uint8 [rows, row_bytes], a read-only view of the file."""
        return self.bytes[entry.offset : entry.end].reshape(entry.rows, entry.row_bytes)

    def digest(self) -> str:
        """Of the header's bytes, the size and the modification time."""
        state = hashlib.sha256(self.bytes[: self._position].data)
        state.update(struct.pack("<QQ", self.size, self.modified_ns))
        return state.hexdigest()

    # ------------------------------------------------------------------------------------------------ the header

    def _read_header(self) -> int:
        """Magic, version, counts and metadata; returns the number of tensors."""
        if self.map[:4] != MAGIC:
            self.fail("not a GGUF file (bad magic)")
        self._position = 4
        version = self._scalar(UINT32, "version")
        if version not in VERSIONS:
            if version & 0xFFFF == 0 and version:
                self.fail("GGUF version: a big-endian file; convert it to little-endian")
            self.fail(f"GGUF version {version} is not supported; supported: 2 and 3; convert the model again")
        num_tensors = self._count("tensor count", MIN_TENSOR_BYTES)
        for _ in range(self._count("metadata count", MIN_KEY_VALUE_BYTES)):
            self._read_key_value()
        return num_tensors

    def _count(self, what: str, entry_bytes: int) -> int:
        count = int(self._scalar(UINT64, what))
        if count > MAX_ENTRIES or count > (self.size - self._position) // entry_bytes:
            self.fail(f"{what} {count} is more than the file can hold or than {MAX_ENTRIES}")
        return count

    def _take(self, num_bytes: int, what: str) -> int:
        """Claims the next bytes and returns where they start."""
        if num_bytes > self.size - self._position:
            self.fail(f"{what} ends past the end of the file (truncated?)")
        start = self._position
        self._position += num_bytes
        return start

    def _scalar(self, kind: int, what: str) -> Any:
        layout = _STRUCTS[kind]
        return layout.unpack_from(self.map, self._take(layout.size, what))[0]

    def _string(self, what: str, max_bytes: int) -> str:
        length = int(self._scalar(UINT64, what + " size"))
        if not 0 < length <= max_bytes:
            self.fail(f"{what} size is {length} bytes; expected 1..{max_bytes}")
        start = self._take(length, what)
        try:
            return self.map[start : start + length].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8")

    def _read_key_value(self) -> None:
        key = self._string(f"metadata key {len(self.metadata)}", MAX_KEY_BYTES)
        if key in self.metadata:
            self.fail(f"metadata key {quote(key)} occurs twice (duplicate)")
        what = f"metadata {quote(key)}"
        kind = int(self._scalar(UINT32, what + " type"))
        self.kinds[key] = kind
        if kind == ARRAY:
            self.metadata[key] = self._array(key, what)
        elif kind == STRING:
            self.metadata[key] = self._text(key, what)
        elif kind in _STRUCTS:
            self.metadata[key] = self._number(kind, what)
        else:
            self.fail(f"{what} has the unknown type {kind}")

    def _number(self, kind: int, what: str) -> bool | int | float:
        value = self._scalar(kind, what)
        if kind == BOOL:
            if value > 1:
                self.fail(f"{what} is a bool of value {value}; expected 0 or 1")
            return bool(value)
        if kind == FLOAT32:
            return float(str(np.float32(value)))  # 1e-06 as the author wrote it, not 9.999999974752427e-07
        number: int | float = value
        return number

    def _text(self, key: str, what: str) -> str | GGUFArray:
        length = int(self._scalar(UINT64, what + " size"))
        start = self._take(length, what + " value")
        if length > min(MAX_TEXT_BYTES, self._text_budget):
            return GGUFArray(self, key, UINT8, length, start)
        self._text_budget -= length
        try:
            return self.map[start : start + length].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8")

    def _array(self, key: str, what: str) -> GGUFArray:
        kind = int(self._scalar(UINT32, what + " array type"))
        count = int(self._scalar(UINT64, what + " array size"))
        if kind == ARRAY:
            self.fail(f"{what} is an array of arrays (nested), which is not allowed")
        start = self._position
        if kind == STRING:
            self._skip_strings(count, what)
        elif kind in DTYPES:
            self._take(count * DTYPES[kind].itemsize, what + f" array of {count}")
        else:
            self.fail(f"{what} is an array of the unknown type {kind}")
        array = GGUFArray(self, key, kind, count, start)
        if kind == BOOL and count and array.numbers().max() > 1:
            self.fail(f"{what} has a bool that is neither 0 nor 1")
        return array

    def _skip_strings(self, count: int, what: str) -> None:
        """Checks the extent of every string."""
        if count > MAX_ARRAY_STRINGS or count > (self.size - self._position) // 8:
            self.fail(f"{what} array of {count} strings is more than the file can hold or than {MAX_ARRAY_STRINGS}")
        from setpoint import _native

        whole, position = _native.skip_strings(self.bytes, self._position, count)
        if whole < count:
            self.fail(f"{what} entry {whole} ends past the end of the file (truncated?)")
        self._position = position
        if position > self.size:
            self.fail(f"{what} entry {count - 1} ends past the end of the file (truncated?)")

    def _read_alignment(self) -> int:
        if "general.alignment" not in self.metadata:
            return DEFAULT_ALIGNMENT
        alignment = self.metadata["general.alignment"]
        if self.kinds["general.alignment"] != UINT32 or not isinstance(alignment, int):
            self.fail("metadata 'general.alignment' must be a 32-bit unsigned integer")
        if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"alignment {alignment} is not a power of two in 8..{MAX_ALIGNMENT}")
        return alignment

    # ----------------------------------------------------------------------------------------------- the tensors

    def _read_tensors(self, count: int) -> dict[str, TensorEntry]:
        """Tensor entries with absolute offsets, checked against the file and against each other."""
        relative: dict[str, TensorEntry] = {}
        for index in range(count):
            entry = self._read_tensor(index)
            if entry.name in relative:
                self.fail(f"tensor {quote(entry.name)} occurs twice (duplicate name)")
            relative[entry.name] = entry
        data_start = -(-self._position // self.alignment) * self.alignment
        tensors = {name: self._place(entry, data_start) for name, entry in relative.items()}
        in_order = sorted(tensors.values(), key=lambda entry: entry.offset)
        for before, after in itertools.pairwise(in_order):
            if before.end > after.offset:
                self.fail(f"tensors {quote(before.name)} and {quote(after.name)} overlap")
        return tensors

    def _read_tensor(self, index: int) -> TensorEntry:
        name = self._string(f"name of tensor {index}", MAX_NAME_BYTES)
        what = f"tensor {quote(name)}"
        num_dimensions = int(self._scalar(UINT32, what + " n_dims"))
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            self.fail(f"{what} has {num_dimensions} dimensions; expected 1..{MAX_DIMENSIONS}")
        shape = tuple(int(self._scalar(UINT64, what + " shape")) for _ in range(num_dimensions))[::-1]
        for size in shape:
            if not 1 <= size <= MAX_DIMENSION:
                self.fail(f"{what} has a dimension of {size}; expected 1..{MAX_DIMENSION}")
        type_id = int(self._scalar(UINT32, what + " type"))
        if type_id in _OTHER_FORMATS:
            raise UnsupportedModelError(
                f"{self.name}: {what} has the format {_OTHER_FORMATS[type_id]}; supported: {', '.join(FORMATS)}"
            )
        if type_id not in FORMAT_BY_GGML_TYPE:
            self.fail(f"{what} has the unknown type {type_id}")
        weight_format = FORMAT_BY_GGML_TYPE[type_id]
        if shape[-1] % weight_format.block_elements:
            self.fail(
                f"{what} has rows of {shape[-1]}, not a multiple of the"
                f" {weight_format.name} block of {weight_format.block_elements}"
            )
        row_bytes = shape[-1] // weight_format.block_elements * weight_format.block_bytes
        rows = 1
        for size in shape[:-1]:
            rows *= size
        if rows * row_bytes > self.size:
            self.fail(f"{what} is larger than the file: {rows * row_bytes} bytes declared")
        offset = int(self._scalar(UINT64, what + " offset"))
        return TensorEntry(name, shape, weight_format.name, rows, row_bytes, offset)

    def _place(self, entry: TensorEntry, data_start: int) -> TensorEntry:
        what = f"tensor {quote(entry.name)}"
        if entry.offset % self.alignment:
            self.fail(f"{what} has the offset {entry.offset}, not a multiple of the alignment {self.alignment}")
        offset = data_start + entry.offset
        if offset + entry.rows * entry.row_bytes > self.size:
            self.fail(f"{what} at offset {entry.offset} ends past the end of the file (truncated?)")
        return TensorEntry(entry.name, entry.shape, entry.format, entry.rows, entry.row_bytes, offset)
