"""Tensors of a checkpoint, checked and turned into what a program takes: packed weights and float vectors."""

from __future__ import annotations

import contextlib

import numpy as np
from numpy.typing import NDArray

from setpoint import _native
from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.loaders.checkpoint import Checkpoint, Tensor
from setpoint.quant.formats import dequantize

SHORTLIST_LINES = 1 << 20
DERIVED = ".rotary_emb.inv_freq"  # buffers that old checkpoints hold; the config says the same


class WeightReader:
    """`as_float`: matrices become float32 (the reference program); otherwise they keep their stored codes.

    Matrices get their places in `store` and are packed later; until then `sources` must live.
    """

    def __init__(self, checkpoint: Checkpoint, *, as_float: bool) -> None:
        self._checkpoint = checkpoint
        self._as_float = as_float
        self._tensors: dict[str, Tensor] = {}
        self.store = _native.WeightStore(self._room())
        self.sources: list[object] = []
        self.num_bytes = 0  # of the weights so far: what a step reads
        self._names: set[str] = set()

    def _room(self) -> int:
        """Bytes of all matrices and of a shortlist of the largest (smaller than that, but for a few lines).

        A matrix that cannot be packed is an error when it is asked for.
        """
        room = largest = 0
        for name in self._checkpoint.tensor_names():
            tensor = self._tensors[name] = self._checkpoint.tensor(name)
            if len(tensor.shape) == 2:
                with contextlib.suppress(ValueError):
                    size = _native.packed_room(tensor.format, *tensor.shape, self._as_float)
                    room, largest = room + size, max(largest, size)
        return room + largest + SHORTLIST_LINES

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises ModelFileError when the tensor is missing or has another shape."""
        tensor = self._tensors[name] if name in self._tensors else self._checkpoint.tensor(name)
        self._names.add(name)
        if tensor.shape != shape:
            raise ModelFileError(f"tensor '{name}' is {list(tensor.shape)}, the config asks for {list(shape)}")
        return tensor

    def check_all_read(self, *unneeded: str) -> None:
        """Raises UnsupportedModelError for a tensor that nobody asked for: the mathematics would lack it."""
        for name in self._checkpoint.tensor_names():
            if name not in self._names and name not in unneeded and not name.endswith(DERIVED):
                raise UnsupportedModelError(f"tensor {name[:80]!r} is not part of this model family as it is supported")

    def matrix(self, name: str, out_features: int, in_features: int) -> _native.Weight:
        tensor = self.tensor(name, (out_features, in_features))
        raw = np.ascontiguousarray(tensor.raw)
        try:
            weight = self.store.add([(tensor.format, raw)], in_features, self._as_float)
        except ValueError as error:
            raise ModelFileError(f"tensor '{name}': {error}") from error
        self.sources.append(raw)
        self.num_bytes += weight.nbytes
        return weight

    def vector(self, name: str, size: int) -> NDArray[np.float32]:
        tensor = self.tensor(name, (size,))
        try:
            values = dequantize(tensor.format, np.atleast_2d(tensor.raw)).reshape(-1)
        except ValueError as error:
            raise ModelFileError(f"tensor '{name}': {error}") from error
        if values.size != size:
            raise ModelFileError(f"tensor '{name}' holds {values.size} values instead of {size}")
        self.num_bytes += values.nbytes
        return np.ascontiguousarray(values)
