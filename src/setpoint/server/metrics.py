"""Prometheus metrics, under vLLM's names where the concept is shared: dashboards and autoscalers work unchanged.

Totals and gauges are read from the engine when the page is asked for; histograms are filled when a request ends.
Only what exists is exported: no gauge without a setter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from setpoint.engine.pacer import Pacer
from setpoint.engine.pacing_counters import PacingCounters
from setpoint.engine.stats import STEP_TOKEN_BOUNDS, EngineStats, SpeculationCounters
from setpoint.grammar.compiler import GrammarCompiler
from setpoint.server.generation import Generation

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
TTFT_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_S: Final = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_S: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
CHOICES: Final = (1, 2, 5, 10, 20)
PREEMPTIONS: Final = (1, 2, 3, 4, 5, 10, 20)
_LABELS: Final = ("model_name", "engine")


def token_buckets(max_model_len: int) -> tuple[int, ...]:
    """1 2 5 10 20 50 ... up to the context length."""
    series = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    return tuple(value for value in series if value <= max_model_len)


class Metrics:
    """One registry per server. `stats` reads the engine, `cache_info` are constant labels of the KV cache."""

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        stats: Callable[[], EngineStats],
        *,
        version: str,
        cache_info: Mapping[str, str],
        grammars: GrammarCompiler | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._label_values = (model_name, "0")
        tokens = token_buckets(max_model_len)
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Gap between tokens of a choice.", ITL_S)
        self._tpot = self._histogram("request_time_per_output_token_seconds", "Mean gap of a request.", ITL_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", LATENCY_S)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first step.", LATENCY_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "First step to first token.", LATENCY_S)
        self._decode = self._histogram("request_decode_time_seconds", "First to last token.", LATENCY_S)
        self._inference = self._histogram("request_inference_time_seconds", "First step to last token.", LATENCY_S)
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of the prompts.", tokens)
        self._output_tokens = self._histogram("request_generation_tokens", "Tokens generated.", tokens)
        self._longest = self._histogram("request_max_num_generation_tokens", "Tokens of the longest choice.", tokens)
        self._computed = self._histogram("request_prefill_kv_computed_tokens", "Prompt tokens not cached.", tokens)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens asked for.", tokens)
        self._n = self._histogram("request_params_n", "n asked for.", CHOICES)
        self._preemptions = self._histogram("request_num_preemptions", "Preemptions of a request.", PREEMPTIONS)
        self._success = self._counter("vllm:request_success", "Finished choices.", "finished_reason")
        self._rejected = self._counter("setpoint_requests_rejected", "Requests answered with an error.", "reason")
        self._registry.register(_EngineCollector(self._label_values, stats, version, cache_info, grammars, pacer))

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(*self._label_values, reason).inc()

    def finished(self, generation: Generation, ending: str) -> None:
        """Account for a generation that was submitted. `ending` is "ok", "error", "disconnected" or "stalled"."""
        if ending != "ok":
            return
        for choice in generation.choices:
            self._success.labels(*self._label_values, choice.finish_reason).inc()
        prompt = generation.num_prompt_tokens
        params = generation.job.prompts[0].params
        self._observe(self._prompt_tokens, prompt)
        self._observe(self._computed, prompt - generation.num_cached_tokens)
        self._observe(self._output_tokens, generation.num_output_tokens)
        self._observe(self._longest, max(choice.num_tokens for choice in generation.choices))
        self._observe(self._n, params.n)
        self._observe(self._max_tokens, params.max_tokens)
        self._observe(self._preemptions, generation.num_preemptions)
        self._times(generation)

    def _times(self, generation: Generation) -> None:
        timing = generation.timing
        self._span(self._queue, timing.arrival, timing.scheduled)
        self._span(self._prefill, timing.scheduled, timing.first_token)
        self._span(self._ttft, timing.arrival, timing.first_token)
        self._span(self._decode, timing.first_token, timing.last_token)
        self._span(self._inference, timing.scheduled, timing.last_token)
        self._span(self._e2e, timing.arrival, timing.last_token)
        num_gaps = sum(num_tokens for _, num_tokens in timing.gaps)
        for gap, num_tokens in timing.gaps:
            for _ in range(num_tokens):
                self._observe(self._itl, gap / num_tokens)
        if num_gaps:
            self._observe(self._tpot, sum(gap for gap, _ in timing.gaps) / num_gaps)

    def _span(self, histogram: Histogram, begin: float | None, end: float | None) -> None:
        if begin is not None and end is not None:
            self._observe(histogram, end - begin)

    def _observe(self, histogram: Histogram, value: float | None) -> None:
        if value is not None:
            histogram.labels(*self._label_values).observe(value)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, _LABELS, buckets=tuple(buckets), registry=self._registry)
        histogram.labels(*self._label_values)
        return histogram

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, (*_LABELS, label), registry=self._registry)


class _EngineCollector(Collector):
    """Everything that the engine counts itself, read once per page."""

    def __init__(
        self,
        label_values: tuple[str, str],
        stats: Callable[[], EngineStats],
        version: str,
        cache_info: Mapping[str, str],
        grammars: GrammarCompiler | None,
        pacer: Pacer | None,
    ) -> None:
        self._labels = label_values
        self._pacer = pacer
        self._grammars = grammars
        self._stats = stats
        self._version = version
        self._cache_info = dict(cache_info)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield self._step_tokens(stats)
        if self._grammars is not None:
            yield from self._grammar_caches(self._grammars)
        if self._pacer is not None:
            yield from self._pacing(self._pacer.counters)
        yield self._family(GaugeMetricFamily, "vllm:cache_config_info", "The KV cache.", 1, self._cache_info)
        yield self._family(GaugeMetricFamily, "setpoint_build_info", "This build.", 1, {"version": self._version})

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences in the batch.", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences waiting.", stats.num_waiting + stats.num_deferred),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use; 1 is full.", stats.kv_usage),
            ("setpoint_queue_oldest_age_seconds", "Age of the oldest waiting request.", stats.oldest_queue_age_s),
            ("setpoint_engine_heartbeat_age_seconds", "Since the engine loop last advanced.", stats.heartbeat_age_s),
            ("setpoint_kv_blocks_leaked", "Blocks used by no sequence; must be 0.", stats.kv_blocks_leaked),
            ("setpoint_sessions", "Sessions whose prefixes are kept.", stats.num_sessions),
            ("setpoint_kv_host_bytes", "KV blocks in host memory, below the cache.", stats.host_tier_bytes),
        ):
            yield self._family(GaugeMetricFamily, name, text, value)
        reasons = {"capacity": stats.num_waiting, "deferred": stats.num_deferred}
        yield self._split(
            GaugeMetricFamily, "vllm:num_requests_waiting_by_reason", "Sequences waiting, by why.", "reason", reasons
        )

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        totals = stats.counters
        over_budget = stats.num_sessions_over_budget
        for name, text, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", totals.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found.", totals.prefix_hits),
            ("vllm:external_prefix_cache_queries", "Prompt tokens looked up below it.", totals.external_queries),
            ("vllm:external_prefix_cache_hits", "Prompt tokens restored.", totals.external_hits),
            ("setpoint_sessions_expired", "Sessions unused for too long.", stats.num_sessions_expired),
            ("setpoint_sessions_over_budget", "Sessions that their tenant had no share left for.", over_budget),
            ("vllm:num_preemptions", "Preemptions.", totals.preemptions),
            ("vllm:prompt_tokens", "Prompt tokens of admitted requests.", totals.prompt_tokens),
            ("vllm:prompt_tokens_cached", "Of these, cached.", totals.prompt_tokens_cached),
            ("vllm:generation_tokens", "Tokens generated.", totals.generation_tokens),
            ("setpoint_forced_tokens", "Of these, the only ones that a grammar allowed.", totals.forced_tokens),
            ("setpoint_output_violations", "Outputs that broke their grammar; must be 0.", totals.output_violations),
        ):
            yield self._family(CounterMetricFamily, name, text, value)
        if totals.speculation.methods:
            yield from self._speculation(totals.speculation)
        cached = totals.prompt_tokens_cached
        restored = totals.prompt_tokens_restored
        sources = {
            "local_compute": totals.prompt_tokens - cached,
            "local_cache_hit": cached - restored,
            "external_kv_transfer": restored,
        }
        yield self._split(
            CounterMetricFamily, "vllm:prompt_tokens_by_source", "Prompt tokens, by source.", "source", sources
        )
        yield self._split(
            CounterMetricFamily, "vllm:admission_rejections", "Refused by the engine.", "reason", stats.rejected
        )
        missed = "Prompts that found less than their session had, by why."
        yield self._split(CounterMetricFamily, "setpoint_prefix_divergences", missed, "cause", totals.divergences)
        ended_early = "Requests ended before their time, by where they stood."
        yield self._split(
            CounterMetricFamily, "setpoint_requests_aborted", ended_early, "state", totals.aborted_by_state
        )

    def _speculation(self, totals: SpeculationCounters) -> Iterator[Metric]:
        for name, text, value in (
            ("vllm:spec_decode_num_drafts", "Chains of drafts verified.", totals.num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", totals.draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Of these, accepted.", totals.accepted_tokens),
        ):
            yield self._family(CounterMetricFamily, name, text, value)
        for name, text, counts in (
            ("vllm:spec_decode_num_accepted_tokens_per_pos", "Drafts accepted, by place.", totals.accepted_at),
            ("setpoint_spec_decode_draft_tokens_per_pos", "Drafts verified, by place.", totals.drafted_at),
        ):
            yield self._split(CounterMetricFamily, name, text, "position", {str(i): n for i, n in enumerate(counts)})
        drafted = {method: tried for method, (tried, _) in totals.methods.items()}
        accepted = {method: right for method, (_, right) in totals.methods.items()}
        name = "setpoint_spec_decode_tokens_by_method"
        yield self._split(CounterMetricFamily, name, "Tokens drafted, by who guessed.", "method", drafted)
        name = "setpoint_spec_decode_accepted_tokens_by_method"
        yield self._split(CounterMetricFamily, name, "Of these, accepted.", "method", accepted)
        text = (
            "Time that drafts saved so far, by the measured cost of steps; below zero they cost more than they brought."
        )
        yield self._family(GaugeMetricFamily, "setpoint_spec_decode_saved_seconds", text, totals.saved_seconds)

    def _pacing(self, counters: PacingCounters) -> Iterator[Metric]:
        for name, text, value in (
            ("setpoint_slo_step_budget", "Tokens of the last step that had prompts to compute.", counters.budget),
            ("setpoint_slo_slack_seconds", "Until the next deadline, as of that step.", counters.least_slack_s),
            ("setpoint_slo_late_prompts", "Prompts that cannot be in time any more.", counters.num_late),
            ("setpoint_slo_max_running", "Sequences that may run at once.", counters.max_running),
        ):
            yield self._family(GaugeMetricFamily, name, text, value)
        shares = {str(rank): share.good for rank, share in dict(counters.classes).items()}
        shed = {str(rank): count for rank, count in dict(counters.shed).items()}
        text = "Share of the last answers that met their targets."
        yield self._split(GaugeMetricFamily, "setpoint_slo_attainment", text, "priority", shares)
        yield self._split(CounterMetricFamily, "setpoint_slo_shed", "Refused as they would be late.", "priority", shed)
        text = "Steps whose budget a deadline set."
        yield self._family(CounterMetricFamily, "setpoint_slo_bound_steps", text, counters.num_bound_steps)
        if not counters.outside:
            return
        text = "Row of the recipe's envelope that is in force, from 0."
        yield self._family(GaugeMetricFamily, "setpoint_slo_row", text, counters.row)
        text = "Switches between rows of the recipe's envelope."
        yield self._family(CounterMetricFamily, "setpoint_slo_row_switches", text, counters.num_switches)
        text = "1 where the traffic is none that the recipe was certified on."
        outside = {what: int(found) for what, found in dict(counters.outside).items()}
        yield self._split(GaugeMetricFamily, "setpoint_slo_outside_certificate", text, "what", outside)

    def _grammar_caches(self, grammars: GrammarCompiler) -> Iterator[Metric]:
        counts = grammars.cache_counts()
        entries = {name: cache.num_entries for name, cache in counts.items()}
        evicted = {name: cache.num_evicted for name, cache in counts.items()}
        name = "setpoint_grammar_cache_entries"
        yield self._split(GaugeMetricFamily, name, "Grammars remembered as proved or refused.", "cache", entries)
        name = "setpoint_grammar_cache_evictions"
        yield self._split(CounterMetricFamily, name, "Of these, given up for newer ones.", "cache", evicted)

    def _step_tokens(self, stats: EngineStats) -> Metric:
        steps = stats.counters.step_tokens
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens per step.", labels=_LABELS)
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*STEP_TOKEN_BOUNDS, None), steps.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound is None else str(float(bound)), total))
        family.add_metric(self._labels, buckets, steps.num_tokens)
        return family

    def _split(
        self,
        family_type: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        label: str,
        values: Mapping[str, float],
    ) -> Metric:
        family = family_type(name, text, labels=(*_LABELS, label))
        for key, value in values.items():
            family.add_metric((*self._labels, key), value)
        return family

    def _family(
        self,
        family_type: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        value: float,
        more_labels: Mapping[str, str] = MappingProxyType({}),
    ) -> Metric:
        family = family_type(name, text, labels=(*_LABELS, *more_labels))
        family.add_metric((*self._labels, *more_labels.values()), value)
        return family
