"""Prompts: as long as asked, the same for the same ids, and text rather than noise."""

from __future__ import annotations

from itertools import pairwise

from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.tune.replay.prompts import POOL_WORDS, Prompts, words
from setpoint.workload.trace import TraceRequest

POOL = list(range(1000, 21_000))


def request(tokens: int, *ids: int) -> TraceRequest:
    return TraceRequest(0.0, tokens, 1, ids)


@given(
    st.integers(1, 600),
    st.lists(st.integers(0, 5), max_size=8),
    st.lists(st.integers(0, 5), max_size=8),
    st.sampled_from([1, 2, 16, 100]),
)
@settings(max_examples=scaled(200))
def test_equal_prefixes_of_ids_are_equal_prefixes_of_tokens(
    tokens: int, left: list[int], right: list[int], block: int
) -> None:
    prompts = Prompts(POOL, block, "salt", first=7)
    a, b = (prompts.items(request(tokens, *ids), index) for index, ids in enumerate((left, right)))
    assert len(a) == len(b) == tokens
    assert a == prompts.items(request(tokens, *left), 0)
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    covered = min(tokens, 1 + common * block)
    assert a[:covered] == b[:covered]
    if common < min(len(left), len(right)) and block >= 16 and tokens >= covered + block:
        assert a[: covered + block] != b[: covered + block]


def test_a_salt_changes_everything() -> None:
    a, b = (Prompts(POOL, 16, salt).items(request(160, *range(10)), 0) for salt in ("a", "b"))
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 16


def test_what_no_id_names_belongs_to_one_request() -> None:
    prompts = Prompts(POOL, 16, "salt")
    assert prompts.items(request(64), 0) != prompts.items(request(64), 1)


def test_pieces_lie_together_in_the_text() -> None:
    tokens = Prompts(POOL, 512, "salt").items(request(512, 3), 0)
    together = sum(after == before + 1 for before, after in pairwise(tokens))
    assert together >= 512 - 17


def test_the_text_is_words_that_follow_each_other() -> None:
    text = words()
    assert len(text) == POOL_WORDS
    assert len(set(text)) > 700
    runs = {text[i : i + 12] for i in range(0, POOL_WORDS - 12, 12)}
    assert len(runs) > 0.95 * (POOL_WORDS / 12)  # it does not go round in circles


def test_words_stand_for_tokens_by_their_rate() -> None:
    prompts = Prompts(words(), 16, "salt", items_per_token=0.75, overhead_tokens=20)
    assert len(prompts.items(request(420, *range(10)), 0)) == 300
    assert len(prompts.items(request(5), 0)) == 1
    a, b = (prompts.items(request(420, *ids), i) for i, ids in enumerate(((1, 2, 3), (1, 2, 4))))
    assert a[:24] == b[:24]
