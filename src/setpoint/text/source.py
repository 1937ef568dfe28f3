"""Where a tokenizer comes from, as plain data: read by `loaders`, built by `text`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenizerFile:
    """A Hugging Face `tokenizer.json`, with `tokenizer_config.json` beside it ({} when there is none)."""

    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerMetadata:
    """The `tokenizer.ggml.*` fields of a GGUF file.

    `model` is 'gpt2' (byte-level BPE, uses `pre` and `merges`) or 'llama' (SentencePiece, uses `scores`).
    `scores` and `token_types` have one entry per token or are None; a token type is 1 normal, 2 unknown, 3 control,
    4 user-defined, 5 unused, 6 byte. Ids are checked to be below `len(tokens)`; None = the file does not say.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    scores: Sequence[float] | NDArray[np.float32] | None = None
    token_types: Sequence[int] | NDArray[Any] | None = None
    merges: Sequence[str] | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None


TokenizerSource = TokenizerFile | TokenizerMetadata
