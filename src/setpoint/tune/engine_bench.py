"""How fast the engine is alone: random prompts, greedy, no prefix cache, no end of sequence, no HTTP.

Prefill rate counts prompt tokens until the last sequence of the batch has its first token; decode rate counts the
tokens after that moment, so that both are whole-batch rates that do not overlap.
"""

from __future__ import annotations

import queue
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from setpoint.engine.engine import Engine
from setpoint.engine.events import Event
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.errors import EngineError

PATIENCE_S = 600.0  # without any event, the engine is stuck


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the repeats. Rates in tokens/s over the whole batch, times in milliseconds."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    prefill_tok_s: float
    decode_tok_s: float
    ttft_ms: float
    tpot_ms: float
    weight_gb_s: float  # weight bytes read per second while decoding: one pass over the weights a step


@dataclass(frozen=True, slots=True)
class Run:
    """One batch, measured once."""

    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    tpot_s: float


def bench_engine(
    engine: Engine,
    events: queue.SimpleQueue[list[Event]],
    *,
    batches: Sequence[int],
    prompt_tokens: int,
    output_tokens: int,
    repeat: int,
    weight_bytes: int,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measure every batch size `repeat` times, in turn (so that a drift of the machine meets all of them)."""
    random_tokens = random.Random(seed)
    runs: dict[int, list[Run]] = {batch: [] for batch in batches}
    run_batch(engine, events, random_tokens, 1, min(prompt_tokens, 64), 4)  # warm-up: pages, clocks, caches
    for turn in range(repeat):
        for batch in batches:
            report(f"run {turn + 1} of {repeat}, batch {batch}")
            runs[batch].append(run_batch(engine, events, random_tokens, batch, prompt_tokens, output_tokens))
    return [_row(batch, runs[batch], prompt_tokens, output_tokens, weight_bytes) for batch in batches]


def run_batch(
    engine: Engine,
    events: queue.SimpleQueue[list[Event]],
    random_tokens: random.Random,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
) -> Run:
    vocabulary = engine.limits.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    requests = [
        Request(
            f"bench-{random_tokens.getrandbits(64):016x}",
            [random_tokens.randrange(vocabulary) for _ in range(prompt_tokens)],
            params,
        )
        for _ in range(batch)
    ]
    for request in requests:
        engine.submit(request)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    began = float("inf")
    times: list[tuple[float, int]] = []
    while len(last) < batch:
        for event in _next(engine, events):
            if event.error is not None:
                raise event.error
            began = min(began, event.arrival_time)
            first.setdefault(event.request_id, event.time)
            times.append((event.time, len(event.token_ids)))
            if event.finish_reason is not None:
                last[event.request_id] = event.time
    all_first, end = max(first.values()), max(last.values())
    after = sum(count for when, count in times if when > all_first)
    tpot = [(last[name] - first[name]) / max(output_tokens - 1, 1) for name in first]
    return Run(
        prefill_tok_s=batch * prompt_tokens / max(all_first - began, 1e-9),
        decode_tok_s=after / max(end - all_first, 1e-9),
        ttft_s=statistics.median(when - began for when in first.values()),
        tpot_s=statistics.median(tpot),
    )


def _next(engine: Engine, events: queue.SimpleQueue[list[Event]]) -> list[Event]:
    try:
        return events.get(timeout=PATIENCE_S)
    except queue.Empty:
        engine.check_alive()
        raise EngineError("the engine produced nothing for ten minutes") from None


def _row(batch: int, runs: list[Run], prompt_tokens: int, output_tokens: int, weight_bytes: int) -> Row:
    decode = statistics.median(run.decode_tok_s for run in runs)
    return Row(
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_tok_s=round(statistics.median(run.prefill_tok_s for run in runs), 1),
        decode_tok_s=round(decode, 1),
        ttft_ms=round(statistics.median(run.ttft_s for run in runs) * 1e3, 2),
        tpot_ms=round(statistics.median(run.tpot_s for run in runs) * 1e3, 3),
        weight_gb_s=round(decode / batch * weight_bytes / 1e9, 2),
    )
