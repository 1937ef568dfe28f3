"""Hostile GGUF files (LD-1, LD-2 of the reliability reference): each is refused in one line that says what is wrong."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_bytes import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    TYPE_F32,
    TYPE_Q4_0,
    TYPE_Q8_0,
    U32,
    U64,
    array,
    assemble,
    key_value,
    small_file,
    tensor,
    text,
)

from setpoint.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from setpoint.loaders.gguf import MAX_ENTRIES, GGUFFile
from setpoint.loaders.split import open_parts

MAX64 = (1 << 64) - 1
HUGE = 0x7FFFFFFFFFFFFFC0  # of CVE-2026-27940: two of these sum to a small number


def with_value(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return assemble([ARCHITECTURE, key_value(key, kind, payload)])


def with_tensors(*tensors: bytes, content: bytes = bytes(128)) -> bytes:
    return assemble([ARCHITECTURE], tensors, content)


def with_alignment(alignment: int, offset: int) -> bytes:
    value = key_value("general.alignment", U32, struct.pack("<I", alignment))
    return assemble([value], [tensor("a", [8]), tensor("b", [8], offset=offset)], bytes(256), alignment=64)


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty"),
    "three bytes": (b"GGU", "magic"),
    "bad magic": (assemble([ARCHITECTURE], magic=b"GGML"), "magic"),
    "version 0": (assemble([ARCHITECTURE], version=0), "version 0"),
    "version 1": (assemble([ARCHITECTURE], version=1), "version 1"),
    "future version": (assemble([ARCHITECTURE], version=4), "version 4"),
    "big endian": (assemble([ARCHITECTURE], version=3 << 24), "big-endian"),
    "n_tensors": (assemble([ARCHITECTURE], num_tensors=MAX64), "tensor count"),
    "n_tensors one too many": (assemble([ARCHITECTURE], [tensor("a", [8])], bytes(32), num_tensors=2), "tensor 1"),
    "n_kv": (assemble([ARCHITECTURE], num_values=MAX64), "metadata count"),
    "n_kv one too many": (assemble([ARCHITECTURE], [], bytes(64), num_values=2), "metadata key 1"),
    "n_kv above the maximum": (
        assemble([key_value(f"k{i}", U32, bytes(4)) for i in range(MAX_ENTRIES + 1)]),
        "metadata count",
    ),
    "key size": (assemble([text("key", size=MAX64) + bytes(64)]), "key 0 size"),
    "key size past the end": (assemble([text("key", size=60_000) + bytes(64)]), "past the end"),
    "key too long": (with_value("k" * (1 << 16), U32, bytes(4)), "key 1 size is 65536"),
    "key empty": (with_value("", U32, bytes(4)), "key 1 size is 0"),
    "key not UTF-8": (with_value(b"k\xff", U32, bytes(4)), "UTF-8"),
    "value type": (with_value("k", 13, bytes(8)), "unknown type 13"),
    "value type huge": (with_value("k", (1 << 32) - 1, bytes(8)), "unknown type 4294967295"),
    "duplicate key": (assemble([ARCHITECTURE, ARCHITECTURE]), "duplicate"),
    "value size": (with_value("k", STRING, text("v", size=MAX64)), "value ends past the end"),
    "value size of a terabyte": (with_value("k", STRING, text("v", size=1 << 40)), "value ends past the end"),
    "value not UTF-8": (with_value("k", STRING, text(b"\xc3\x28")), "UTF-8"),
    "value cut": (assemble([ARCHITECTURE, text("k") + struct.pack("<I", U64) + bytes(4)], alignment=1), "past the end"),
    "bool of 2": (with_value("k", BOOL, b"\x02"), "bool of value 2"),
    "array of arrays": (with_value("k", ARRAY, array(ARRAY, 1, array(U32, 1, bytes(4)))), "nested"),
    "array type": (with_value("k", ARRAY, array(13, 1, bytes(8))), "array of the unknown type 13"),
    "array size": (with_value("k", ARRAY, array(I32, MAX64, bytes(8))), "past the end"),
    "array size times four overflows": (with_value("k", ARRAY, array(I32, (1 << 62) + 1, bytes(8))), "past the end"),
    "array size one too many": (assemble([key_value("k", ARRAY, array(U64, 9, bytes(64)))], alignment=1), "past the"),
    "array of 2^64 - 1 strings": (with_value("k", ARRAY, array(STRING, MAX64, text("v"))), "strings is more than"),
    "array string size": (with_value("k", ARRAY, array(STRING, 2, text("v", size=MAX64) + bytes(32))), "entry 0"),
    "last array string size": (with_value("k", ARRAY, array(STRING, 1, text("v", size=MAX64 - 8))), "entry 0"),
    "array of bools with a 2": (with_value("k", ARRAY, array(BOOL, 3, b"\x00\x01\x02")), "neither 0 nor 1"),
    "alignment 0": (with_alignment(0, 32), "alignment 0"),
    "alignment 24": (with_alignment(24, 48), "alignment 24"),
    "alignment 2^31": (with_alignment(1 << 31, 32), "alignment 2147483648"),
    "alignment of 64 bits": (with_value("general.alignment", U64, struct.pack("<Q", 32)), "'general.alignment' must"),
    "alignment of text": (with_value("general.alignment", STRING, text("32")), "'general.alignment' must"),
    "alignment of an array": (with_value("general.alignment", ARRAY, array(U32, 1, bytes(4))), "must"),
    "alignment inconsistent with the offsets": (with_alignment(64, 32), "multiple of the alignment 64"),
    "name empty": (with_tensors(tensor("", [8])), "name of tensor 0 size is 0"),
    "name too long": (with_tensors(tensor("n" * 64, [8])), "size is 64"),
    "name size": (with_tensors(text("n", size=MAX64) + bytes(64)), "name of tensor 0 size"),
    "name not UTF-8": (with_tensors(tensor(b"n\xff", [8])), "UTF-8"),
    "name duplicate": (with_tensors(tensor("a", [8]), tensor("a", [8], offset=32)), "duplicate"),
    "n_dims 0": (with_tensors(tensor("a", [])), "0 dimensions"),
    "n_dims 5": (with_tensors(tensor("a", [1] * 5)), "5 dimensions"),
    "n_dims huge": (with_tensors(tensor("a", [8], n_dims=(1 << 32) - 1)), "4294967295 dimensions"),
    "dimension 0": (with_tensors(tensor("a", [8, 0])), "dimension of 0"),
    "dimension negative": (with_tensors(tensor("a", [MAX64])), f"dimension of {MAX64}"),
    "dimension of 2^31": (with_tensors(tensor("a", [8, 1 << 31])), f"dimension of {1 << 31}"),
    "dimension of 2^63": (with_tensors(tensor("a", [1 << 63])), f"dimension of {1 << 63}"),
    "element count overflows": (with_tensors(tensor("a", [(1 << 31) - 1] * 4)), "larger than the file"),
    "byte count wraps to a small one": (with_tensors(tensor("a", [1 << 30, 1 << 30, 16])), "larger than the file"),
    "sizes sum to a small number": (
        with_tensors(tensor("a", [HUGE]), tensor("b", [HUGE], offset=HUGE)),
        f"dimension of {HUGE}",
    ),
    "quantized exabytes": (with_tensors(tensor("a", [1 << 30, 1 << 30], TYPE_Q4_0)), "larger than the file"),
    "tensor type removed": (with_tensors(tensor("a", [32], 4)), "unknown type 4"),
    "tensor type unknown": (with_tensors(tensor("a", [32], 200)), "unknown type 200"),
    "row is not whole blocks": (with_tensors(tensor("a", [48], TYPE_Q8_0)), "multiple of the Q8_0 block"),
    "row smaller than a block": (with_tensors(tensor("a", [8, 4], TYPE_Q4_0)), "multiple of the Q4_0 block"),
    "offset misaligned": (with_tensors(tensor("a", [8], TYPE_F32, 16)), "multiple of the alignment"),
    "offset past the end": (with_tensors(tensor("a", [8], TYPE_F32, 128)), "past the end"),
    "offset wraps": (with_tensors(tensor("a", [8], TYPE_F32, MAX64 - 31)), "past the end"),
    "size past the end": (with_tensors(tensor("a", [33])), "past the end"),
    "overlap": (with_tensors(tensor("a", [16]), tensor("b", [8], offset=32)), "overlap"),
    "same place": (with_tensors(tensor("a", [8]), tensor("b", [8])), "overlap"),
    "no content": (with_tensors(tensor("a", [8]), content=b""), "past the end"),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        return path

    return write


def test_the_small_file_is_valid(write: Callable[[bytes], Path]) -> None:
    file = GGUFFile(write(small_file()))
    assert file.metadata["a.f32"] == 1e-6
    assert file.metadata["a.bool"] is True
    assert file.metadata["a.i64"] == -7
    assert file.metadata["a.strings"].strings() == ["ab", ""]
    assert file.metadata["a.numbers"].numbers().tolist() == [1, 2, 3]
    assert file.raw(file.tensors["x"]).tobytes() == bytes(range(32))
    assert file.raw(file.tensors["y"]).shape == (2, 34)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, write: Callable[[bytes], Path]) -> None:
    content, fragment = MALFORMED[case]
    path = write(content)
    with pytest.raises(ModelFileError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert fragment in message
    assert message.startswith("bad.gguf: ")
    assert "\n" not in message
    assert str(path.parent) not in message


def test_no_memory_for_declared_sizes(write: Callable[[bytes], Path]) -> None:
    """The parser's own memory while it refuses: nothing a declared size could have asked for."""
    GGUFFile(write(small_file())).close()
    for case, (content, _) in MALFORMED.items():
        path = write(content)
        tracemalloc.start()
        with pytest.raises(ModelFileError):
            GGUFFile(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < (1 << 20), case


@pytest.mark.parametrize(
    ("values", "max_mib"),
    [
        pytest.param([key_value(f"{i:x}", BOOL, b"\1") for i in range(MAX_ENTRIES - 1)], 16, id="many keys"),
        pytest.param([key_value("k", ARRAY, array(STRING, 50_000, text("abcd") * 50_000))], 1, id="many strings"),
        pytest.param([key_value(f"{i:x}", STRING, text("x" * 500_000)) for i in range(20)], 5, id="long text"),
    ],
)
def test_memory_of_a_large_header(values: list[bytes], max_mib: int, write: Callable[[bytes], Path]) -> None:
    """A header that is refused only at its very end has cost little beyond the mapped file."""
    path = write(assemble([*values, text("last") + struct.pack("<I", 99)]))
    tracemalloc.start()
    with pytest.raises(ModelFileError, match="unknown type 99"):
        GGUFFile(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (max_mib << 20)


def test_truncation_at_every_byte(write: Callable[[bytes], Path]) -> None:
    content = small_file()
    path = write(content)
    for size in reversed(range(len(content))):
        os.truncate(path, size)
        with pytest.raises(ModelFileError):
            GGUFFile(path)


def test_a_format_we_do_not_read_is_named(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'a' has the format IQ4_NL; supported: F32, .*Q6_K"):
        GGUFFile(write(with_tensors(tensor("a", [32], 20))))


def test_control_characters_in_names_are_escaped(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(ModelFileError, match=r"'a\\nb\\x1b\[2J'"):
        GGUFFile(write(with_tensors(tensor("a\nb\x1b[2J", [8, 0]))))


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelNotFoundError, match="no such file"):
            GGUFFile(path)


def test_version_2_reads_like_version_3(write: Callable[[bytes], Path]) -> None:
    assert GGUFFile(write(assemble([ARCHITECTURE], version=2))).metadata == {"general.architecture": "llama"}


def test_strings_that_are_not_utf8_are_found_when_read(write: Callable[[bytes], Path]) -> None:
    file = GGUFFile(write(with_value("k", ARRAY, array(STRING, 2, text("ok") + text(b"\xff")))))
    with pytest.raises(ModelFileError, match="entry 1 is not valid UTF-8"):
        file.metadata["k"].strings()


def test_arrays_say_when_they_hold_something_else(write: Callable[[bytes], Path]) -> None:
    file = GGUFFile(
        write(
            assemble(
                [
                    key_value("s", ARRAY, array(STRING, 1, text("a"))),
                    key_value("n", ARRAY, array(F32, 1, bytes(4))),
                ]
            )
        )
    )
    with pytest.raises(ModelFileError, match="'s' must be an array of numbers"):
        file.metadata["s"].numbers()
    with pytest.raises(ModelFileError, match="'n' must be an array of strings"):
        file.metadata["n"].strings()


def test_failed_open_of_parts_closes_the_file(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(ModelFileError):
        open_parts(write(with_tensors(tensor("a", [8, 0]))))
