"""How each `tokenizer.ggml.pre` cuts text into words before byte-level BPE.

The names are llama.cpp's; the expressions are those of the models' own `tokenizer.json` files, which that project
rewrites for its regex engine. A name is listed only where the published tokenizer is known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tokenizers import Regex, normalizers, pre_tokenizers

from setpoint.errors import UnsupportedModelError


class Digits(Enum):
    """What happens to numbers before the words are cut."""

    AS_WORDS = "as words"
    ONE_BY_ONE = "one by one"


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut: `patterns` are applied in turn, each splitting what the one before it left.

    No patterns means GPT-2's own expression. `whole_words` looks a word up before merging it (tiktoken's rule),
    `adds_bos` is the default where the file does not say, `nfc` composes characters first.
    """

    patterns: tuple[str, ...] = ()
    digits: Digits = Digits.AS_WORDS
    whole_words: bool = False
    adds_bos: bool = False
    nfc: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits is Digits.ONE_BY_ONE:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_SEED_CODER = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
# What llama.cpp does with a file that names no splitting rule (made before there were names).
_UNNAMED = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_GPT2_WORDS = PreTokenizer()
_GPT2_SINGLE_DIGITS = PreTokenizer(digits=Digits.ONE_BY_ONE)
_LLAMA3_WORDS = PreTokenizer((_LLAMA3,), whole_words=True, adds_bos=True)
_QWEN2_WORDS = PreTokenizer((_QWEN2,), nfc=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(_UNNAMED),
    "gpt-2": _GPT2_WORDS,
    "smollm": _GPT2_SINGLE_DIGITS,
    "starcoder": _GPT2_SINGLE_DIGITS,
    "refact": _GPT2_SINGLE_DIGITS,
    "codeshell": _GPT2_SINGLE_DIGITS,
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2": _QWEN2_WORDS,
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The rule of that name; a file that gives none ("") gets llama.cpp's "default"."""
    try:
        return PRE_TOKENIZERS[name or "default"]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(f"tokenizer.ggml.pre is {name[:64]!r}; the supported ones are: {known}") from None
