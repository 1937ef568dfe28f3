"""Hugging Face directories as checkpoints: what is read, and what is refused (LD-4, LD-5, LD-8)."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.errors import ModelError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from setpoint.loaders.checkpoint import Checkpoint, open_checkpoint
from setpoint.loaders.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from setpoint.quant.formats import dequantize
from setpoint.text.source import TokenizerFile
from tiny_models import CHAT_TEMPLATE, TINY_MODELS, weights, write_directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_directory(TINY_MODELS["llama"], tmp_path / "tiny")


def update(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def file_bytes(header: Any, content: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("model", TINY_MODELS)
def test_every_tensor_comes_back(model: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_directory(TINY_MODELS[model], tmp_path / model))
    expected = weights(TINY_MODELS[model])
    assert sorted(checkpoint.tensor_names()) == sorted(expected)
    for name, value in expected.items():
        tensor = checkpoint.tensor(name)
        assert (tensor.name, tensor.shape, tensor.format) == (name, value.shape, "F32")
        np.testing.assert_array_equal(dequantize("F32", tensor.raw).reshape(value.shape), value)
        assert not tensor.raw.flags.owndata
        assert not tensor.raw.flags.writeable
    assert checkpoint.config == TINY_MODELS[model].config


def test_half_precision_is_read_without_torch(directory: Path) -> None:
    bf16 = np.arange(8, dtype=np.float32).view(np.uint16)[1::2].tobytes()
    f16 = np.arange(6, dtype=np.float16).tobytes()
    header = {"a": entry("BF16", [2, 4], 0, 16), "b": entry("F16", [6], 16, 28), "s": entry("F32", [], 28, 32)}
    (directory / "model.safetensors").write_bytes(file_bytes(header, bf16 + f16 + struct.pack("<f", 7)))
    checkpoint = open_checkpoint(directory)
    a, b, scalar = (checkpoint.tensor(name) for name in "abs")
    assert (a.format, a.shape, a.raw.shape) == ("BF16", (2, 4), (2, 8))
    np.testing.assert_array_equal(dequantize(a.format, a.raw).ravel(), np.arange(8))
    assert (b.format, b.shape, b.raw.shape) == ("F16", (6,), (1, 12))
    np.testing.assert_array_equal(dequantize(b.format, b.raw).ravel(), np.arange(6))
    assert (scalar.shape, dequantize("F32", scalar.raw).item()) == ((), 7.0)


def shard(directory: Path) -> dict[str, str]:
    """Splits model.safetensors in two and writes the index; returns the index's weight map."""
    from safetensors.numpy import save_file

    values = weights(TINY_MODELS["llama"])
    names = list(values)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        shard_name = f"model-0000{number}-of-00002.safetensors"
        save_file({name: values[name] for name in part}, directory / shard_name)
        weight_map |= dict.fromkeys(part, shard_name)
    update(directory / "model.safetensors.index.json", weight_map=weight_map, metadata={"total_size": 1})
    return weight_map


def test_sharded_directory(directory: Path) -> None:
    shard(directory)
    checkpoint = open_checkpoint(directory)
    for name, value in weights(TINY_MODELS["llama"]).items():
        np.testing.assert_array_equal(dequantize("F32", checkpoint.tensor(name).raw).reshape(value.shape), value)


def test_generation_tokenizer_and_template(directory: Path) -> None:
    update(directory / "generation_config.json", eos_token_id=[257, 258, 257], temperature=0.6, top_k=20, top_p=0.95)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.generation.eos_token_ids == (257, 258)
    assert (checkpoint.generation.bos_token_id, checkpoint.generation.temperature) == (256, 0.6)
    assert (checkpoint.generation.top_k, checkpoint.generation.top_p) == (20, 0.95)
    assert isinstance(checkpoint.tokenizer, TokenizerFile)
    assert checkpoint.tokenizer.path == directory / "tokenizer.json"
    assert checkpoint.tokenizer.settings["bos_token"] == "<|bos|>"
    assert checkpoint.chat_template == CHAT_TEMPLATE
    assert checkpoint.name == "tiny"


def test_ids_of_config_json_stand_in(directory: Path) -> None:
    (directory / "generation_config.json").unlink()
    assert open_checkpoint(directory).generation.eos_token_ids == (257,)


def test_template_of_its_own_file_and_named_templates(directory: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    update(directory / "tokenizer_config.json", chat_template=named)
    assert open_checkpoint(directory).chat_template == "D"
    (directory / "chat_template.jinja").write_text("é{{ messages }}")
    assert open_checkpoint(directory).chat_template == "é{{ messages }}"
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").unlink()
    assert open_checkpoint(directory).chat_template is None


def test_text_model_inside_a_larger_one(directory: Path) -> None:
    inner = json.loads((directory / "config.json").read_text()) | {"model_type": "gemma3_text"}
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner}))
    header = {
        "language_model.model.norm.weight": entry("F32", [2], 0, 8),
        "language_model.lm_head.weight": entry("F32", [1, 1], 8, 12),
        "vision_tower.position_ids": entry("I64", [1], 12, 20),
    }
    (directory / "model.safetensors").write_bytes(file_bytes(header, bytes(20)))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config == inner
    assert checkpoint.tensor("model.norm.weight").shape == (2,)
    assert checkpoint.has_tensor("lm_head.weight")
    assert sorted(checkpoint.tensor_names()) == ["lm_head.weight", "model.norm.weight"]
    with pytest.raises(UnsupportedModelError, match=r"'vision_tower.position_ids' has the dtype I64"):
        checkpoint.tensor("vision_tower.position_ids")


def test_name_of_a_snapshot_in_the_hub_cache(directory: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    directory.rename(snapshot)
    assert open_checkpoint(snapshot).name == "org/some-model"


def test_digest_follows_config_and_weights(directory: Path) -> None:
    first = open_checkpoint(directory).digest()
    assert open_checkpoint(directory).digest() == first
    update(directory / "config.json", rope_theta=5.0)
    second = open_checkpoint(directory).digest()
    os.utime(directory / "model.safetensors", ns=(1, 1))
    assert len({first, second, open_checkpoint(directory).digest()}) == 3


# ------------------------------------------------------------------------------------------------------- refusal


def test_pickles_are_refused_with_advice(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    for path in (directory, directory / "pytorch_model.bin"):
        with pytest.raises(UnsupportedModelError, match=r"pytorch_model.bin is a pickle file: .*safetensors or GGUF"):
            open_checkpoint(path)
    for suffix in (".pt", ".pth", ".PT", ".ckpt", ".pkl"):
        with pytest.raises(UnsupportedModelError, match="pickle"):
            open_checkpoint(directory / f"weights{suffix}")


def test_other_paths(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="give the directory"):
        open_checkpoint(directory / "model.safetensors")
    with pytest.raises(ModelNotFoundError, match="nothing: no such file"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ModelFileError, match=r"config.json: not a GGUF file"):
        open_checkpoint(directory / "config.json")
    (directory / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"tiny: there is no config.json; expected"):
        open_checkpoint(directory)
    (directory / "a.gguf").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"name one of them: a.gguf"):
        open_checkpoint(directory)


F32_2 = entry("F32", [2], 0, 8)
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "shorter than the size": (b"\0" * 7, "shorter"),
    "header past the end": (file_bytes({"a": F32_2}, bytes(8), size=10_000), "past the end"),
    "header of 2^64 - 1": (file_bytes({"a": F32_2}, bytes(8), size=(1 << 64) - 1), "header size"),
    "header of 100 MB": (file_bytes({"a": F32_2}, bytes(8), size=100_000_001), "header size"),
    "header of more than we accept": (struct.pack("<Q", MAX_HEADER_BYTES + 1), "header size"),
    "header not JSON": (file_bytes(b"{" + b" " * 7), "valid"),
    "header not UTF-8": (file_bytes(b'{"\xff":1} '), "valid"),
    "header a list": (file_bytes([1]), "valid"),
    "deeply nested": (file_bytes(b"[" * 100_000), "valid"),
    "duplicate tensor": (file_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(F32_2).encode(),) * 2), bytes(8)), "'a'"),
    "overlap": (file_bytes({"a": F32_2, "b": entry("F32", [2], 4, 12)}, bytes(12)), "valid"),
    "gap": (file_bytes({"a": F32_2, "b": entry("F32", [2], 12, 20)}, bytes(20)), "valid"),
    "bytes after the last tensor": (file_bytes({"a": F32_2}, bytes(12)), "valid"),
    "content cut": (file_bytes({"a": F32_2}, bytes(7)), "valid"),
    "wrong size for the shape": (file_bytes({"a": entry("F32", [3], 0, 8)}, bytes(8)), "valid"),
    "wrong size for the dtype": (file_bytes({"a": entry("F16", [2], 0, 8)}, bytes(8)), "valid"),
    "shape overflows": (file_bytes({"a": entry("F32", [1 << 32, 1 << 32], 0, 8)}, bytes(8)), "valid"),
    "dimension 0": (file_bytes({"a": entry("F32", [0, 4], 0, 0)}), "dimension of 0"),
    "dimension beyond int32": (file_bytes({"a": entry("I8", [1 << 31, 0], 0, 0)}), "shape must hold"),
    "dimension negative": (file_bytes({"a": entry("F32", [-2], 0, 8)}, bytes(8)), "valid"),
    "dimension a float": (file_bytes({"a": entry("F32", [2.0], 0, 8)}, bytes(8)), "valid"),
    "nine dimensions": (file_bytes({"a": entry("F32", [1] * 8 + [2], 0, 8)}, bytes(8)), "shape must be a list"),
    "offsets swapped": (file_bytes({"a": entry("F32", [2], 8, 0)}, bytes(8)), "valid"),
    "offsets missing": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "valid"),
    "dtype unknown": (file_bytes({"a": entry("F31", [2], 0, 8)}, bytes(8)), "valid"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file(case: str, tmp_path: Path) -> None:
    content, fragment = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert fragment in message
    assert message.startswith("model.safetensors: ")
    assert "\n" not in message
    assert str(tmp_path) not in message


def test_our_own_checks_do_not_depend_on_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library's validation taken away, offsets, sizes and duplicates are still checked."""
    monkeypatch.setattr(SafetensorsFile, "_validate", lambda self: None)
    path = tmp_path / "model.safetensors"
    for content, _ in MALFORMED.values():
        path.write_bytes(content)
        if content == MALFORMED["dtype unknown"][0]:
            with pytest.raises(UnsupportedModelError, match="dtype F31"):
                SafetensorsFile(path).raw("a")
        else:
            with pytest.raises(ModelFileError):
                SafetensorsFile(path)


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = file_bytes({"a": F32_2, "b": entry("BF16", [2, 3], 8, 20)}, bytes(20))
    path.write_bytes(content)
    assert set(SafetensorsFile(path).entries) == {"a", "b"}
    for size in reversed(range(len(content))):
        os.truncate(path, size)
        with pytest.raises(ModelFileError):
            SafetensorsFile(path)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        ".model.safetensors",
        "model.bin",
        "model.safetensors\0",
        "x" * 300 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_index_stays_inside_the_directory(name: Any, directory: Path) -> None:
    weight_map = shard(directory)
    update(directory / "model.safetensors.index.json", weight_map=weight_map | {"lm_head.weight": name})
    with pytest.raises(ModelFileError, match="not a file of this directory"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"lm_head.weight": "model-00003-of-00002.safetensors"}, r"the shard model-00003-of-00002.safetensors is miss"),
        ({"lm_head.weight": "model-00001-of-00002.safetensors"}, r"'lm_head.weight' is not in model-00001"),
        ({"ghost": "model-00001-of-00002.safetensors"}, "'ghost' is not in model-00001"),
    ],
)
def test_index_and_shards_agree(change: dict[str, str], fragment: str, directory: Path) -> None:
    weight_map = shard(directory)
    update(directory / "model.safetensors.index.json", weight_map=weight_map | change)
    with pytest.raises(ModelFileError, match=fragment):
        open_checkpoint(directory)


def test_a_tensor_in_two_shards(directory: Path) -> None:
    weight_map = shard(directory)
    first = directory / "model-00001-of-00002.safetensors"
    update(directory / "model.safetensors.index.json", weight_map=weight_map | {"copy": "copy.safetensors"})
    (directory / "copy.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(ModelFileError, match="occurs twice"):
        open_checkpoint(directory)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1, "a": 2}', '{"a": ' + "9" * 5000 + "}", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_malformed_json(name: str, content: str, directory: Path) -> None:
    (directory / name).write_text(content)
    with pytest.raises(ModelFileError, match=rf"tiny: {name} "):
        read_everything(directory)


def test_json_files_have_a_size_limit(directory: Path) -> None:
    with (directory / "config.json").open("ab") as stream:
        stream.truncate(1 << 30)  # sparse: reading it all would show
    with pytest.raises(ModelFileError, match=r"config.json is larger than 4 MiB"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": "257"},
        {"eos_token_id": [257, -1]},
        {"eos_token_id": [True]},
        {"bos_token_id": 1 << 40},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -1},
    ],
)
def test_malformed_generation_config(changes: dict[str, Any], directory: Path) -> None:
    update(directory / "generation_config.json", **changes)
    with pytest.raises(ModelFileError, match=next(iter(changes))):
        _ = open_checkpoint(directory).generation


def test_what_we_would_misread_is_refused(directory: Path) -> None:
    update(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantized weights .*gptq"):
        open_checkpoint(directory)


def test_no_tokenizer_no_weights(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    checkpoint = open_checkpoint(directory)
    with pytest.raises(ModelFileError, match=r"there is no tokenizer.json"):
        _ = checkpoint.tokenizer
    with pytest.raises(ModelFileError, match="'nothing' is missing"):
        checkpoint.tensor("nothing")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"there is no model.safetensors"):
        open_checkpoint(directory)


def read_everything(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensor_names():
        checkpoint.tensor(name)
    _ = checkpoint.generation, checkpoint.tokenizer, checkpoint.chat_template, checkpoint.digest()
    return checkpoint


@settings(max_examples=80, deadline=None)
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_parse_or_are_refused(fuzzed: tuple[Path, bytes, int], flips: list[tuple[float, int]]) -> None:
    path, valid, header = fuzzed
    content = bytearray(valid)
    for place, mask in flips:
        content[int(place * (header - 1))] ^= mask
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").write_bytes(content)
    try:
        read_everything(path)
    except ModelError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal
    assert str(path) not in refusal


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A directory, its valid model.safetensors, and the size of the header."""
    path = write_directory(TINY_MODELS["llama"], tmp_path_factory.mktemp("fuzz"))
    content = (path / "model.safetensors").read_bytes()
    return path, content, 8 + struct.unpack_from("<Q", content)[0]
