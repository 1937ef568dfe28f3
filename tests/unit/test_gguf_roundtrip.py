"""What our writer writes, our reader reads: formats, metadata types, alignment, split files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_bytes import ARCHITECTURE, assemble

from setpoint.errors import ModelFileError
from setpoint.loaders import gguf
from setpoint.loaders.gguf import GGUFArray, GGUFFile
from setpoint.loaders.gguf_writer import NamedTensor, write
from setpoint.loaders.split import open_parts
from setpoint.quant.formats import FORMATS, bytes_per_row


def random_tensor(name: str, shape: tuple[int, ...], weight_format: str, seed: int = 0) -> NamedTensor:
    rows = int(np.prod(shape[:-1], dtype=int))
    raw = np.random.default_rng(seed).integers(0, 256, (rows, bytes_per_row(weight_format, shape[-1])), np.uint8)
    return name, shape, weight_format, raw


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_every_format(weight_format: str, alignment: int, tmp_path: Path) -> None:
    tensors = [
        random_tensor("a.weight", (3, 256), weight_format, 1),
        random_tensor("b", (512,), weight_format, 2),
        random_tensor("c", (2, 3, 256), weight_format, 3),
    ]
    write(tmp_path / "m.gguf", {}, tensors, alignment=alignment)
    file = GGUFFile(tmp_path / "m.gguf")
    assert list(file.tensors) == ["a.weight", "b", "c"]
    for name, shape, _, raw in tensors:
        entry = file.tensors[name]
        assert (entry.shape, entry.format, entry.offset % alignment) == (shape, weight_format, 0)
        np.testing.assert_array_equal(file.raw(entry), raw)
        assert not file.raw(entry).flags.writeable


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, gguf.BOOL),
        (0, gguf.UINT32),
        ((1 << 32) - 1, gguf.UINT32),
        (-1, gguf.INT32),
        (1 << 32, gguf.UINT64),
        (-(1 << 40), gguf.INT64),
        (1e-06, gguf.FLOAT32),
        (500000.0, gguf.FLOAT32),
        ("naïve 漢字 🎉", gguf.STRING),
        ("", gguf.STRING),
        (np.uint8(255), gguf.UINT8),
        (np.int8(-128), gguf.INT8),
        (np.uint16(65535), gguf.UINT16),
        (np.int16(-5), gguf.INT16),
        (np.float64(0.1), gguf.FLOAT64),
    ],
)
def test_every_metadata_type(value: Any, kind: int, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", {"first": 1, "key": value, "last": "x"}, [])
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.metadata["key"] == value
    assert file.kinds["key"] == kind
    assert type(file.metadata["key"]) is type(value.item() if isinstance(value, np.generic) else value)
    assert list(file.metadata) == ["first", "key", "last"]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([1, -2, 3], "<i4"),
        ([1 << 40], "<i8"),
        ([0.5, 1.5], "<f4"),
        ([True, False], "<u1"),
        (np.array([1, 2], np.uint16), "<u2"),
        (np.array([], np.float32), "<f4"),
    ],
)
def test_arrays_of_numbers(value: Any, dtype: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", {"key": value, "after": 7}, [])
    file = GGUFFile(tmp_path / "m.gguf")
    array = file.metadata["key"]
    assert isinstance(array, GGUFArray)
    assert (array.numbers().tolist(), array.numbers().dtype) == (list(value), np.dtype(dtype))
    assert file.metadata["after"] == 7


def test_array_of_strings(tmp_path: Path) -> None:
    strings = ["", "a", "Ġthe", "漢", "x" * 5000]
    write(tmp_path / "m.gguf", {"key": strings, "after": 7}, [])
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.metadata["key"].strings() == strings
    assert file.metadata["after"] == 7


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({"key": []}, []),
        ({"key": {"a": 1}}, []),
        ({}, [("a", (2, 32), "Q8_0", np.zeros((2, 33), np.uint8))]),
        ({}, [("n" * 64, (4,), "F32", np.zeros((1, 16), np.uint8))]),
        ({}, [("a", (), "F32", np.zeros((1, 4), np.uint8))]),
    ],
)
def test_writer_refuses_what_the_format_cannot_hold(metadata: Any, tensors: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        write(tmp_path / "m.gguf", metadata, tensors)
    assert list(tmp_path.iterdir()) == []


def test_digest_changes_with_header_and_size(tmp_path: Path) -> None:
    digests = set()
    for index, metadata in enumerate([{"a": 1}, {"a": 2}, {"a": 1, "b": 1}]):
        write(tmp_path / f"{index}.gguf", metadata, [])
        digests.add(GGUFFile(tmp_path / f"{index}.gguf").digest())
        assert GGUFFile(tmp_path / f"{index}.gguf").digest() in digests
    assert len(digests) == 3


def test_views_outlive_close(tmp_path: Path) -> None:
    name, shape, weight_format, raw = random_tensor("a", (3, 32), "Q4_0")
    write(tmp_path / "m.gguf", {}, [(name, shape, weight_format, raw)])
    file = GGUFFile(tmp_path / "m.gguf")
    view = file.raw(file.tensors["a"])
    file.close()
    file.close()
    np.testing.assert_array_equal(view, raw)


# ---------------------------------------------------------------------------------------------------- split files


def write_split(directory: Path) -> list[Path]:
    tensors = [random_tensor(f"t{index}", (2, 32), "Q8_0", index) for index in range(5)]
    return write(directory / "m.gguf", {"general.architecture": "llama"}, tensors, tensors_per_part=2, alignment=64)


def test_any_part_opens_all(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    assert [path.name for path in paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for path in paths:
        parts = open_parts(path)
        assert [part.path for part in parts] == paths
        assert [list(part.tensors) for part in parts] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
        assert parts[0].metadata["general.architecture"] == "llama"


def test_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].unlink()
    with pytest.raises(ModelFileError, match=r"the part m-00002-of-00003.gguf is missing"):
        open_parts(paths[2])


def test_a_part_under_another_name(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    renamed = paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match="one of 3 parts; keep the name"):
        open_parts(renamed)


def test_parts_in_the_wrong_order(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    first, second = paths[0].read_bytes(), paths[1].read_bytes()
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    with pytest.raises(ModelFileError, match=r"'split.no' is 1; expected 0"):
        open_parts(paths[0])


def test_a_part_of_another_model(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[2].write_bytes(assemble([ARCHITECTURE]))
    with pytest.raises(ModelFileError, match=r"m-00003-of-00003.gguf: metadata 'split.count' must be an integer"):
        open_parts(paths[0])


@pytest.mark.parametrize(
    ("name", "fragment"),
    [("m-00000-of-00002.gguf", "makes no sense"), ("m-00001-of-99999.gguf", "makes no sense")],
)
def test_absurd_part_numbers(name: str, fragment: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(assemble([ARCHITECTURE]))
    with pytest.raises(ModelFileError, match=fragment):
        open_parts(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("split.count", np.uint16(3), "the name says 2"),
        ("split.tensors.count", np.int32(5), "'split.tensors.count' is 5"),
        ("split.no", "0", "'split.no' must be an integer"),
    ],
)
def test_parts_that_disagree(key: str, value: Any, fragment: str, tmp_path: Path) -> None:
    for index in range(2):
        stated = {"split.no": np.uint16(index), "split.count": np.uint16(2), "split.tensors.count": np.int32(2)}
        tensors = [random_tensor(f"t{index}", (1, 32), "Q8_0")]
        write(tmp_path / f"m-0000{index + 1}-of-00002.gguf", stated | {key: value}, tensors)
    with pytest.raises(ModelFileError, match=fragment):
        open_parts(tmp_path / "m-00001-of-00002.gguf")


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    for index in range(2):
        stated = {"split.no": np.uint16(index), "split.count": np.uint16(2), "split.tensors.count": np.int32(2)}
        write(tmp_path / f"m-0000{index + 1}-of-00002.gguf", stated, [random_tensor("same", (1, 32), "Q8_0")])
    with pytest.raises(ModelFileError, match=r"'same' occurs twice .*also in m-00001"):
        open_parts(tmp_path / "m-00002-of-00002.gguf")
