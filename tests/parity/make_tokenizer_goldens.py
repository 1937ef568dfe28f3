"""Write the token ids that the tokenizer tests compare with, made by programs that share no code with ours.

    python tests/parity/make_tokenizer_goldens.py [--check] [--smollm2 FILE.gguf --gemma3 FILE.gguf]

* tokenizer-splits.json: byte-level BPE for every `tokenizer.ggml.pre` rule, with the `regex` package and a BPE of
  fifteen lines, over a small vocabulary trained here.
* tokenizer-sentencepiece.json: two small models that the `sentencepiece` package trains and runs.
* tokenizer-smollm2.json, tokenizer-gemma3.json: the real vocabularies, run by llama.cpp (`llama-cpp-python`).
  Written only when the files are named.

`--check` writes nothing and fails when a file would change.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
import sentencepiece

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "unit" / "data" / "tokenizer_corpus.json"
GOLDENS = Path(__file__).with_name("goldens")
NUM_MERGES = 400

# Each model's own expressions, as its tokenizer.json states them: stages that split what the one before left.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED_CODER = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
STAGES = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "deepseek-r1-qwen": [QWEN2],
    "tekken": [TEKKEN],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "seed-coder": [SEED_CODER],
}


def split(text: str, stages: list[str]) -> list[str]:
    pieces = [text]
    for stage in stages:
        pieces = [part for piece in pieces for part in regex.split(f"({stage})", piece, flags=regex.V0) if part]
    return pieces


def byte_alphabet() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def encode_word(word: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    parts = [bytes([byte]) for byte in word]
    while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
        parts = merge(parts, min(pairs, key=ranks.__getitem__))
    return parts


def train_merges(corpus: list[str]) -> list[tuple[bytes, bytes]]:
    """Plain BPE: join the most frequent pair, again and again; ties go to the smaller bytes."""
    words = [[bytes([b]) for b in word.encode()] for text in corpus for word in split(text, [LLAMA3])]
    merges = []
    for _ in range(NUM_MERGES):
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [merge(word, best) for word in words]
    return merges


def make_splits(corpus: list[str]) -> dict[str, Any]:
    letters = byte_alphabet()
    merges = train_merges(corpus)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += dict.fromkeys(left + right for left, right in merges)
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    def encode(text: str, stages: list[str]) -> list[int]:
        return [ids[part] for word in split(text, stages) for part in encode_word(word.encode(), ranks)]

    return {
        "reference": f"regex {regex.__version__}",
        "tokens": [written(token) for token in tokens],
        "merges": [f"{written(left)} {written(right)}" for left, right in merges],
        "ids": {pre: [encode(text, stages) for text in corpus] for pre, stages in STAGES.items()},
    }


def make_sentencepiece(corpus: list[str], *, space_prefix: bool) -> dict[str, Any]:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus for line in text.replace("\0", " ").split("\n")]),
        model_writer=trained,
        model_type="bpe",
        vocab_size=900,
        character_coverage=0.98,
        byte_fallback=True,
        add_dummy_prefix=space_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<b>", "</b>", "<|tool|>"],
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())

    def kind(i: int) -> int:
        if model.is_unknown(i) or model.is_control(i):
            return 2 if model.is_unknown(i) else 3
        if model.is_byte(i):
            return 6
        return 4 if model.id_to_piece(i) in ("<b>", "</b>", "<|tool|>") else 1

    ids = [model.encode(text) for text in corpus]
    return {
        "tokens": [model.id_to_piece(i) for i in range(model.vocab_size())],
        "scores": [model.get_score(i) for i in range(model.vocab_size())],
        "token_types": [kind(i) for i in range(model.vocab_size())],
        "ids": ids,
        "decoded": [model.decode(row) for row in ids],
    }


def make_real(corpus: list[str], path: Path) -> dict[str, Any]:
    import llama_cpp

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in corpus]
    return {"reference": f"llama-cpp-python {llama_cpp.__version__}", "ids": ids}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--gemma3", type=Path)
    options = parser.parse_args()
    corpus = json.loads(CORPUS.read_text())
    made: dict[str, dict[str, Any]] = {
        "splits": make_splits(corpus),
        "sentencepiece": {
            "reference": f"sentencepiece {sentencepiece.__version__}",
            "with_prefix": make_sentencepiece(corpus, space_prefix=True),
            "without_prefix": make_sentencepiece(corpus, space_prefix=False),
        },
    }
    for name, path in (("smollm2", options.smollm2), ("gemma3", options.gemma3)):
        if path is not None:
            made[name] = make_real(corpus, path)
    changed = []
    for name, document in made.items():
        file = GOLDENS / f"tokenizer-{name}.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        if {**before, "reference": ""} != {**document, "reference": ""}:
            changed.append(file.name)
            if not options.check:
                file.write_text(json.dumps(document, separators=(",", ":"), ensure_ascii=True) + "\n")
    print(f"{len(made)} made, changed: {', '.join(changed) or 'none'}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
