"""Grammars of llguidance behind the engine's protocol: what may come next is a function of the tokens taken alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from house import BOS, EOS, TOKENIZER, VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.engine.constraint import Constraint, admissible
from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import OutputViolationError, RequestError
from setpoint.grammar.guidance import grammar_text, make_matcher, make_tokenizer
from setpoint.grammar.matcher import CompiledGrammar
from setpoint.grammar.source import grammar_source
from setpoint.grammar.vocabulary import GrammarVocabulary

VOCABULARY = GrammarVocabulary(TOKENIZER, VOCAB_SIZE)
LL_TOKENIZER = make_tokenizer(VOCABULARY.texts, VOCABULARY.encoder(make_tokenizer(VOCABULARY.texts).greedy_tokenize))
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CALLS: dict[str, Any] = {
    "triggers": ["<f="],
    "structures": [
        {"begin": "<f=one>", "schema": PERSON, "end": "</f>"},
        {"begin": "<f=two>", "schema": {}, "end": "</f>"},
    ],
}
THOUGHTS: dict[str, Any] = {
    "type": "sequence",
    "elements": [
        {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
        {
            "type": "triggered_tags",
            "triggers": ["he", "[b"],
            "tags": [
                {"begin": "hello", "content": {"type": "regex", "pattern": "a/b\\/[0-9]\n"}, "end": ""},
                {"begin": "[b", "content": {"type": "const_string", "value": '"\\é\n'}, "end": "]"},
            ],
        },
    ],
}
CASES: list[dict[str, Any]] = [
    {"json": PERSON},
    {"json": PERSON, "disable_any_whitespace": True},
    {"json": {"enum": ["the hell", "the bell", "then", 5, None]}},
    {"json_object": True},
    {"regex": "(hello|help)( the)* [0-9]{2,3}"},
    {"regex": "a*"},
    {"choice": ["hello", "hell", "the", "é漢🙂", 'a"b\\c\n', "\x7f\0"]},
    {"grammar": 'start: "(" start ")" | /[a-z]+/'},
    {"grammar": 'root ::= "yes" | "no" tail\ntail ::= [0-9] tail | ""'},
    {"structural_tag": CALLS},
    {"structural_tag": {"format": THOUGHTS}, "disable_any_whitespace": True},
]


def compiled(fields: dict[str, Any]) -> CompiledGrammar:
    wanted = StructuredOutputs(**fields)
    form, source = grammar_source(wanted)
    matcher = make_matcher(LL_TOKENIZER, form, grammar_text(form, source))
    return CompiledGrammar(matcher, VOCABULARY, "structured_outputs", may_name_tokens=form == "grammar")


def allowed(constraint: Constraint) -> list[int]:
    mask = constraint.mask()
    return [token for token in range(VOCAB_SIZE) if mask[token >> 3] >> (token & 7) & 1]


def take(constraint: Constraint, text: str) -> None:
    for byte in text.encode():
        constraint.advance(byte)


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(VOCABULARY.texts[token] for token in tokens).decode("utf-8", "replace")


@pytest.mark.parametrize("fields", CASES, ids=str)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_walk_along_the_masks_is_a_sentence(fields: dict[str, Any], data: st.DataObject) -> None:
    """Walks, turns back, drafts and copies: masks, ends and forced tokens are always those of a fresh walk."""
    grammar = compiled(fields)
    constraint = grammar.start([EOS])
    tokens: list[int] = []
    for _ in range(data.draw(st.integers(0, 40))):
        if constraint.is_finished:
            break
        options = allowed(constraint)
        assert BOS not in options
        forced = constraint.forced()
        assert forced is None or options == [forced]
        if data.draw(st.integers(0, 5)) == 0 and tokens:
            count = data.draw(st.integers(1, len(tokens)))
            constraint.rollback(count)
            del tokens[-count:]
        else:
            token = data.draw(st.sampled_from(options))
            if token == EOS:
                break
            constraint.advance(token)
            tokens.append(token)
    fresh = grammar.start([EOS])
    for token in tokens:
        fresh.advance(token)
    assert fresh.is_finished == constraint.is_finished
    if not fresh.is_finished:
        assert constraint.mask() == fresh.mask()
        assert constraint.forced() == fresh.forced()


def test_what_is_complete_is_valid_json() -> None:
    grammar = compiled({"json": PERSON})
    constraint = grammar.start([EOS])
    take(constraint, '{"name": "Ada", "age": 36')
    assert EOS not in allowed(constraint)
    take(constraint, "}")
    assert constraint.is_finished
    assert json.loads('{"name": "Ada", "age": 36}')["age"] == 36


def test_forced_text_comes_in_the_tokens_that_the_model_knows() -> None:
    """Nothing but "hello" is possible, and "he" and "ll" are tokens: the mask holds the first of them alone."""
    constraint = compiled({"choice": ["hello"]}).start([EOS])
    assert allowed(constraint) == [258]
    forced = []
    while not constraint.is_finished:
        token = constraint.forced()
        assert token is not None
        forced.append(token)
        constraint.advance(token)
    assert forced == [258, 259, ord("o")]


def test_special_tokens_are_no_text() -> None:
    """Text that looks like one is written byte by byte; the token itself is never allowed, only as an end."""
    constraint = compiled({"choice": ["</s>"]}).start([EOS])
    tokens = []
    while not constraint.is_finished:
        tokens.append(allowed(constraint)[0])
        constraint.advance(tokens[-1])
    assert text_of(tokens) == "</s>"
    assert EOS not in tokens
    anything = compiled({"regex": "(?s:.*)"}).start([EOS])
    assert BOS not in allowed(anything)
    assert EOS in allowed(anything)
    assert EOS not in allowed(compiled({"regex": "(?s:.*)"}).start([]))


def test_only_stop_ids_without_text_end_an_output() -> None:
    constraint = compiled({"regex": "a*"}).start([EOS, BOS, ord("b"), 9999])
    assert allowed(constraint) == [ord("a"), BOS, EOS]


@pytest.mark.parametrize("token", [ord("x"), BOS, EOS, 261, 300])
def test_what_is_not_allowed_is_a_violation(token: int) -> None:
    constraint = compiled({"regex": "[0-9]{2}"}).start([EOS])
    with pytest.raises(OutputViolationError):
        constraint.advance(token)


def test_nothing_follows_an_end() -> None:
    constraint = compiled({"regex": "a*"}).start([EOS])
    constraint.advance(EOS)
    assert constraint.is_finished
    with pytest.raises(OutputViolationError):
        constraint.advance(ord("a"))


def ends(fields: dict[str, Any], text: str) -> bool | None:
    """Whether a text may end here; None where it breaks the structure."""
    constraint = compiled(fields).start([EOS])
    try:
        take(constraint, text)
    except OutputViolationError:
        return None
    return constraint.is_finished or EOS in allowed(constraint)


@pytest.mark.parametrize(
    ("text", "may_end"),
    [
        ("", True),
        ("free <f one {text}", True),
        ("free <f=", False),
        ("free <f=x", None),
        ('<f=one>{"name": "Ada", "age": 36}</f>', True),
        ('<f=one>{"name": "Ada", "age": 36}</f> and <f=two>[null, {"a": 1}]</f>, done', True),
        ('<f=one>{"name": "Ada", "age": 36}</f> <f=two>', False),
        ('<f=one>{"name": "Ada", "age": 136', None),
        ('<f=one>{"name": "Ada", "age": 36} ', None),
        ('<f=one>{"name": "Ada", "age": 36}</g', None),
    ],
)
def test_text_is_free_until_a_trigger(text: str, may_end: bool | None) -> None:
    assert ends({"structural_tag": CALLS}, text) is may_end


TAGGED = {
    "triggers": ["<a", "<b"],
    "tags": [
        {"begin": "<a>", "content": {"type": "const_string", "value": "1"}, "end": "</a>"},
        {"begin": "<b>", "content": {"type": "any_text"}, "end": "</b>"},
    ],
}
ONCE, FIRST = {"stop_after_first": True}, {"at_least_one": True}


@pytest.mark.parametrize(
    ("options", "text", "may_end"),
    [
        ({}, "x <a>1</a> <b>anything <a> goes</b> y", True),
        ({}, "<b>not yet", False),
        (FIRST, "", False),
        (FIRST, "x", None),
        (FIRST, "<a>1</a> x <b>2</b> y", True),
        (ONCE, "x", True),
        (ONCE, "x <b></b>", True),
        (ONCE, "x <b></b> ", None),
        (ONCE | FIRST, "<a>1</a>", True),
        (ONCE | FIRST, "<a>1</a>x", None),
    ],
)
def test_how_many_tags(options: dict[str, bool], text: str, may_end: bool | None) -> None:
    assert ends({"structural_tag": {"format": {"type": "triggered_tags"} | TAGGED | options}}, text) is may_end


@pytest.mark.parametrize(
    ("options", "text", "may_end"),
    [
        ({}, "", True),
        ({}, "<a>1</a>", True),
        ({}, "<a>1</a>, ", False),
        ({}, "<a>1</a>, <b>x</b>, <a>1</a>", True),
        ({}, "<a>1</a> <b>", None),
        (FIRST, "", False),
        (ONCE, "<a>1</a>, ", None),
        (ONCE, "", True),
    ],
)
def test_tags_with_a_separator(options: dict[str, bool], text: str, may_end: bool | None) -> None:
    format = {"type": "tags_with_separator", "separator": ", ", "tags": TAGGED["tags"]} | options
    assert ends({"structural_tag": {"format": format}}, text) is may_end


def test_other_formats() -> None:
    thoughts = {"structural_tag": {"format": THOUGHTS}}
    for text, may_end in (
        ("<t>he thinks [b</t>", True),
        ("<t>he thinks", False),
        ("<t></t>so help", None),
        ('<t></t>so helloa/b/7\n [b"\\é\n] fin', True),
        ("no", None),
    ):
        assert ends(thoughts, text) is may_end, text
    either = {
        "type": "or",
        "elements": [{"type": "const_string", "value": "é"}, {"type": "json_schema"} | {"json_schema": PERSON}],
    }
    assert ends({"structural_tag": {"format": either}}, "é") is True
    assert ends({"structural_tag": {"format": either}}, '{"na') is False
    assert ends({"structural_tag": {"format": {"type": "any_text"}}}, "whatever\n") is True


WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@given(trigger=WORDS, more=st.text(max_size=5), value=WORDS, end=WORDS)
@settings(max_examples=40, deadline=None)
def test_any_text_can_be_a_tag(trigger: str, more: str, value: str, end: str) -> None:
    """Whatever the strings hold: quotes, escapes, new lines, what is notation elsewhere."""
    tag = {"begin": trigger + more, "content": {"type": "const_string", "value": value}, "end": end}
    for format in (
        {"type": "triggered_tags", "triggers": [trigger], "tags": [tag], "at_least_one": True},
        {"type": "tags_with_separator", "tags": [tag], "separator": "", "stop_after_first": True},
    ):
        fields = {"structural_tag": {"format": format}}
        assert ends(fields, trigger + more + value + end) is True
        assert ends(fields, (trigger + more + value + end)[:-1]) is not True


PATTERNS = ["a\\\\", 'a/\nr0: "b"', "a/ | /b", "[/]+", "(?x) a # b\n c", "a\\/b", "\ra", "a/i", "\x7f|\\\n", "[\n]"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_stays_a_pattern(pattern: str) -> None:
    """It cannot leave its slashes: what matches is what matches it alone, or it is refused."""
    format = {"type": "regex", "pattern": pattern}
    try:
        alone = compiled({"regex": pattern}).start([EOS])
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            compiled({"structural_tag": {"format": format}})
        return
    tagged = compiled({"structural_tag": {"format": format}}).start([EOS])
    for _ in range(20):
        assert tagged.is_finished == alone.is_finished
        if alone.is_finished:
            break
        assert allowed(tagged) == allowed(alone)
        token = next((token for token in allowed(alone) if token < 256), None)
        if token is None:
            break
        alone.advance(token)
        tagged.advance(token)


def test_drafts_are_counted_and_leave_no_trace() -> None:
    constraint = compiled({"regex": "abc(de)?"}).start([EOS])
    before = constraint.mask()
    assert admissible(constraint, list(b"abx")) == 2
    assert admissible(constraint, list(b"abcde")) == 4  # the last one completes it: the row before draws that
    assert admissible(constraint, [ord("a"), EOS]) == 1
    assert admissible(constraint, []) == 0
    assert constraint.mask() == before


def test_copies_do_not_know_each_other() -> None:
    grammar = compiled({"regex": "a[0-9]*"})
    first, second = grammar.start([EOS]), grammar.start([EOS])
    take(first, "a12")
    assert allowed(second) == [ord("a")]
    take(second, "a")
    assert allowed(first) == allowed(second)


def test_a_grammar_cannot_ask_for_special_tokens() -> None:
    constraint = compiled({"grammar": f'start: (<[{BOS}]> | "a") "b"'}).start([EOS])
    assert allowed(constraint) == [ord("a")]
    alone = compiled({"grammar": f"start: <[{BOS}]> /[a-z]+/"}).start([EOS])
    assert alone.forced() is None
    with pytest.raises(RequestError) as caught:
        alone.mask()
    assert caught.value.reason == "bad_constraint"


def walk(constraint: Constraint, num_steps: int) -> None:
    for _ in range(num_steps):
        constraint.mask()
        constraint.advance(ord("a"))


def test_a_grammar_that_takes_too_much_work_ends_its_request_only() -> None:
    """Every way to read the text so far is followed; past the limit, the request is told so."""
    constraint = compiled({"grammar": 'start: s\ns: s s s | s s | "a" | "" | s "a" s'}).start([])
    with pytest.raises(RequestError) as caught:
        walk(constraint, 3000)
    assert caught.value.reason == "compile_limit"
    assert allowed(compiled({"regex": "b"}).start([])) == [ord("b")]
