"""Our byte-pair encoding of SentencePiece vocabularies against the `tokenizers` library, which gets every merge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_sources import CORPUS, SENTENCEPIECE, recover_merges, sentencepiece
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE

from setpoint import _native
from setpoint.text.tokenizer import load_tokenizer


def library(
    tokens: list[str], scores: list[float], added: list[int], mergeable: list[bool], unknown: int | None, prefix: bool
) -> Tokenizer:
    pieces = {token: score for token, score, merges in zip(tokens, scores, mergeable, strict=True) if merges}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    name = None if unknown is None else tokens[unknown]
    model = BPE(vocab=vocabulary, merges=recover_merges(pieces), unk_token=name, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    escape = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape]) if prefix else escape
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i in added])
    return tokenizer


def ours(
    tokens: list[str], scores: list[float], added: list[int], mergeable: list[bool], unknown: int | None, prefix: bool
) -> _native.SentencePiece:
    arrays = np.array(scores, np.float32), np.array(mergeable, np.uint8), np.array(added, np.int32)
    return _native.SentencePiece(tokens, *arrays, unknown, prefix)


@pytest.mark.parametrize("kind", ["with_prefix", "without_prefix"])
def test_the_corpus_is_encoded_as_by_the_library(kind: str) -> None:
    golden = SENTENCEPIECE[kind]
    types = golden["token_types"]
    added = [i for i, token_type in enumerate(types) if token_type in (2, 3, 4)]
    mergeable = [token_type not in (2, 3, 4, 6) for token_type in types]
    reference = library(golden["tokens"], golden["scores"], added, mergeable, 0, kind == "with_prefix")
    tokenizer = load_tokenizer(sentencepiece(kind))
    for text in [*CORPUS, "<s>after", "in</s>side <unk>", " ".join(CORPUS)]:
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False).ids


TEXT = st.text(alphabet="aaabbc é▁🙂<", max_size=24)


@settings(max_examples=400)
@given(
    pieces=st.lists(st.text(alphabet="aaabbc▁é", min_size=1, max_size=5), unique=True, min_size=1, max_size=40),
    scores=st.lists(st.integers(-6, 0), min_size=60, max_size=60),  # many equal scores
    added=st.sets(st.integers(0, 12), max_size=4),
    every_byte=st.booleans(),
    prefix=st.booleans(),
    texts=st.lists(TEXT, min_size=1, max_size=6),
)
def test_any_vocabulary_is_encoded_as_by_the_library(
    pieces: list[str], scores: list[int], added: set[int], every_byte: bool, prefix: bool, texts: list[str]
) -> None:
    tokens = ["<unk>", *pieces, *([f"<0x{byte:02X}>" for byte in range(256)] if every_byte else [])]
    rank = [float(scores[i % 60]) for i in range(len(tokens))]
    chosen = sorted(i for i in added if i <= len(pieces))
    mergeable = [0 < i <= len(pieces) and i not in chosen for i in range(len(tokens))]
    arguments = tokens, rank, chosen, mergeable, 0, prefix
    reference, encoder = library(*arguments), ours(*arguments)
    for text in texts:
        assert encoder.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_ids_and_tokens_are_one_table() -> None:
    encoder = ours(["<unk>", "é", "x"], [0.0] * 3, [], [True] * 3, 0, False)
    assert [encoder.id_to_token(i) for i in (-1, 0, 1, 2, 3, 2**40)] == [None, "<unk>", "é", "x", None, None]
    assert [encoder.token_to_id(token) for token in ("é", "x", "", "y")] == [1, 2, None, None]


@pytest.mark.parametrize(
    ("tokens", "scores", "mergeable", "added", "unknown"),
    [
        (["a", "a"], 2, 2, [], None),
        (["a", "b"], 1, 2, [], None),
        (["a", "b"], 2, 3, [], None),
        (["a", "b"], 2, 2, [2], None),
        (["a", "b"], 2, 2, [-1], None),
        (["a", "b"], 2, 2, [], 2),
        (["a", "b"], 2, 2, [], -2),
    ],
)
def test_contradictions_are_refused(
    tokens: list[str], scores: int, mergeable: int, added: list[int], unknown: int | None
) -> None:
    with pytest.raises(ValueError, match="token"):
        ours(tokens, [0.0] * scores, added, [True] * mergeable, unknown, False)


def test_a_long_text_of_one_letter_takes_no_longer_than_its_length_asks() -> None:
    """Every merge makes the next one; a text of a million letters must not take their square."""
    tokens = ["a" * n for n in range(1, 200)]
    encoder = ours(tokens, [float(-n) for n in range(1, 200)], [], [True] * 199, None, False)
    ids = encoder.encode("a" * 1_000_000)
    assert sum(len(tokens[i]) for i in ids) == 1_000_000


def test_string_arrays_end_where_the_bytes_do() -> None:
    def stored(*texts: bytes) -> np.ndarray:
        return np.frombuffer(b"".join(len(t).to_bytes(8, "little") + t for t in texts), np.uint8)

    whole = stored(b"ab", b"", "é".encode())
    assert _native.skip_strings(whole, 0, 3) == (3, whole.size)
    assert _native.read_strings(whole, 0, 3) == ["ab", "", "é"]
    assert _native.skip_strings(whole, 0, 4)[0] == 3
    assert _native.skip_strings(whole[:-1], 0, 3)[0] == 2
    assert _native.skip_strings(whole, 2**63, 1)[0] == 0
    huge = np.frombuffer((2**64 - 1).to_bytes(8, "little") + b"x", np.uint8)
    assert _native.skip_strings(huge, 0, 1)[0] == 0
    assert _native.read_strings(stored(b"ok", b"\xff", b"no"), 0, 3) == ["ok"]
