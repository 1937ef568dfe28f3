"""The two real vocabularies against llama.cpp's ids (goldens), on the multilingual corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from setpoint.loaders.checkpoint import open_checkpoint
from setpoint.text.source import TokenizerFile, TokenizerMetadata
from setpoint.text.stream import TextStream
from setpoint.text.tokenizer import Tokenizer, load_tokenizer

CORPUS: list[str] = json.loads((Path(__file__).parents[1] / "unit" / "data" / "tokenizer_corpus.json").read_text())


def golden_ids(name: str) -> list[list[int]]:
    ids: list[list[int]] = json.loads((Path(__file__).parent / "goldens" / f"tokenizer-{name}.json").read_text())["ids"]
    assert len(ids) == len(CORPUS)
    return ids


def load(path: Path) -> tuple[Tokenizer, TokenizerMetadata]:
    checkpoint = open_checkpoint(path)
    try:
        assert isinstance(checkpoint.tokenizer, TokenizerMetadata)
        return load_tokenizer(checkpoint.tokenizer), checkpoint.tokenizer
    finally:
        checkpoint.close()


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load(smollm2_path)[0]


@pytest.fixture(scope="module")
def gemma3(gemma3_path: Path) -> Tokenizer:
    return load(gemma3_path)[0]


def test_smollm2_ids_equal_llama_cpp(smollm2: Tokenizer) -> None:
    assert [smollm2.encode(text, add_special_tokens=False) for text in CORPUS] == golden_ids("smollm2")
    assert smollm2.encode("hi") == smollm2.encode("hi", add_special_tokens=False)  # the file asks for no <bos>


def test_gemma3_ids_equal_llama_cpp(gemma3: Tokenizer) -> None:
    assert [gemma3.encode(text, add_special_tokens=False) for text in CORPUS] == golden_ids("gemma3")
    assert gemma3.encode("hi")[0] == gemma3.bos_token_id == 2


def test_smollm2_text_survives_the_round_trip(smollm2: Tokenizer) -> None:
    for text in CORPUS:
        assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


def test_gemma3_text_survives_the_round_trip(gemma3: Tokenizer) -> None:
    for text in CORPUS:
        ids = gemma3.encode(text, add_special_tokens=False)
        # SentencePiece writes a space as ▁, so a ▁ in the text comes back as a space.
        assert gemma3.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


def test_streams_of_real_tokens_equal_the_whole_text(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    for tokenizer in (smollm2, gemma3):
        for text in CORPUS:
            ids = tokenizer.encode(text)
            stream = TextStream(tokenizer)
            pieces = [stream.push([i]).text for i in ids] + [stream.push([], final=True).text]
            assert "".join(pieces) == tokenizer.decode(ids)
            assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_a_mebibyte_of_one_word_is_encoded(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    for tokenizer in (smollm2, gemma3):
        for unit in ("a", " ", "<|", "e\u0301", "\n", "漢", "1"):
            text = unit * (2**20 // len(unit.encode()))
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_json_of_the_same_vocabulary_gives_the_same_ids(smollm2_path: Path, tmp_path: Path) -> None:
    """The file is written here as Hugging Face publishes SmolLM2's, and read by the other builder."""
    tokenizer, metadata = load(smollm2_path)
    assert metadata.merges is not None
    assert metadata.token_types is not None
    document = {
        "version": "1.0",
        "added_tokens": [
            {
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "id": i,
                "content": metadata.tokens[i],
                "special": True,
            }
            for i, kind in enumerate(metadata.token_types)
            if kind == 3
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(metadata.tokens)},
            "merges": list(metadata.merges),
        },
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    from_file = load_tokenizer(TokenizerFile(path, {"eos_token": "<|im_end|>"}))
    assert [from_file.encode(text) for text in CORPUS] == golden_ids("smollm2")
    assert from_file.eos_token_ids == tokenizer.eos_token_ids
    assert from_file.special_ids == tokenizer.special_ids
