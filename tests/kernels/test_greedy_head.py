"""Greedy rows skip most of the output matrix, and never another token than reading it all would give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from program_models import FLOATS, HIDDEN, MODELS, MemoryCheckpoint, open_runner, tables, tokens_of

from setpoint import _native
from setpoint.engine.plan import LogitsRow, PlanEntry, RowSampling, StepPlan
from setpoint.models.spec import Model
from setpoint.runtime.cpu.runner import CpuRunner

CHANNELS = 6003  # enough for a shortlist; the last panel is not full
MODEL = replace(MODELS["grouped"], vocab_size=CHANNELS)
GREEDY = RowSampling(temperature=0.0)


def open_greedy(head: FLOATS, model: Model = MODEL, format: str = "Q8_0", **options: object) -> CpuRunner:
    checkpoint = MemoryCheckpoint(model, format)
    checkpoint.put("head.weight", head, format)
    return open_runner(model, checkpoint, **options)


def random_head(seed: int) -> FLOATS:
    return np.random.default_rng(seed).standard_normal((CHANNELS, HIDDEN)).astype(np.float32)


def plan(runner: CpuRunner, lengths: list[int], sampling: RowSampling = GREEDY) -> StepPlan:
    entries = []
    for sequence, length in enumerate(lengths):
        blocks = tables(runner, 64, sequence)
        rows = [LogitsRow(offset, sampling) for offset in range(length)]
        entries.append(PlanEntry(sequence, tokens_of(length, seed=sequence), 0, blocks, rows))
    return StepPlan(entries)


def tokens(runner: CpuRunner, lengths: list[int]) -> list[int]:
    return [row.token_id for entry in runner.execute(plan(runner, lengths)).entries for row in entry.rows]


def read_in_full(runner: CpuRunner, lengths: list[int]) -> list[int]:
    """numpy's argmax takes the lowest id among equals, as greedy decoding must."""
    return [int(token) for token in runner.logits(plan(runner, lengths)).argmax(axis=1)]


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_same_tokens_for_every_batch_thread_count_and_isa(isa: str, num_threads: int) -> None:
    runner = open_greedy(random_head(num_threads), isa=isa, num_threads=num_threads)
    for lengths in ([1], [4], [3, 1, 2], [30, 1, 9, 50]):  # the last in more than one chunk of rows
        assert tokens(runner, lengths) == read_in_full(runner, lengths)
    assert 0 < runner.program.head_retried_part < 1


def test_a_head_of_random_rows_is_mostly_skipped() -> None:
    wide = replace(MODEL, vocab_size=3 * CHANNELS)
    head = np.concatenate([random_head(seed) for seed in range(3)])
    runner = open_greedy(head * np.linspace(0.1, 1, len(head), dtype=np.float32)[:, None], wide)
    assert tokens(runner, [2]) == read_in_full(runner, [2])
    assert runner.program.head_retried_part < 0.5


def test_the_lowest_id_wins_a_tie() -> None:
    head = random_head(0)
    runner = open_greedy(head)
    winners = read_in_full(runner, [40])
    twins = head.copy()
    for token in set(winners):  # one copy before and one after, some in the same panel
        twins[(token + 1) % CHANNELS] = twins[token - 1] = twins[(token + CHANNELS // 2) % CHANNELS] = head[token]
    runner = open_greedy(twins)
    expected = read_in_full(runner, [40])
    assert expected != winners
    assert tokens(runner, [40]) == expected


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_a_head_whose_bounds_say_nothing_is_read_in_full(spread: float) -> None:
    """Rows that differ by less than an 8-bit step: nearly everything is a tie, and the shortlist gives itself up."""
    head = random_head(1)[:1] + np.float32(spread) * random_head(2)
    runner = open_greedy(head)
    expected = read_in_full(runner, [6])
    for _ in range(3):
        assert tokens(runner, [6]) == expected
    if spread < 1:
        assert runner.program.head_retried_part > 0.25


def test_outliers_and_zero_rows_are_covered() -> None:
    rng = np.random.default_rng(3)
    head = random_head(3)
    head[:, rng.integers(0, HIDDEN, 3)] *= 50
    head[rng.integers(0, CHANNELS, 200)] = 0
    head[rng.integers(0, CHANNELS, 50)] *= 30
    runner = open_greedy(head)
    assert tokens(runner, [64]) == read_in_full(runner, [64])


def test_rows_that_want_more_than_a_token_change_nothing_for_greedy_ones() -> None:
    runner = open_greedy(random_head(4))
    expected = read_in_full(runner, [5])
    entry = plan(runner, [5]).entries[0]
    mixed = [replace(row, sampling=RowSampling(temperature=1.0)) if i % 2 else row for i, row in enumerate(entry.rows)]
    mixed[4] = LogitsRow(4, GREEDY, None, 3)
    found = runner.execute(StepPlan([replace(entry, rows=mixed)])).entries[0].rows
    assert [found[i].token_id for i in (0, 2, 4)] == [expected[i] for i in (0, 2, 4)]
    assert found[4].rank == 1
    banned = RowSampling(temperature=0.0, banned_ids=(expected[0],))
    assert runner.execute(plan(runner, [1], banned)).entries[0].rows[0].token_id != expected[0]


def test_non_finite_rows_still_fail() -> None:
    checkpoint = MemoryCheckpoint(MODEL, "Q8_0")
    checkpoint.put("norm.weight", np.full(HIDDEN, np.inf, np.float32))
    runner = open_runner(MODEL, checkpoint)
    assert runner.execute(plan(runner, [2])).entries[0].error is not None


@pytest.mark.parametrize(("format", "channels"), [("Q4_0", CHANNELS), ("F32", CHANNELS), ("Q8_0", 400)])
def test_other_heads_are_read_as_ever(format: str, channels: int) -> None:
    model = replace(MODEL, vocab_size=channels)
    runner = open_greedy(random_head(5)[:channels], model, format)
    assert runner.step_bytes == runner.weight_bytes
    assert tokens(runner, [7]) == read_in_full(runner, [7])
    assert runner.program.head_retried_part == 0


# --- masks ---------------------------------------------------------------------------------------------------------


def mask_of(tokens: np.ndarray) -> bytes:
    bits = np.zeros(-(-CHANNELS // 32) * 32, bool)
    bits[tokens] = True
    return np.packbits(bits, bitorder="little").tobytes()


def masks(rng: np.random.Generator, count: int, number: int) -> list[np.ndarray]:
    """So many allowed tokens, other ones for every row."""
    return [np.sort(rng.choice(CHANNELS, count, replace=False)) for _ in range(number)]


def masked_plan(runner: CpuRunner, lengths: list[int], allowed: list[np.ndarray], **sampling: object) -> StepPlan:
    entries, left = [], iter(allowed)
    for entry in plan(runner, lengths).entries:
        rows = [
            LogitsRow(row.offset, RowSampling(temperature=0.0, mask=mask_of(next(left))), num_logprobs=None)
            for row in entry.rows
        ]
        entries.append(replace(entry, rows=[replace(row, **sampling) for row in rows]))
    return StepPlan(entries)


def masked_argmax(runner: CpuRunner, lengths: list[int], allowed: list[np.ndarray]) -> list[int]:
    logits = runner.logits(plan(runner, lengths))
    return [int(tokens[row[tokens].argmax()]) for row, tokens in zip(logits, allowed, strict=True)]


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("count", [1, 2, 40, 700, 3000, CHANNELS - 1, CHANNELS])
def test_masked_rows_get_the_best_of_what_they_may(isa: str, count: int) -> None:
    """From one token to all: through few panels, through the screening, in one chunk of rows and in several."""
    rng = np.random.default_rng(count)
    runner = open_greedy(random_head(6), isa=isa, num_threads=2)
    for lengths in ([1], [3, 1, 2], [40, 50]):
        allowed = masks(rng, count, sum(lengths))
        expected = masked_argmax(runner, lengths, allowed)
        results = runner.execute(masked_plan(runner, lengths, allowed))
        assert [row.token_id for entry in results.entries for row in entry.rows] == expected
        scored = runner.execute(masked_plan(runner, lengths, allowed, num_logprobs=1))  # every logit is computed
        assert [row.token_id for entry in scored.entries for row in entry.rows] == expected


def test_masked_and_free_rows_share_a_step() -> None:
    rng = np.random.default_rng(8)
    runner = open_greedy(random_head(7))
    allowed = masks(rng, 5, 6)
    free = tokens(runner, [6])
    masked = masked_argmax(runner, [6], allowed)
    entry = masked_plan(runner, [6], allowed).entries[0]
    rows = [row if i % 2 else LogitsRow(row.offset, GREEDY) for i, row in enumerate(entry.rows)]
    found = runner.execute(StepPlan([replace(entry, rows=rows)])).entries[0].rows
    assert [row.token_id for row in found] == [masked[i] if i % 2 else free[i] for i in range(6)]


def test_the_lowest_id_wins_a_tie_among_the_allowed() -> None:
    head = random_head(0)
    head[:] = head[5]
    runner = open_greedy(head)
    for allowed in (np.array([17, 4000]), np.arange(1, CHANNELS), np.array([CHANNELS - 1])):
        result = runner.execute(masked_plan(runner, [1], [allowed])).entries[0].rows[0]
        assert result.token_id == allowed[0]


@pytest.mark.parametrize("mask", [b"", b"\x01", mask_of(np.array([3]))[:-4], mask_of(np.array([3])) + b"\0\0\0\0"])
def test_a_mask_of_another_vocabulary_fails_its_entry_alone(mask: bytes) -> None:
    runner = open_greedy(random_head(0))
    good, bad = plan(runner, [1, 1]).entries
    bad = replace(bad, rows=[LogitsRow(0, RowSampling(temperature=0.0, mask=mask))])
    results = runner.execute(StepPlan([good, bad])).entries
    assert results[0].error is None
    assert results[1].error is not None


def test_a_mask_that_allows_nothing_is_refused() -> None:
    runner = open_greedy(random_head(0))
    nothing = bytearray(mask_of(np.array([], int)))
    nothing[-1] = 0x80  # beyond the vocabulary
    entry = plan(runner, [1]).entries[0]
    entry = replace(entry, rows=[LogitsRow(0, RowSampling(temperature=0.0, mask=bytes(nothing)))])
    assert runner.execute(StepPlan([entry])).entries[0].error is not None
