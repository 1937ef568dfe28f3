"""The native texts against those written in Python: after every token the same match, from the same place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint import _native
from setpoint.engine.speculation.recurring_text import RecurringText, TextFollower

texts = st.lists(st.integers(0, 3), max_size=80) | st.lists(st.sampled_from((0, 1, 7, 49_151, 262_143)), max_size=80)


@given(texts, texts, st.integers(0, 80), st.integers(1, 20))
@settings(max_examples=400)
def test_native_texts_find_what_plain_ones_find(text: list[int], other: list[int], cut: int, step: int) -> None:
    plain, native = RecurringText(), _native.RecurringText()
    reader, native_reader = TextFollower(), _native.TextFollower()
    cut = min(cut, len(text))

    def grow(begin: int, end: int) -> None:
        for at in range(begin, end, step):
            plain.extend(text, at, min(at + step, end))
            native.extend(text, at, min(at + step, end))
            assert (len(native), native.matched, native.source) == (len(plain), plain.matched, plain.source)
            assert native.copy(native.source, step) == plain.copy(plain.source, step)

    def read(begin: int, end: int) -> None:
        for at in range(begin, end):
            reader.read(plain, other, at, at + 1)
            native_reader.read(native, other, at, at + 1)
            assert (native_reader.matched, native_reader.source(native)) == (reader.matched, reader.source(plain))

    grow(0, cut)
    read(0, len(other) // 2)
    grow(cut, len(text))  # what is read may grow
    read(len(other) // 2, len(other))


def test_native_texts_refuse_what_is_no_token() -> None:
    text = _native.RecurringText()
    with pytest.raises((ValueError, IndexError)):
        text.extend([1, 2], 1, 3)
    for wrong in (-1, 1 << 31, 1 << 70, "a"):
        with pytest.raises((ValueError, TypeError)):
            text.extend([wrong], 0, 1)  # type: ignore[list-item]
    assert text.copy(5, 3) == []
