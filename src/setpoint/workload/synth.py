"""Traces made from shipped statistics: lengths drawn from quantile tables, arrivals with real burstiness.

A preset is a kind of product: `chat` (sessions, a shared system prompt), `code` (completion in bursts), `rag`
(documents that are asked about more than once), `agent` (tool loops over a growing prompt), `batch` (everything at
once, by few clients). The same seed gives the same trace.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from setpoint.errors import ConfigError
from setpoint.workload import arrivals
from setpoint.workload.tables import Floats, Quantiles, lengths, table
from setpoint.workload.trace import Trace, TraceHeader, TraceRequest

BLOCK_SIZE = 16
MAX_REQUESTS = 5_000_000
_WARM_UP_S = 1800.0


@dataclass
class _Synthesis:
    """What a preset draws from."""

    rng: np.random.Generator
    rate: float  # requests a second
    seconds: float
    length_scale: float
    _ids: Iterator[int] = field(default_factory=itertools.count)

    def scaled(self, tokens: float) -> int:
        return max(1, round(float(tokens) / self.length_scale))

    def session_starts(self, mean_turns: float) -> Floats:
        """From long before the trace, so that it begins among sessions that are under way."""
        times = arrivals.drifting(self.rng, self.rate / mean_turns, self.seconds + _WARM_UP_S)
        return times - _WARM_UP_S

    def blocks(self, num_tokens: int) -> list[int]:
        """New ids for the full blocks of so many tokens."""
        return list(itertools.islice(self._ids, num_tokens // BLOCK_SIZE))


def synthesize(preset: str, *, rate: float, seconds: float, seed: int = 0, length_scale: float = 1.0) -> Trace:
    """`length_scale` divides all lengths: 8 makes a trace for a model with an eighth of the context."""
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset[:64]!r}; choose one of {', '.join(PRESETS)}")
    if not (0 < rate <= 1e6 and 0 < seconds <= 1e8 and rate * seconds <= MAX_REQUESTS):
        raise ConfigError(f"rate and seconds must be above 0, and give at most {MAX_REQUESTS} requests")
    if not 0.01 <= length_scale <= 1e4:
        raise ConfigError("the length scale must be in 0.01..10000")
    make, sources = PRESETS[preset]
    synthesis = _Synthesis(np.random.default_rng(seed), rate, seconds, length_scale)
    requests = sorted(make(synthesis), key=lambda request: request.arrival_s)
    if not requests:
        raise ConfigError(f"{seconds:g} s at {rate:g} requests/s gave no request; ask for more of either")
    scaling = [f"lengths / {length_scale:g}"] if length_scale != 1.0 else []
    origin = f"setpoint synth {preset}, {rate:g}/s, seed {seed}, from {', '.join(sources)}"
    licence = "; ".join(dict.fromkeys(str(table(source)["licence"]) for source in sources))
    return Trace(TraceHeader(origin, licence, BLOCK_SIZE, tuple(scaling)), requests)


def from_table(source: str, *, rate: float | None, seconds: float, seed: int = 0) -> Trace:
    """Independent requests with the lengths and the arrivals of one source, for comparison with it."""
    rng = np.random.default_rng(seed)
    rate = table(source)["rate_rps"] if rate is None else rate
    times = (arrivals.bursts if "on_off" in table(source) else arrivals.drifting)(rng, rate, seconds, source)
    inputs, outputs = (lengths(source, which).draw(rng, len(times)) for which in ("input_len", "output_len"))
    requests = [
        TraceRequest(float(t), max(1, round(num_in)), max(1, round(num_out)))
        for t, num_in, num_out in zip(times, inputs, outputs, strict=True)
    ]
    return Trace(TraceHeader(f"setpoint synth from {source}, seed {seed}", table(source)["licence"]), requests)


def _chat(s: _Synthesis) -> Iterator[TraceRequest]:
    """Sessions of one turn or more; every prompt begins with the product's system prompt and its own history."""
    source, turns = "azure2023_conv", table("mooncake_conversation")["prefix"]["turns"]
    first, outputs = lengths(source, "input_len"), lengths(source, "output_len")
    growth, pause = (Quantiles.of(turns[name]) for name in ("input_growth_tokens", "continuation_gap_s"))
    weights = np.asarray([*turns["p_turn_1_to_10"], turns["p_turn_over_10"]])
    # The table says how many requests are k-th turns: sessions of at least k turns.
    reach = weights / weights[0]
    mean_turns = float(reach.sum())
    system = s.blocks(s.scaled(256))
    for number, start in enumerate(s.session_starts(mean_turns)):
        draw = s.rng.random()
        num_turns = int(np.count_nonzero(reach > draw))
        yield from _session(
            s,
            _Session(f"chat-{number}", float(start), num_turns, "chat", system),
            first=lambda: s.scaled(first.draw(s.rng, 1)[0]),
            more=lambda: s.scaled(np.clip(growth.draw(s.rng, 1)[0] * 0.25, 8, 4000)),
            output=lambda: s.scaled(outputs.draw(s.rng, 1)[0]),
            pause=lambda: float(pause.draw(s.rng, 1)[0]),
        )


def _agent(s: _Synthesis) -> Iterator[TraceRequest]:
    """Tool loops: many short steps over a prompt that only grows; one in ten pauses for a person."""
    system = s.blocks(s.scaled(2000))
    mean_turns = 12.0
    for number, start in enumerate(s.session_starts(mean_turns)):
        num_turns = 1 + int(s.rng.geometric(1.0 / (mean_turns - 1.0)))
        yield from _session(
            s,
            _Session(f"agent-{number}", float(start), num_turns, "agent", system),
            first=lambda: s.scaled(2000 + s.rng.lognormal(6.5, 0.9)),
            more=lambda: s.scaled(s.rng.lognormal(5.6, 1.1)),
            output=lambda: s.scaled(np.clip(s.rng.lognormal(4.7, 0.8), 8, 4000)),
            pause=lambda: float(s.rng.lognormal(0.7, 1.0) if s.rng.random() < 0.9 else s.rng.lognormal(4.0, 1.2)),
        )


@dataclass(frozen=True)
class _Session:
    name: str
    start_s: float
    num_turns: int
    class_name: str
    system: list[int]  # blocks that every session of the product begins with


def _session(
    s: _Synthesis,
    session: _Session,
    first: Callable[[], int],
    more: Callable[[], int],
    output: Callable[[], int],
    pause: Callable[[], float],
) -> Iterator[TraceRequest]:
    """Turns whose prompt is all that was said before and something new."""
    now, history, tokens = session.start_s, list(session.system), first()
    for turn in range(session.num_turns):
        think = None
        if turn:
            think = pause()
            now += think
        if now >= s.seconds:
            return
        if now < 0:
            tokens += output() + more()
            continue
        tokens = max(tokens, len(session.system) * BLOCK_SIZE + 1)
        history += s.blocks(tokens - len(history) * BLOCK_SIZE)
        answer = output()
        ids = tuple(history[: tokens // BLOCK_SIZE])
        yield TraceRequest(now, tokens, answer, ids, None, session.name, turn, think, session.class_name)
        tokens += answer + more()


def _code(s: _Synthesis) -> Iterator[TraceRequest]:
    """Completion in an editor: bursts of long prompts with short answers."""
    source = "azure2023_code"
    times = arrivals.bursts(s.rng, s.rate, s.seconds)
    yield from _independent(s, times, lengths(source, "input_len"), lengths(source, "output_len"), "code")


def _independent(
    s: _Synthesis, times: Floats, inputs: Quantiles, outputs: Quantiles, class_name: str
) -> Iterator[TraceRequest]:
    drawn = zip(times, inputs.draw(s.rng, len(times)), outputs.draw(s.rng, len(times)), strict=True)
    for t, num_in, num_out in drawn:
        tokens = s.scaled(num_in)
        yield TraceRequest(float(t), tokens, s.scaled(num_out), tuple(s.blocks(tokens)), class_name=class_name)


def _rag(s: _Synthesis) -> Iterator[TraceRequest]:
    """A system prompt, a document that others asked about before (Zipf), and a question."""
    documents = lengths("arxiv_summarization", "input_len")
    outputs = lengths("arxiv_summarization", "output_len")
    times = arrivals.drifting(s.rng, s.rate, s.seconds)
    system = s.blocks(s.scaled(256))
    library: dict[int, list[int]] = {}
    for t, rank, num_out in zip(times, s.rng.zipf(1.3, len(times)), outputs.draw(s.rng, len(times)), strict=True):
        document = int(min(rank, 100_000))
        if document not in library:
            library[document] = s.blocks(s.scaled(documents.draw(s.rng, 1)[0]))
        shared = system + library[document]
        question = s.scaled(np.clip(s.rng.lognormal(3.5, 0.6), 8, 500))
        tokens = len(shared) * BLOCK_SIZE + question
        ids = (*shared, *s.blocks(question))
        yield TraceRequest(float(t), tokens, s.scaled(np.clip(num_out, 1, 1000)), ids, class_name="rag")


def _batch(s: _Synthesis) -> Iterator[TraceRequest]:
    """Few clients that send in lumps; nobody waits for a single answer."""
    source = "servegen_m_mid"
    facts = table(source)
    shares = facts["top_client_load_share"][:8]
    variation = Quantiles.of(facts["client_iat_cv_load_weighted"])
    variations = np.maximum(variation.draw(s.rng, len(shares)), 1.0).tolist()
    times, _ = arrivals.superposed(s.rng, s.rate, s.seconds, shares, variations)
    yield from _independent(s, times, lengths(source, "input_len"), lengths(source, "output_len"), "batch")


_Make = Callable[[_Synthesis], Iterator[TraceRequest]]
PRESETS: dict[str, tuple[_Make, tuple[str, ...]]] = {  # name -> (maker, tables it draws from)
    "chat": (_chat, ("azure2023_conv", "mooncake_conversation")),
    "code": (_code, ("azure2023_code",)),
    "rag": (_rag, ("arxiv_summarization", "azure2023_conv")),
    "agent": (_agent, ("azure2023_conv",)),
    "batch": (_batch, ("servegen_m_mid",)),
}
