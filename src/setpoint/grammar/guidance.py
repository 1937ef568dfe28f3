"""llguidance, and nothing of ours: the one place that imports it, here and in the worker process.

It is made to believe that no token but one ends a text, and that one lies beyond the vocabulary: whether an output
may end is asked for separately, and which tokens end it is the request's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

# What one grammar may cost: to build, and at every token. Defaults are 2 to 10 times as much.
MAX_GRAMMAR_SYMBOLS: Final = 200_000
MAX_LEXER_STATES: Final = 50_000  # 1 to 2 KB each
INITIAL_FUEL: Final = 1_000_000  # about 50,000 a millisecond
STEP_FUEL: Final = 100_000  # about 14,000 a millisecond
STEP_ITEMS: Final = 30_000  # about 20,000 a millisecond
# Ways to read the text so far. Time grows with the square of them: where they are ambiguities, which only a grammar
# in its own notation can have, 2,000 take seconds; where they are what may come next, as the properties of an object,
# milliseconds.
ROW_ITEMS: Final = {"grammar": 500}
MOST_ROW_ITEMS: Final = 4_200  # four for each of the optional properties that an object may have, and some
FORMS: Final = ("json", "regex", "choice", "grammar", "structural_tag")


def make_limits(form: str) -> LLParserLimits:
    return LLParserLimits(
        max_items_in_row=ROW_ITEMS.get(form, MOST_ROW_ITEMS),
        initial_lexer_fuel=INITIAL_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SYMBOLS,
        verbose_errors=False,  # they would quote what was generated
    )


class _Wrapper(TokenizerWrapper):
    """A vocabulary as LLTokenizer wants it; called to write a forced text in the tokens that the model is used to."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: Sequence[bytes], encode: Callable[[str], Sequence[int]]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return list(self._encode(text))


def make_tokenizer(tokens: Sequence[bytes], encode: Callable[[str], Sequence[int]] | None = None) -> LLTokenizer:
    """`tokens[i]` is the text of token i, b"" for one that never is text; their number is a multiple of 32."""
    if encode is not None:
        return LLTokenizer(_Wrapper([*tokens, b""], encode))
    made: list[LLTokenizer] = []
    made.append(LLTokenizer(_Wrapper([*tokens, b""], lambda text: made[0].greedy_tokenize(text))))
    return made[0]


def grammar_text(form: str, source: str) -> str:
    """The grammar in llguidance's own terms. Raises ValueError when it cannot be one."""
    if form == "json":
        return '{"grammars":[{"json_schema":' + source + "}]}"
    if form == "regex":
        return str(LLMatcher.grammar_from_regex(source))
    if form in ("choice", "structural_tag"):  # written by us
        return source
    if source.lstrip().startswith("{"):  # llguidance would take it for a list of grammars, with options
        raise ValueError("a grammar is written in Lark's notation or in GBNF")
    try:
        return str(any_to_lark(source))
    except Exception as error:  # a parser of somebody else's
        raise ValueError(one_line(str(error))) from None


def make_matcher(tokenizer: LLTokenizer, form: str, text: str) -> Any:
    """At its beginning. Raises ValueError when the text is no grammar, or a limit is reached."""
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=make_limits(form))
    if matcher.is_error():
        raise ValueError(one_line(matcher.get_error()))
    return matcher


def one_line(message: str) -> str:
    """The first line of an error's text, short and printable."""
    lines = message.strip().splitlines()
    return "".join(c if c.isprintable() else " " for c in (lines[0] if lines else "")[:200])
