"""A checkpoint: configuration, lazy tensors and tokenizer source, whatever the file format.

Names, shapes and configuration keys follow Hugging Face, so everything above this package knows one convention.
Every error in a file is a one-line `ModelFileError` that names the file (never its directory) and what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from setpoint.errors import UnsupportedModelError
from setpoint.text.source import TokenizerSource


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight as it is stored: `raw` is uint8 [rows, bytes_per_row], a read-only view of the file where possible.

    `shape` is row-major, (out, in); a 1-D tensor is one row. `format` is a key of `quant.formats.FORMATS`.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    raw: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the checkpoint's author recommends for generation; None (or empty) = not stated."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Checkpoint(Protocol):
    """An opened model. Raises `ModelFileError`, or `UnsupportedModelError` for a family or format we do not read."""

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json` keys (model_type, hidden_size, rope_theta, layer_types, ...), also for GGUF."""

    @property
    def generation(self) -> GenerationDefaults: ...

    @property
    def tokenizer(self) -> TokenizerSource: ...

    @property
    def chat_template(self) -> str | None: ...

    @property
    def name(self) -> str:
        """For display: the author's name for the model, else the file's."""

    @property
    def num_bytes(self) -> int:
        """Of the weight files; the weights take about as much memory."""

    def tensor_names(self) -> Sequence[str]:
        """Of the text model: what does not belong to it (a vision tower) is left out."""

    def has_tensor(self, name: str) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """The weight called `name` (Hugging Face name); `ModelFileError` when it is missing."""

    def digest(self) -> str:
        """A cheap identity for cache keys: sizes, modification times and a hash of the header. Not a content hash."""

    def read_ahead(self) -> None:
        """Ask the system to bring the files into memory, all at once; returns when it has been asked."""

    def close(self) -> None:
        """Release the files. Views handed out before stay valid until they are dropped."""


PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLE_ADVICE = "loading it would run code from the file; use the model's safetensors or GGUF files instead"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.gguf` file (any part of a split one) or a Hugging Face directory.

    Raises ModelNotFoundError, ModelFileError, or UnsupportedModelError with the remedy.
    """
    from setpoint.loaders.gguf_checkpoint import GGUFCheckpoint
    from setpoint.loaders.safetensors import SafetensorsCheckpoint

    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsupportedModelError(f"{path.name} is a pickle file: {PICKLE_ADVICE}")
    if path.suffix.lower() == ".safetensors":
        raise UnsupportedModelError(f"{path.name}: give the directory that holds it and its config.json")
    return GGUFCheckpoint(path)
