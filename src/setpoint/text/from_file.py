"""Build a tokenizer from a Hugging Face `tokenizer.json`.

The `tokenizers` library reads the file; before and after it we check what it does not (sizes, ids, how much its rules
may blow a text up) and find out how its tokens become bytes, which is what its decoder section says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.text.source import TokenizerFile
from setpoint.text.token_bytes import (
    SPACE,
    TokenToBytes,
    byte_level_bytes,
    sentencepiece_bytes,
    spaced_bytes,
)
from setpoint.text.vocabulary import (
    MAX_MERGES,
    MAX_TOKENS,
    LibraryEncoder,
    Vocabulary,
    check_added_tokens,
    checked_lengths,
    longest_in_bytes,
)

MAX_FILE_BYTES = 128 << 20  # Gemma 3: 33 MB
MAX_GROWTH = 4096  # how many times longer the replacement rules may make a text
MAX_FRAME_TOKENS = 64


def build_from_file(source: TokenizerFile) -> Vocabulary:
    """Raises ModelFileError for a malformed file, UnsupportedModelError for a kind of tokenizer we do not decode."""
    content = _read(source)
    document = json.loads(content)
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ModelFileError("tokenizer.json: no tokenizer model in it")
    _check_model(document["model"])
    added = document.get("added_tokens") or []
    check_added_tokens(len(added))
    _check_growth(document)
    to_bytes, space_prefix = _read_decoder(document.get("decoder"))

    native = Tokenizer.from_buffer(content)
    native.no_truncation()
    native.no_padding()
    for token in added:
        if native.token_to_id(token["content"]) != token["id"]:
            raise ModelFileError(f"tokenizer.json: added token {token['id']} contradicts the vocabulary")
    special = frozenset(int(token["id"]) for token in added if token.get("special"))
    bos_id = _named_token(native, source.settings, "bos_token")
    eos_id = _named_token(native, source.settings, "eos_token")
    prefix, suffix = _frame(native)
    prefix = _with_setting(prefix, bos_id, source.settings.get("add_bos_token"))
    suffix = _with_setting(suffix, eos_id, source.settings.get("add_eos_token"))
    return Vocabulary(
        native=LibraryEncoder(native),
        longest_token=longest_in_bytes(native.get_vocab(with_added_tokens=True)),
        size=1 + max(native.get_vocab(with_added_tokens=True).values()),
        to_bytes=to_bytes,
        special_ids=special | {i for i in (bos_id, eos_id) if i is not None},
        # In a byte-level vocabulary added tokens are not written in its alphabet; in the others only ▁ is special.
        verbatim_ids=frozenset(int(t["id"]) for t in added) if to_bytes is byte_level_bytes else special,
        bos_id=bos_id,
        eos_id=eos_id,
        prefix_ids=prefix,
        suffix_ids=suffix,
        space_prefix=space_prefix,
    )


def _read(source: TokenizerFile) -> bytes:
    try:
        with source.path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ModelFileError(f"tokenizer.json cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ModelFileError(f"tokenizer.json is larger than {MAX_FILE_BYTES >> 20} MiB")
    return content


def _check_model(model: Mapping[str, Any]) -> None:
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise UnsupportedModelError(f"tokenizer.json holds a {str(kind)[:64]!r} model; the supported one is BPE")
    vocabulary = model["vocab"]
    checked_lengths(vocabulary)
    ids = set(vocabulary.values())
    if len(ids) != len(vocabulary):
        raise ModelFileError("tokenizer.json: two tokens share one id")
    if not all(type(i) is int and 0 <= i < MAX_TOKENS for i in ids):
        raise ModelFileError(f"tokenizer.json: a token id is not a whole number below {MAX_TOKENS}")
    if len(model["merges"]) > MAX_MERGES:
        raise ModelFileError(f"tokenizer.json: {len(model['merges'])} merges (at most {MAX_MERGES})")


def _steps(component: Any) -> Iterator[Mapping[str, Any]]:
    """A component of the file, or the components of a sequence of them."""
    if not isinstance(component, dict):
        return
    inner = next((component[key] for key in ("normalizers", "pretokenizers", "decoders") if key in component), None)
    if component.get("type") == "Sequence" and isinstance(inner, list):
        for step in inner:
            yield from _steps(step)
    else:
        yield component


def _check_growth(document: Mapping[str, Any]) -> None:
    growth = 1
    for step in _steps(document.get("normalizer")):
        growth *= 1 + len(str(step.get("content", ""))) if step.get("type") == "Replace" else 1
        growth += len(str(step.get("prepend", "")))
        if growth > MAX_GROWTH:
            raise ModelFileError("tokenizer.json: its replacement rules make a text much longer")


def _read_decoder(decoder: Any) -> tuple[TokenToBytes, bool]:
    """How one token becomes bytes, and whether a leading space is dropped."""
    steps = {str(step.get("type")): step for step in _steps(decoder)}
    replace, strip, metaspace = steps.get("Replace"), steps.get("Strip"), steps.get("Metaspace")
    exact = (
        (replace is None or (replace["pattern"] == {"String": SPACE} and replace["content"] == " "))
        and (strip is None or (strip["content"] == " " and strip["start"] == 1 and strip["stop"] == 0))
        and (metaspace is None or metaspace["replacement"] == SPACE)
    )
    if exact and steps.keys() <= {"ByteLevel", "Fuse"} and "ByteLevel" in steps:
        return byte_level_bytes, False
    if exact and steps.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (replace or metaspace):
        prepends = metaspace is not None and metaspace.get("prepend_scheme", "always") != "never"
        return (sentencepiece_bytes if "ByteFallback" in steps else spaced_bytes), strip is not None or prepends
    raise UnsupportedModelError(f"tokenizer.json decodes by {sorted(steps)}, which we cannot do token by token")


def _named_token(native: Tokenizer, settings: Mapping[str, Any], name: str) -> int | None:
    token = settings.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    return native.token_to_id(text) if isinstance(text, str) else None


def _frame(native: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the file's post-processor puts before and after a text."""
    for probe in ("a", "0", " ", ""):
        framed = native.encode(probe, add_special_tokens=True).ids
        body = native.encode(probe, add_special_tokens=False).ids
        if body:
            break
    if len(framed) > len(body) + MAX_FRAME_TOKENS:
        raise ModelFileError("tokenizer.json: its post-processor adds too many tokens")
    for at in range(len(framed) - len(body) + 1):
        if framed[at : at + len(body)] == body:
            # An empty body (no probe is in the vocabulary) leaves everything in front.
            return (tuple(framed[:at]), tuple(framed[at + len(body) :])) if body else (tuple(framed), ())
    raise ModelFileError("tokenizer.json: its post-processor changes the text's own tokens")


def _with_setting(frame: tuple[int, ...], token_id: int | None, wanted: Any) -> tuple[int, ...]:
    """`add_bos_token` and `add_eos_token` of tokenizer_config.json overrule the post-processor."""
    if token_id is None or not isinstance(wanted, bool) or wanted == (token_id in frame):
        return frame
    return (*frame, token_id) if wanted else tuple(i for i in frame if i != token_id)
