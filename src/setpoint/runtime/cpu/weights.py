"""Tensors of a checkpoint, checked and turned into what a program takes: packed weights and float vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from setpoint import _native
from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.loaders.checkpoint import Checkpoint, Tensor
from setpoint.quant.formats import dequantize

DERIVED = ".rotary_emb.inv_freq"  # buffers that old checkpoints hold; the config says the same


class WeightReader:
    """`as_float`: matrices become float32 (the reference program); otherwise they keep their stored codes."""

    def __init__(self, checkpoint: Checkpoint, *, as_float: bool) -> None:
        self._checkpoint = checkpoint
        self._pack = _native.Weight.pack_dequantized if as_float else _native.Weight.pack
        self.num_bytes = 0  # packed so far: what a step reads
        self._names: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises ModelFileError when the tensor is missing or has another shape."""
        tensor = self._checkpoint.tensor(name)
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
        try:
            weight = self._pack(tensor.format, np.ascontiguousarray(tensor.raw), in_features)
        except ValueError as error:
            raise ModelFileError(f"tensor '{name}': {error}") from error
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
