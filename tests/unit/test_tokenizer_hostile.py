"""Vocabularies that are wrong or hostile: a typed error, never a panic, whatever the fields (LD-3)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_sources import SENTENCEPIECE, SPLITS, byte_level, recover_merges, sentencepiece

from setpoint.errors import ModelError, ModelFileError, RequestError, UnsupportedModelError
from setpoint.text.source import TokenizerFile, TokenizerMetadata
from setpoint.text.tokenizer import load_tokenizer

TOKENS = SPLITS["tokens"]
PIECES = SENTENCEPIECE["without_prefix"]["tokens"]
NUM_PIECES = len(PIECES)


def with_piece(i: int, token: str, kind: int = 1) -> dict[str, Any]:
    types = list(SENTENCEPIECE["without_prefix"]["token_types"])
    types[i] = kind
    return {"tokens": [*PIECES[:i], token, *PIECES[i + 1 :]], "token_types": types}


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": []},
        {"tokens": ["a"] * 1_000_001},
        {"tokens": [*TOKENS, "a" * 65_537, "b"]},
        {"tokens": [*TOKENS, "dup", "dup"]},
        {"token_types": [1, 2, 3]},
        {"token_types": [1] * 10_000},
        {"merges": None},
        {"merges": []},
        {"merges": ["a"]},
        {"merges": [""]},
        {"merges": ["a nosuchtoken"]},
        {"merges": ["nosuchtoken a"]},
        {"merges": ["q z"]},  # the joined token is missing
        {"merges": ["e r e"]},
        {"bos_id": 10**6},
        {"eos_id": 658},
        {"unk_id": -1},
        {"bos_id": 2**40},
        {"add_bos": True, "bos_id": None},
        {"add_eos": True, "eos_id": None},
    ],
    ids=lambda changes: " ".join(f"{k}={str(v)[:20]}" for k, v in changes.items()),
)
def test_a_malformed_byte_level_vocabulary_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        load_tokenizer(byte_level(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": None},
        {"scores": [0.0]},
        {"scores": [0.0] * (NUM_PIECES + 1)},
        {"scores": [float("nan")] * NUM_PIECES},
        {"scores": [float("inf")] * NUM_PIECES},
        with_piece(100, "<0x-1>", 6),
        with_piece(100, "<0x100>", 6),
        with_piece(100, "<0xg0>", 6),
        with_piece(100, "<0x", 6),
        with_piece(100, "", 6),
        with_piece(100, "<0xZZ>", 6),
        with_piece(300, PIECES[301]),
        with_piece(300, "a" * 30_000),
        {**with_piece(200, "not a byte"), "unk_id": None},  # some texts could not be written
        {"bos_id": None},
    ],
)
def test_a_malformed_sentencepiece_vocabulary_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        load_tokenizer(sentencepiece("without_prefix", **changes))


def test_unknown_kinds_are_named_with_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'kimi-k2'.*llama-bpe.*smollm"):
        load_tokenizer(byte_level(pre="kimi-k2"))
    with pytest.raises(UnsupportedModelError, match=r"'bert'.*gpt2, llama"):
        load_tokenizer(byte_level(model="bert"))


def test_end_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ModelFileError, match="end token"):
        load_tokenizer(byte_level(), eos_token_ids=[10_000])


def test_empty_tokens_have_no_bytes_and_no_text_becomes_them() -> None:
    tokenizer = load_tokenizer(byte_level(tokens=[*TOKENS, "", ""], token_types=None, bos_id=None, eos_id=None))
    assert len(TOKENS) not in tokenizer.encode(f"[EMPTY_{len(TOKENS)}]")


def test_a_letter_named_as_the_end_stays_a_letter() -> None:
    letter = TOKENS.index("a")
    tokenizer = load_tokenizer(byte_level(eos_id=letter))
    assert letter not in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("banana")) == "banana"


def test_a_token_found_verbatim_is_not_longer_than_the_work_a_character_may_cost() -> None:
    load_tokenizer(sentencepiece("without_prefix", **with_piece(300, "a" * 1024, 4)))
    with pytest.raises(ModelFileError, match="1024"):
        load_tokenizer(sentencepiece("without_prefix", **with_piece(300, "a" * 1025, 4)))


FIELD = st.one_of(st.none(), st.integers(-(2**40), 2**40))


@settings(max_examples=40)
@given(
    tokens=st.lists(st.text(max_size=4), max_size=8),
    scores=st.lists(st.floats(width=32), max_size=8),
    types=st.lists(st.integers(-1, 7), max_size=8),
    merges=st.lists(st.text(max_size=5), max_size=8),
    ids=st.tuples(FIELD, FIELD, FIELD),
    model=st.sampled_from(["gpt2", "llama"]),
    pre=st.sampled_from(["", "gpt-2", "llama-bpe", "x"]),
)
def test_any_fields_give_a_tokenizer_or_a_typed_error(
    tokens: list[str],
    scores: list[float],
    types: list[int],
    merges: list[str],
    ids: tuple[int | None, int | None, int | None],
    model: str,
    pre: str,
) -> None:
    source = TokenizerMetadata(model, pre, tokens, scores, types, merges, *ids)
    try:
        tokenizer = load_tokenizer(source)
    except ModelError:
        return
    for text in ("", "abc 123", "é\n", *tokens):
        try:
            tokenizer.decode(tokenizer.encode(text))
        except RequestError:
            assert any(0xD800 <= ord(c) < 0xE000 for c in text)


def byte_level_file() -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [added(len(TOKENS), "<|bos|>"), added(len(TOKENS) + 1, "<|end|>")],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(TOKENS)}, "merges": SPLITS["merges"]},
    }


def added(i: int, content: str, *, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {**flags, "id": i, "content": content, "special": special}


def written(directory: Path, document: Any, **settings: Any) -> TokenizerFile:
    path = directory / "tokenizer.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return TokenizerFile(path, settings)


def test_a_tokenizer_file_equals_the_same_fields_in_metadata(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path, byte_level_file(), eos_token={"content": "<|end|>"}))
    same = load_tokenizer(byte_level())
    for text in ("Hello, wörld 123", "<|bos|>x<|end|>", ""):
        assert tokenizer.encode(text) == same.encode(text)
    assert tokenizer.special_ids == same.special_ids
    assert tokenizer.eos_token_ids == same.eos_token_ids
    assert tokenizer.vocab_size == same.vocab_size


def test_a_tokenizer_file_frames_texts_unless_its_settings_say_otherwise(tmp_path: Path) -> None:
    document = byte_level_file()
    bos = {"id": "<|bos|>", "ids": [len(TOKENS)], "tokens": ["<|bos|>"]}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": bos},
    }
    source = written(tmp_path, document, bos_token="<|bos|>", eos_token="<|end|>")
    plain = load_tokenizer(source).encode("hi", add_special_tokens=False)
    assert load_tokenizer(source).encode("hi") == [len(TOKENS), *plain]
    overruled = TokenizerFile(source.path, {**source.settings, "add_bos_token": False, "add_eos_token": True})
    assert load_tokenizer(overruled).encode("hi") == [*plain, len(TOKENS) + 1]


def test_truncation_and_padding_of_a_tokenizer_file_do_not_apply(tmp_path: Path) -> None:
    document = byte_level_file()
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": TOKENS[0],
    }
    tokenizer = load_tokenizer(written(tmp_path, document))
    assert tokenizer.decode(tokenizer.encode("not cut, not padded")) == "not cut, not padded"


def test_a_sentencepiece_file_drops_the_space_it_adds(tmp_path: Path) -> None:
    golden = SENTENCEPIECE["with_prefix"]
    same = load_tokenizer(sentencepiece("with_prefix"))
    pieces = {t: s for t, s, k in zip(golden["tokens"], golden["scores"], golden["token_types"], strict=True) if k == 1}
    document = {
        "added_tokens": [added(i, golden["tokens"][i]) for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(golden["tokens"])},
            "merges": recover_merges(pieces),
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    tokenizer = load_tokenizer(written(tmp_path, document, bos_token="<s>", add_bos_token=True))
    for text in ("Hello world", "  two", "日本 🙂", "<s>again"):
        assert tokenizer.encode(text) == same.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == same.decode(same.encode(text))


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            document = document[parent]
        document[last] = value

    return apply


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}


@pytest.mark.parametrize(
    "damage",
    [
        change("model", None),
        change("model", []),
        change("model.vocab", None),
        change("model.vocab", {}),
        change("model.vocab", {"a": -1}),
        change("model.vocab", {"a": 2**33}),
        change("model.vocab", {"a": 1.5}),
        change("model.vocab", {"a": True}),
        change("model.vocab", {"a": "0"}),
        change("model.vocab", {"a": 0, "b": 0}),
        change("model.vocab", {"a" * 65_537: 0}),
        change("model.merges", None),
        change("model.merges", ["a nosuchtoken"]),
        change("model.merges", [["a"]]),
        change("model.merges", 3),
        change("model.type", "Unigram"),
        change("model.unk_token", 7),
        change("added_tokens", [{"id": 3}]),
        change("added_tokens", [added(3, "clash")]),
        change("added_tokens", 7),
        change("decoder", None),
        change("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        change("decoder", {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}),
        change("decoder", {"type": "Sequence", "decoders": [{"type": "Fuse"}]}),
        change("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 3}),
        change("normalizer", {"type": "Prepend", "prepend": "x" * 100_000}),
        change("normalizer", {"type": "NoSuchThing"}),
        change("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        change(
            "post_processor", {"type": "TemplateProcessing", "single": "$A <x>", "pair": "$A", "special_tokens": {}}
        ),
    ],
)
def test_a_malformed_tokenizer_file_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    document = byte_level_file()
    damage(document)
    with pytest.raises(ModelError):
        load_tokenizer(written(tmp_path, document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "\x00", '{"model": {}}', "[" * 100_000, '{"a":' * 5000])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelFileError):
        load_tokenizer(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        load_tokenizer(TokenizerFile(tmp_path / "tokenizer.json"))


def test_a_splitting_expression_that_backtracks_without_end_is_refused(tmp_path: Path) -> None:
    document = byte_level_file()
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, document["pre_tokenizer"]]}
    with pytest.raises(ModelFileError, match="splitting expression"):
        load_tokenizer(written(tmp_path, document))
