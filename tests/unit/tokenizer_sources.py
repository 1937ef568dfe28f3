"""Small vocabularies for tests, from the goldens that other tokenizer programs made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from setpoint.text.source import TokenizerMetadata

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
CORPUS: list[str] = json.loads((Path(__file__).parent / "data" / "tokenizer_corpus.json").read_text())
SPLITS: dict[str, Any] = json.loads((GOLDENS / "tokenizer-splits.json").read_text())
SENTENCEPIECE: dict[str, Any] = json.loads((GOLDENS / "tokenizer-sentencepiece.json").read_text())
SPECIAL = ["<|bos|>", "<|end|>"]
BOS, EOS = (len(SPLITS["tokens"]) + i for i in range(2))


def byte_level(**changes: Any) -> TokenizerMetadata:
    """656 tokens: bytes, 400 merges, and two control tokens."""
    tokens = [*SPLITS["tokens"], *SPECIAL]
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_types": [1] * BOS + [3, 3],
        "merges": SPLITS["merges"],
        "bos_id": BOS,
        "eos_id": EOS,
        "add_bos": False,
    }
    return TokenizerMetadata(**{**fields, **changes})


def sentencepiece(kind: str, **changes: Any) -> TokenizerMetadata:
    """900 tokens; `kind` is with_prefix (as Llama 2) or without_prefix (as Gemma)."""
    golden = SENTENCEPIECE[kind]
    fields: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": golden["tokens"],
        "scores": golden["scores"],
        "token_types": golden["token_types"],
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 0,
        "add_space_prefix": kind == "with_prefix",
    }
    return TokenizerMetadata(**{**fields, **changes})


def recover_merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to cut a piece into two pieces, best score first, then the longest left part: what a file of the
    `tokenizers` library holds for a SentencePiece vocabulary."""
    return [
        (piece[:at], piece[at:])
        for piece in sorted(pieces, key=pieces.__getitem__, reverse=True)
        for at in range(len(piece) - 1, 0, -1)
        if piece[:at] in pieces and piece[at:] in pieces
    ]
