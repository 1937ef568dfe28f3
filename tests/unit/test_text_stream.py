"""Streams: whatever the chunks, the pieces joined are the whole text, cut at the first stop string (ST-6)."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_sources import byte_level, sentencepiece

from setpoint.text.stream import TextDelta, TextStream
from setpoint.text.tokenizer import Tokenizer, load_tokenizer

SPECIAL = 10**6


@dataclass
class Table:
    """Tokens given by their bytes; the id SPECIAL is a special token."""

    tokens: list[bytes]
    space_prefix: bool = False
    special_ids: frozenset[int] = frozenset({SPECIAL})

    def token_bytes(self, token_id: int) -> bytes:
        return b"<special>" if token_id == SPECIAL else self.tokens[token_id]


REAL = [load_tokenizer(byte_level()), load_tokenizer(sentencepiece("with_prefix"))]
HARD = ["👨‍👩‍👧‍👦", "🇩🇪", "e\u0301", "漢字", "\u200d", "ñ", "\ufffd", "नि", "ab", "aab", "\n", " ", "</", "tool>"]
TEXTS = st.lists(st.one_of(st.sampled_from(HARD), st.text(max_size=3)), max_size=8).map("".join)
CONTENTS = st.one_of(TEXTS.map(lambda text: text.encode()), st.binary(max_size=12))


@st.composite
def token_lists(draw: st.DrawFn) -> list[bytes]:
    """Text or bytes that are no text, cut anywhere, also inside a character; a token may be empty."""
    content = draw(CONTENTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(content)), max_size=10)))
    return [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]


@st.composite
def chunked(draw: st.DrawFn, size: int) -> list[range]:
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=5)))
    return [range(a, b) for a, b in zip([0, *cuts], [*cuts, size], strict=True)]


def first_stop(text: str, stops: list[str]) -> tuple[str, int] | None:
    """By definition: the stop completed first, the longest of those; and where it ends."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return max(found, key=len), end
    return None


def readable(tokens: list[bytes]) -> str:
    """What is certain of these bytes: an unfinished character is not."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(tokens))


@settings(max_examples=40)
@given(st.data(), token_lists())
def test_pieces_joined_are_the_whole_text(data: st.DataObject, tokens: list[bytes]) -> None:
    stream = TextStream(Table(tokens))
    deltas = [stream.push(chunk) for chunk in data.draw(chunked(len(tokens)))]
    deltas.append(stream.push([], final=True))
    assert "".join(delta.text for delta in deltas) == b"".join(tokens).decode("utf-8", "replace")
    assert sum(delta.num_tokens for delta in deltas) == len(tokens)
    assert all(delta.stop is None for delta in deltas)


@settings(max_examples=30)
@given(token_lists())
def test_every_finished_character_comes_out_at_once(tokens: list[bytes]) -> None:
    stream = TextStream(Table(tokens))
    text = ""
    for i in range(len(tokens)):
        text += stream.push([i]).text
        assert text == readable(tokens[: i + 1])


STOPS = st.lists(st.one_of(st.sampled_from([*HARD, "aa", "b"]), st.text("ab", max_size=4)), min_size=1, max_size=4)


@settings(max_examples=50)
@given(st.data(), token_lists() | st.text("ab").map(lambda t: [c.encode() for c in t]), STOPS, st.booleans())
def test_a_stream_ends_at_its_first_stop_string(
    data: st.DataObject, tokens: list[bytes], stops: list[str], include: bool
) -> None:
    whole = b"".join(tokens).decode("utf-8", "replace")
    expected = first_stop(whole, stops)
    stream = TextStream(Table(tokens), stop=stops, include_stop=include)
    deltas = []
    for chunk in data.draw(chunked(len(tokens))):
        deltas.append(stream.push(chunk))
    deltas.append(stream.push([], final=True))
    text = "".join(delta.text for delta in deltas)
    if expected is None:
        assert text == whole
        assert deltas[-1].stop is None
        return
    stop, end = expected
    assert text == whole[: end if include else end - len(stop)]
    assert deltas[-1].stop == stop
    # The tokens counted are those up to the one that made the stop certain.
    needed = (k for k in range(len(tokens) + 1) if first_stop(readable(tokens[:k]), stops) is not None)
    assert sum(delta.num_tokens for delta in deltas) == next(needed, len(tokens))


@settings(max_examples=40)
@given(st.text("ab").map(lambda t: [c.encode() for c in t]), STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(tokens: list[bytes], stops: list[str]) -> None:
    stream = TextStream(Table(tokens), stop=stops)
    text = ""
    for i in range(len(tokens)):
        delta = stream.push([i])
        text += delta.text
        if delta.stop is not None:
            break
        seen = readable(tokens[: i + 1])
        held = max(
            (n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0
        )  # the longest end of the text that begins a stop string
        assert text == seen[: len(seen) - held]


def test_after_its_stop_a_stream_is_silent() -> None:
    stream = TextStream(Table([b"a", b"STOP", b"b"]), stop=["STOP"])
    assert stream.push([0, 1, 2]) == TextDelta("a", "STOP", 2)
    assert stream.push([0, 1, 2]) == TextDelta("", "STOP", 0)
    assert stream.push([2], final=True) == TextDelta("", "STOP", 0)


def test_the_token_that_ends_a_sequence_counts_and_is_not_shown() -> None:
    table = Table([b"a", b"b", b"END"])
    assert TextStream(table).push([0, 1, 2], final=True, ended=True) == TextDelta("ab", None, 3)
    assert TextStream(table, include_stop=True).push([0, 2], final=True, ended=True) == TextDelta("aEND", None, 2)
    stopped = TextStream(table, stop=["b"]).push([0, 1, 2], final=True, ended=True)
    assert stopped == TextDelta("a", "b", 2)  # the stop string came first
    unfinished = TextStream(Table([b"\xf0", b"END"]), stop=["\ufffd"]).push([0, 1], final=True, ended=True)
    assert unfinished == TextDelta("", "\ufffd", 1)


def test_text_behind_the_stop_in_its_own_token_is_cut() -> None:
    assert TextStream(Table([b"one. two"]), stop=["."]).push([0]) == TextDelta("one", ".", 1)
    assert TextStream(Table([b"one. two"]), stop=["."], include_stop=True).push([0]) == TextDelta("one.", ".", 1)


def test_stops_within_the_least_number_of_tokens_do_not_count() -> None:
    table = Table([b"x", b"END", b"y"])
    stream = TextStream(table, stop=["END"], min_tokens=2)
    assert stream.push([0, 1]) == TextDelta("x", None, 2)  # it may go on, so it waits with what it begins
    assert stream.push([2, 1]) == TextDelta("ENDy", "END", 2)


def test_special_tokens_are_skipped_or_kept_also_inside_a_character() -> None:
    table = Table(["é".encode()[:1], "é".encode()[1:]])
    assert TextStream(table).push([0, SPECIAL, 1], final=True).text == "é"
    kept = TextStream(table, skip_special_tokens=False).push([0, SPECIAL, 1], final=True).text
    assert kept == "\ufffd<special>\ufffd"


def test_an_unfinished_character_is_replaced_only_at_the_end() -> None:
    stream = TextStream(Table(["🙂".encode()[:3]]))
    assert stream.push([0]).text == ""
    assert stream.push([], final=True).text == "\ufffd"


def test_the_space_before_a_text_is_dropped_unless_it_continues_another() -> None:
    table = Table([b"", b" a", b" b"], space_prefix=True)
    assert TextStream(table).push([0, 1, 2]).text == "a b"
    assert TextStream(table, continuation=True).push([0, 1, 2]).text == " a b"


def test_many_long_stop_strings_at_once() -> None:
    stops = ["a" * n + "b" for n in range(1, 257, 16)]
    stream = TextStream(Table([b"a" * 5000, b"b"]), stop=stops)
    assert stream.push([0]).text == "a" * (5000 - 241)
    assert stream.push([1]) == TextDelta("", "a" * 241 + "b", 1)


@settings(max_examples=30)
@given(st.data(), st.sampled_from(REAL), st.booleans(), st.booleans())
def test_a_stream_equals_decode_for_any_ids(
    data: st.DataObject, tokenizer: Tokenizer, skip: bool, continuation: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=30))
    stream = TextStream(tokenizer, skip_special_tokens=skip, continuation=continuation)
    text = "".join(stream.push([ids[i] for i in chunk]).text for chunk in data.draw(chunked(len(ids))))
    text += stream.push([], final=True).text
    assert text == tokenizer.decode(ids, skip_special_tokens=skip, continuation=continuation)


@pytest.mark.parametrize("stop", [(), ("",), ("", "")])
def test_no_stop_or_an_empty_one_never_stops(stop: tuple[str, ...]) -> None:
    assert TextStream(Table([b"abc"]), stop=stop).push([0]) == TextDelta("abc", None, 1)
