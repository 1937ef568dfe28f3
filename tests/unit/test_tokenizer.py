"""Ids and texts of both kinds of vocabulary, against programs that share no code with ours (goldens)."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_sources import BOS, CORPUS, EOS, SENTENCEPIECE, SPLITS, byte_level, sentencepiece

from setpoint.errors import RequestError
from setpoint.text.pre_tokenizers import PRE_TOKENIZERS
from setpoint.text.tokenizer import Tokenizer, load_tokenizer

ALIASES = {
    "starcoder": "smollm",
    "refact": "smollm",
    "codeshell": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "": "default",
}
BYTES = load_tokenizer(byte_level())
PREFIXED = load_tokenizer(sentencepiece("with_prefix"))
PIECES = load_tokenizer(sentencepiece("without_prefix"))
ALL = pytest.mark.parametrize("tokenizer", [BYTES, PREFIXED, PIECES], ids=["bytes", "prefixed", "pieces"])


def is_plain(text: str, kind: str) -> bool:
    """Free of what we read as llama.cpp does and SentencePiece does not.

    That is special tokens written in a text, and the space before the text that follows an added token.
    """
    added = ("<s>", "</s>", "<unk>") + (("<b>", "</b>") if kind == "with_prefix" else ())
    return not any(token in text for token in added)


@pytest.mark.parametrize("pre", [*SPLITS["ids"], *ALIASES])
def test_ids_of_every_splitting_rule(pre: str) -> None:
    tokenizer = load_tokenizer(byte_level(pre=pre))
    expected = SPLITS["ids"][ALIASES.get(pre, pre)]
    assert [tokenizer.encode(text) for text in CORPUS] == expected


def test_qwen2_composes_characters_and_then_splits_like_its_distillations() -> None:
    qwen2, plain = (load_tokenizer(byte_level(pre=pre)) for pre in ("qwen2", "deepseek-r1-qwen"))
    for text in CORPUS:
        assert qwen2.encode(text) == plain.encode(unicodedata.normalize("NFC", text))


def test_no_splitting_rule_is_untested() -> None:
    assert PRE_TOKENIZERS.keys() == (SPLITS["ids"].keys() | ALIASES.keys() | {"qwen2"}) - {""}


def test_whole_words_are_looked_up_before_they_are_merged() -> None:
    """tiktoken's rule, for vocabularies with words that no sequence of merges reaches."""
    unreachable = {"tokens": [*SPLITS["tokens"], "qzxj"], "token_types": None, "bos_id": None, "eos_id": None}
    found, merged = (load_tokenizer(byte_level(pre=pre, **unreachable)) for pre in ("llama-bpe", "smaug-bpe"))
    assert found.encode("qzxj") == [BOS]
    assert len(merged.encode("qzxj")) == 4


@pytest.mark.parametrize(("tokenizer", "kind"), [(PREFIXED, "with_prefix"), (PIECES, "without_prefix")])
def test_ids_and_texts_of_sentencepiece(tokenizer: Tokenizer, kind: str) -> None:
    golden = SENTENCEPIECE[kind]
    compared = 0
    for text, ids, decoded in zip(CORPUS, golden["ids"], golden["decoded"], strict=True):
        if is_plain(text, kind):
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text
            assert tokenizer.decode(ids) == decoded
            compared += 1
    assert compared >= len(CORPUS) - 3


def test_special_tokens_in_a_text_are_read_as_such() -> None:
    assert BYTES.encode("<|bos|>hi<|end|>") == [BOS, *BYTES.encode("hi"), EOS]
    assert PIECES.encode("<s>hi</s>", add_special_tokens=False) == [1, *PIECES.encode("hi")[1:], 2]
    assert BYTES.special_ids == {BOS, EOS}
    assert PIECES.special_ids == {0, 1, 2}


def test_user_defined_tokens_are_matched_verbatim_and_are_not_special() -> None:
    tool = PIECES.token_to_id("<|tool|>")
    assert tool is not None
    assert tool in PIECES.encode("x<|tool|>y")
    assert tool not in PIECES.special_ids
    assert PIECES.decode([tool]) == "<|tool|>"


def test_texts_are_framed_as_the_file_asks() -> None:
    assert PREFIXED.encode("")[0] == 1  # SentencePiece models start with <s> unless told otherwise
    assert BYTES.encode("hi") == BYTES.encode("hi", add_special_tokens=False)
    framed = load_tokenizer(byte_level(add_bos=True, add_eos=True))
    assert framed.encode("hi") == [BOS, *BYTES.encode("hi"), EOS]
    assert framed.encode("") == [BOS, EOS]
    assert load_tokenizer(byte_level(pre="llama-bpe", add_bos=None)).encode("") == [BOS]


def test_the_text_after_an_added_token_gets_its_own_space() -> None:
    """As llama.cpp and Hugging Face's `legacy` do for models that put a space before a text."""
    tool, word = PREFIXED.token_to_id("<|tool|>"), PREFIXED.encode("hi", add_special_tokens=False)
    assert PREFIXED.encode("hi<|tool|>hi<s>hi", add_special_tokens=False) == [*word, tool, *word, 1, *word]


def test_special_tokens_are_skipped_or_kept() -> None:
    ids = BYTES.encode("<|bos|>hi<|end|>")
    assert BYTES.decode(ids) == "hi"
    assert BYTES.decode(ids, skip_special_tokens=False) == "<|bos|>hi<|end|>"


def test_the_space_before_a_text_is_dropped_once() -> None:
    ids = PREFIXED.encode(" two  spaces")
    assert PREFIXED.decode(ids) == " two  spaces"
    assert PREFIXED.decode(ids, continuation=True) == "  two  spaces"
    assert PREFIXED.decode(ids, skip_special_tokens=False) == "<s>  two  spaces"


def test_the_ends_of_generation_are_joined() -> None:
    assert load_tokenizer(byte_level(), eos_token_ids=[7]).eos_token_ids == {7, EOS}
    assert BYTES.bos_token_id == BOS


@ALL
def test_names_of_tokens(tokenizer: Tokenizer) -> None:
    for i in range(tokenizer.vocab_size):
        token = tokenizer.id_to_token(i)
        assert token is not None
        assert tokenizer.token_to_id(token) == i
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.token_to_id("\ud800") is None


@ALL
@pytest.mark.parametrize("token_id", [-1, 10**6, 2**31, 2**63, 2**70])
def test_ids_without_a_token_give_nothing(tokenizer: Tokenizer, token_id: int) -> None:
    assert tokenizer.id_to_token(token_id) is None
    assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([token_id]) == ""


@ALL
@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80" * 3])
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode(text)


@settings(max_examples=40)
@given(st.text())
def test_any_text_survives_the_round_trip(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text), skip_special_tokens=False) == text
    for tokenizer in (PREFIXED, PIECES):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


@settings(max_examples=40)
@given(st.lists(st.integers(0, 899)))
def test_a_text_is_the_bytes_of_its_tokens(ids: list[int]) -> None:
    for tokenizer in (BYTES, PIECES):
        joined = b"".join(tokenizer.token_bytes(i) for i in ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == joined.decode("utf-8", "replace")


def test_byte_tokens_are_bytes() -> None:
    assert [PIECES.token_bytes(3 + 3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert sorted(BYTES.token_bytes(i) for i in range(256)) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("unit", ["a", " ", "<|", "e\u0301", "\n", "A1"])
def test_long_words_are_encoded(unit: str) -> None:
    text = unit * (20_000 // len(unit))
    for tokenizer in (BYTES, PIECES):
        assert tokenizer.decode(tokenizer.encode(text)) == text
