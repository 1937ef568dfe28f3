"""Why a request took as long as it did, for the key that sent it: `GET /v1/requests/{id}/explain`.

The engine keeps what happened to its sequences; here is what it does not know: which key may ask, when the HTTP request
came and when its answer was over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from setpoint.engine.explanation import MAX_SENTENCES, WORTH_S, WORTH_SHARE, Explanation, advice, totals
from setpoint.engine.timeline import Span, Timeline
from setpoint.server.generation import Generation

MAX_REQUESTS = 1024
_OURS = ("prepare", "delivery")  # spans that the engine does not know


@dataclass(slots=True)
class _Answered:
    tenant: str
    received: float
    engine_ids: tuple[str, ...]
    grammar_s: float
    ended: float | None = None
    ending: str | None = None


class Explanations:
    """The last requests, running or over. For the event loop."""

    def __init__(
        self, explain: Callable[[str], Explanation | None], clock: Callable[[], float], limit: int = MAX_REQUESTS
    ) -> None:
        self._explain = explain
        self._clock = clock
        self._limit = limit
        self._answers: OrderedDict[str, _Answered] = OrderedDict()

    def begin(self, generation: Generation, received: float) -> None:
        """A request was handed to the engine; it came at `received`."""
        job = generation.job
        self._answers[job.id] = _Answered(job.tenant, received, tuple(generation.engine_ids), job.grammar_s)
        if len(self._answers) > self._limit:
            self._answers.popitem(last=False)

    def end(self, generation: Generation, ending: str) -> None:
        answered = self._answers.get(generation.job.id)
        if answered is not None:
            answered.ended, answered.ending = self._clock(), ending

    def body(self, request_id: str, tenant: str) -> dict[str, Any] | None:
        """The answer; None for what is unknown, forgotten, or another key's."""
        answered = self._answers.get(request_id)
        if answered is None or answered.tenant != tenant:
            return None
        found = [explained for engine_id in answered.engine_ids if (explained := self._explain(engine_id)) is not None]
        if not found:
            return None
        explained = Explanation(
            tuple(timeline for one in found for timeline in one.timelines),
            found[0].limits,
            max(one.at for one in found),
        )
        return _body(request_id, answered, explained)


def _body(request_id: str, answered: _Answered, explained: Explanation) -> dict[str, Any]:
    timeline = explained.critical
    zero = min(answered.received, timeline.submitted)
    path = [_span(span, zero) for span in timeline.spans]
    if timeline.submitted > zero:
        path.insert(0, _prepare(timeline.submitted - zero, answered.grammar_s))
    end = explained.at if timeline.finished is None else timeline.finished
    if timeline.finished is not None:
        over = explained.at if answered.ended is None else answered.ended
        if over > end:
            path.append(_own("delivery", end - zero, over - zero))
            end = over
    first = timeline.first_token
    return {
        "id": request_id,
        "object": "request.explanation",
        "state": "running" if timeline.finished is None or answered.ended is None else "finished",
        "ending": answered.ending,
        "finish_reason": timeline.finish_reason,
        "num_choices": len(explained.timelines),
        "choice": explained.timelines.index(timeline),
        "e2e_s": end - zero,
        "ttft_s": None if first is None else first - zero,
        "path": path,
        "causes": {cause.value: seconds for cause, seconds in totals(timeline).items()}
        | {cause: seconds for span in path if span["kind"] in _OURS for cause, seconds in span["parts"].items()},
        "tokens": {
            "prompt": timeline.num_prompt,
            "output": timeline.num_output,
            "cached": timeline.cached_tokens,
            "from_memory": timeline.memory_tokens,
            "from_disk": timeline.disk_tokens,
            "drafted": timeline.num_drafted,
            "accepted": timeline.num_accepted,
            "forced": timeline.num_forced,
        },
        "queue": {"ahead": timeline.num_ahead, "overtaken_by": timeline.overtaken_by},
        "num_preemptions": timeline.num_preemptions,
        "prefix_divergence": _divergence(timeline),
        "advice": [*_grammar_advice(path, end - zero), *advice(timeline, explained.limits)][:MAX_SENTENCES],
    }


def _divergence(timeline: Timeline) -> dict[str, Any] | None:
    found = timeline.divergence
    if found is None:
        return None
    return {"cause": found.cause, "token_index": found.token_index, "lost_tokens": found.num_lost_tokens}


def _prepare(seconds: float, grammar_s: float) -> dict[str, Any]:
    span = _own("prepare", 0.0, seconds)
    if grammar_s > 0.0:
        grammar_s = min(grammar_s, seconds)
        span["parts"] = {"grammar": grammar_s, "prepare": seconds - grammar_s}
    return span


def _grammar_advice(path: list[dict[str, Any]], whole_s: float) -> list[str]:
    seconds = next((span["parts"].get("grammar", 0.0) for span in path if span["kind"] == "prepare"), 0.0)
    if seconds < max(WORTH_S, WORTH_SHARE * whole_s):
        return []
    return [
        f"Waited {seconds * 1e3:.0f} ms ({seconds / whole_s:.0%}) until its grammar was compiled; the next request "
        "with the same one finds it."
    ]


def _own(kind: str, start: float, end: float) -> dict[str, Any]:
    return {"kind": kind, "start_s": start, "end_s": end, "parts": {kind: end - start}}


def _span(span: Span, zero: float) -> dict[str, Any]:
    counts = {
        "steps": span.num_steps,
        "tokens": span.num_tokens,
        "steps_with_prompts": span.num_mixed_steps,
        "others_tokens": span.others_tokens,
        "starved_steps": span.starved_steps,
        "paced_steps": span.paced_steps,
    }
    return {
        "kind": span.kind.value,
        "start_s": span.start - zero,
        "end_s": span.end - zero,
        "parts": {cause.value: seconds for cause, seconds in span.parts},
        **{name: count for name, count in counts.items() if count},
    }
