"""The `tokenizer.ggml.*` and `general.sampling.*` metadata of a GGUF file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from setpoint.errors import UnsupportedModelError
from setpoint.loaders.checkpoint import GenerationDefaults
from setpoint.loaders.gguf import GGUFArray, GGUFFile
from setpoint.loaders.gguf_config import Fields
from setpoint.text.source import TokenizerMetadata

MODELS = ("gpt2", "llama")
UNSET_ID = (1 << 32) - 1  # some converters store -1 for "no such token"
CONTROL = 3  # token type

# Control tokens that end a turn or a document: many files name only one of them as the end-of-sequence token.
END_OF_GENERATION = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"}
)


def read_tokenizer(file: GGUFFile, vocab_size: int) -> TokenizerMetadata:
    """Lists are as long as `tokens`, ids are below `vocab_size`; raises ModelFileError or UnsupportedModelError."""
    fields = Fields(file, "tokenizer.ggml.")
    model = fields.text("model")
    if model not in MODELS:
        raise UnsupportedModelError(
            f"{file.name}: tokenizer {model[:64]!r} is not supported; supported: {', '.join(MODELS)}"
        )
    tokens_array = _array(fields, "tokens")
    if tokens_array is None:
        file.fail("metadata 'tokenizer.ggml.tokens' is missing")
    if not 0 < len(tokens_array) <= vocab_size:
        file.fail(f"'tokenizer.ggml.tokens' has {len(tokens_array)} entries; the embedding has {vocab_size} rows")
    merges = _array(fields, "merges")
    if merges is None and model == "gpt2":
        file.fail("metadata 'tokenizer.ggml.merges' is missing; convert the model again")
    return TokenizerMetadata(
        model=model,
        pre=fields.text("pre", default="default"),
        tokens=tokens_array.strings(),
        scores=_per_token(fields, "scores", len(tokens_array)),
        token_types=_per_token(fields, "token_type", len(tokens_array)),
        merges=None if merges is None else merges.strings(),
        bos_id=_token_id(fields, "bos_token_id", len(tokens_array)),
        eos_id=_token_id(fields, "eos_token_id", len(tokens_array)),
        unk_id=_token_id(fields, "unknown_token_id", len(tokens_array)),
        pad_id=_token_id(fields, "padding_token_id", len(tokens_array)),
        add_bos=fields.flag("add_bos_token"),
        add_eos=fields.flag("add_eos_token"),
        add_space_prefix=fields.flag("add_space_prefix"),
    )


def read_generation(file: GGUFFile, tokenizer: TokenizerMetadata) -> GenerationDefaults:
    fields = Fields(file, "tokenizer.ggml.")
    ends = [tokenizer.eos_id]
    ends += [_token_id(fields, key, len(tokenizer.tokens)) for key in ("eot_token_id", "eom_token_id")]
    if tokenizer.token_types is not None:
        controls = np.flatnonzero(np.asarray(tokenizer.token_types) == CONTROL).tolist()
        ends += [index for index in controls if tokenizer.tokens[index] in END_OF_GENERATION]
    sampling = Fields(file, "general.sampling.")

    def number(key: str, high: float) -> float | None:
        return None if sampling.get(key) is None else sampling.number(key, 0.0, high)

    return GenerationDefaults(
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        temperature=number("temp", 1e3),
        top_k=None if sampling.get("top_k") is None else sampling.integer("top_k", 0, 1 << 31),
        top_p=number("top_p", 1.0),
        min_p=number("min_p", 1.0),
        repetition_penalty=number("penalty_repeat", 1e3),
    )


def read_chat_template(file: GGUFFile) -> str | None:
    key = "tokenizer.chat_template"
    return Fields(file).text(key) if key in file.metadata else None


def _array(fields: Fields, key: str) -> GGUFArray | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, GGUFArray):
        fields.file.fail(f"metadata '{fields.prefix}{key}' must be an array")
    return value


def _per_token(fields: Fields, key: str, num_tokens: int) -> NDArray[Any] | None:
    array = _array(fields, key)
    if array is None:
        return None
    if len(array) != num_tokens:
        fields.file.fail(f"metadata '{fields.prefix}{key}' has {len(array)} entries for {num_tokens} tokens")
    return array.numbers()


def _token_id(fields: Fields, key: str, num_tokens: int) -> int | None:
    if fields.get(key) in (None, UNSET_ID):
        return None
    return fields.integer(key, 0, num_tokens - 1)
