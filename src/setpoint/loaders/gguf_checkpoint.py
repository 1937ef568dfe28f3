"""A GGUF model as a `Checkpoint`: Hugging Face names, row order and configuration over the mapped parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from setpoint.errors import UnsupportedModelError
from setpoint.loaders import gguf_names, gguf_tokenizer
from setpoint.loaders.checkpoint import GenerationDefaults, Tensor
from setpoint.loaders.gguf import GGUFFile, TensorEntry
from setpoint.loaders.gguf_config import Fields, build_config
from setpoint.loaders.mapped import quote
from setpoint.loaders.split import open_parts
from setpoint.quant.formats import dequantize
from setpoint.text.source import TokenizerMetadata

FLOATS = ("F32", "F16", "BF16")


class GGUFCheckpoint:
    """See `Checkpoint`. Opening reads the header only; the vocabulary is read when `tokenizer` is first asked for."""

    def __init__(self, path: Path) -> None:
        self._parts = open_parts(path)
        try:
            self._first = self._parts[0]
            self._entries = {name: entry for part in self._parts for name, entry in part.tensors.items()}
            self._part_of = {name: part for part in self._parts for name in part.tensors}
            self._architecture = gguf_names.find_architecture(Fields(self._first).text("general.architecture"))
            self._config = build_config(self._architecture, self._first, self._entries, self._rope_factors())
            self._stored = self._translate_names()
            self.chat_template = gguf_tokenizer.read_chat_template(self._first)
            self.name = _display_name(self._first)
        except BaseException:
            self.close()
            raise

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @cached_property
    def tokenizer(self) -> TokenizerMetadata:
        return gguf_tokenizer.read_tokenizer(self._first, self._config["vocab_size"])

    @cached_property
    def generation(self) -> GenerationDefaults:
        return gguf_tokenizer.read_generation(self._first, self.tokenizer)

    @property
    def num_bytes(self) -> int:
        return sum(part.size for part in self._parts)

    def tensor_names(self) -> Sequence[str]:
        return list(self._stored)

    def has_tensor(self, name: str) -> bool:
        return name in self._stored

    def tensor(self, name: str) -> Tensor:
        if name not in self._stored:
            self._first.fail(f"the tensor {quote(name)} is missing")
        stored = self._stored[name]
        entry = self._entries[stored]
        raw = self._part_of[stored].raw(entry)
        if gguf_names.is_permuted(self._architecture, stored):
            return self._unpermuted(name, entry, raw)
        if gguf_names.is_offset_norm(self._architecture, stored):
            weight = self._floats(entry, raw) - np.float32(1.0)
            return Tensor(name, entry.shape, "F32", weight.view(np.uint8))
        return Tensor(name, entry.shape, entry.format, raw)

    def digest(self) -> str:
        return hashlib.sha256("".join(part.digest() for part in self._parts).encode()).hexdigest()

    def read_ahead(self) -> None:
        for part in self._parts:
            part.read_ahead()

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _translate_names(self) -> dict[str, str]:
        """Hugging Face name -> GGUF name. A tensor we cannot place would be left out of the mathematics: an error."""
        translated = gguf_names.hugging_face_names(self._architecture, self._config["num_hidden_layers"])
        for name in self._entries:
            if name not in translated and not gguf_names.is_derived(name):
                raise UnsupportedModelError(
                    f"{self._first.name}: tensor {quote(name)} is not part of the architecture"
                    f" '{self._architecture.name}' as it is supported"
                )
        return {theirs: ours for ours, theirs in translated.items() if ours in self._entries}

    def _unpermuted(self, name: str, entry: TensorEntry, raw: NDArray[np.uint8]) -> Tensor:
        """Rows of a weight, or the elements of a bias (then F32), from pairs to halves."""
        weight_format, is_bias = entry.format, len(entry.shape) == 1
        if is_bias:
            weight_format, raw = "F32", self._floats(entry, raw).reshape(-1, 1).view(np.uint8)
        heads: int = self._config["num_attention_heads" if ".attn_q." in entry.name else "num_key_value_heads"]
        head_dim = self._config["head_dim"]
        if len(raw) != heads * head_dim or head_dim % 2:
            self._first.fail(
                f"tensor {quote(entry.name)} has {len(raw)} rows; expected {heads * head_dim}, an even number a head"
            )
        halves = gguf_names.pairs_to_halves(raw, heads)
        return Tensor(name, entry.shape, weight_format, halves.reshape(1, -1) if is_bias else halves)

    def _floats(self, entry: TensorEntry, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
        if entry.format not in FLOATS:
            self._first.fail(f"tensor {quote(entry.name)} has the format {entry.format}; expected one of {FLOATS}")
        return dequantize(entry.format, raw)

    def _rope_factors(self) -> NDArray[np.float32] | None:
        entry = self._entries.get("rope_freqs.weight")
        if entry is None:
            return None
        return self._floats(entry, self._part_of[entry.name].raw(entry)).reshape(-1)


def _display_name(file: GGUFFile) -> str:
    stated = file.metadata.get("general.name")
    if isinstance(stated, str) and stated.isprintable() and 0 < len(stated.strip()) <= 200:
        return stated.strip()
    return file.path.stem
