"""What the server at the other end is and can do: asked once, before a run.

Works with any OpenAI-compatible server. Where it tokenizes on request (Setpoint, vLLM, llama.cpp), prompts are exact
token ids; elsewhere they are text, as long as the server's own usage says. What a server refuses is left
out, with a note.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import httpx
import orjson

from setpoint.errors import ConfigError
from setpoint.tune.measure import EngineCounters
from setpoint.tune.replay.answer import Answer
from setpoint.tune.replay.http import Address
from setpoint.tune.replay.prompts import Prompts, words
from setpoint.workload.trace import Trace, TraceRequest

PATIENCE_S = 60.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KINDS = {"setpoint": "setpoint", "vllm": "vllm", "llamacpp": "llama.cpp"}  # `owned_by` of a model
OPTIONAL = ("continuous_usage_stats", "seed", "ignore_eos", "stream_options")  # in the order in which they are given up
MIN_POOL_TOKENS = 4096
WARM_UP_ROUNDS, WARM_UP_WINDOW, WARM_UP_SPREAD = 24, 5, 0.1


class ServerError(ConfigError):
    """The server cannot be measured as it is."""


@dataclass(frozen=True)
class Target:
    """A server, and how to ask it. `pool` holds token ids of the long text; None: prompts are text."""

    address: Address
    model: str
    kind: str
    version: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    path: str = COMPLETIONS
    fields: dict[str, Any] = field(default_factory=dict)  # of every request
    seeds: bool = True
    pool: tuple[int, ...] | None = None
    first: int | None = None  # what the tokenizer puts in front
    items_per_token: float = 1.0
    overhead_tokens: int = 0  # that a chat template adds
    max_model_len: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_forced(self) -> bool:
        """Answers end where the trace says."""
        return bool(self.fields.get("ignore_eos"))

    def job(self, trace: Trace, salt: str) -> dict[str, Any]:
        """What a process of the load generator must know."""
        names = ("model", "headers", "path", "fields", "seeds", "pool", "first", "items_per_token", "overhead_tokens")
        return {name: getattr(self, name) for name in names} | {
            "address": asdict(self.address),
            "is_forced": self.is_forced,
            "sessions": self.kind == "setpoint",
            "block_size": trace.header.block_size,
            "salt": salt,
        }

    def check(self, trace: Trace) -> None:
        """Raises ServerError naming the first request that cannot fit the server's context."""
        if self.max_model_len is None:
            return
        longest = max(request.input_tokens + request.output_tokens for request in trace.requests)
        for number, request in enumerate(trace.requests, 1):
            tokens = request.input_tokens + request.output_tokens
            if tokens > self.max_model_len:
                divisor = -(-longest * 10 // self.max_model_len) / 10
                raise ServerError(
                    f"request {number} of the trace has {request.input_tokens} + {request.output_tokens} tokens, the "
                    f"server's context holds {self.max_model_len}; see `setpoint trace scale --lengths {divisor:g}`"
                )


class Surveyor:
    """Asks one server. Errors name it in one line."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.address = Address.parse(url)
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        fresh = httpx.Limits(max_keepalive_connections=0)  # llama.cpp closes kept ones after a while or a few requests
        self._client = httpx.Client(base_url=self.address.base, headers=self.headers, timeout=PATIENCE_S, limits=fresh)

    def __enter__(self) -> Surveyor:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def target(self, model: str | None = None, *, temperature: float, natural_end: bool = False) -> Target:
        """Raises ServerError: unreachable, no such model, or it refuses the simplest request."""
        listed = self._models()
        names = [str(entry.get("id")) for entry in listed]
        if model is not None and model not in names:
            raise ServerError(
                f"the server at {self.address.base} has no model {model[:100]!r}; it has {', '.join(names)}"
            )
        entry = listed[0 if model is None else names.index(model)]
        kind = KINDS.get(str(entry.get("owned_by")), "other")
        fields: dict[str, Any] = {"temperature": temperature, "stream": True, "ignore_eos": True}
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        if natural_end:
            del fields["ignore_eos"]
        target = Target(self.address, str(entry["id"]), kind, self._version(kind), self.headers, fields=fields)
        target = replace(target, max_model_len=self._context(kind, entry))
        return self._agree(self._with_tokens(target))

    def counters(self) -> EngineCounters:
        """What the metrics page says; all None where there is none."""
        try:
            response = self._client.get("/metrics")
        except httpx.HTTPError:
            return EngineCounters()
        return read_counters(response.text) if response.status_code == 200 else EngineCounters()

    def warm_up(self, target: Target, salt: str) -> int:
        """Requests until the time to the first token has settled (spread of the last five below a tenth); how many."""
        spans: list[float] = []
        prompt_tokens = 64 if target.max_model_len is None else min(64, max(target.max_model_len // 2, 1))
        prompts: Prompts[Any] = Prompts(target.pool or words(), 16, f"{salt}/warm-up", first=target.first)
        while len(spans) < WARM_UP_ROUNDS:
            request = TraceRequest(0.0, prompt_tokens, 4)
            began = time.monotonic()
            status, answer = self._ask(target, prompts.items(request, len(spans)), 4)
            if status != 200:
                raise ServerError(f"the server refuses a request of the warm-up: {answer.outcome(status, 0, False)[1]}")
            spans.append(answer.deliveries[0][0] if answer.deliveries else time.monotonic() - began)
            last = spans[-WARM_UP_WINDOW:]
            if len(last) == WARM_UP_WINDOW and statistics.stdev(last) < WARM_UP_SPREAD * statistics.mean(last):
                break
        return len(spans)

    # What it is

    def _get(self, path: str) -> Any:
        """JSON, or None if there is no such page."""
        try:
            response = self._client.get(path)
            return response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None

    def _models(self) -> list[dict[str, Any]]:
        base = self.address.base
        try:
            response = self._client.get("/v1/models")
        except httpx.HTTPError as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise ServerError(f"no server answers at {base} ({reason}); start it or correct the URL") from None
        if response.status_code == 401:
            raise ServerError(f"the server at {base} wants a key; set SETPOINT_API_KEY")
        try:
            listed = [entry for entry in response.json()["data"] if isinstance(entry, dict) and "id" in entry]
        except (ValueError, KeyError, TypeError):
            listed = []
        if response.status_code != 200 or not listed:
            raise ServerError(
                f"{base} does not list its models ({response.status_code}); is it an OpenAI-compatible API?"
            )
        return listed

    def _version(self, kind: str) -> str:
        page = self._get({"setpoint": "/server_info", "llama.cpp": "/props"}.get(kind, "/version"))
        found = page.get("version", page.get("build_info", "")) if isinstance(page, dict) else ""
        return str(found)[:100]

    def _context(self, kind: str, entry: dict[str, Any]) -> int | None:
        found = entry.get("max_model_len")
        if kind == "llama.cpp":
            page = self._get("/props") or {}
            found = (page.get("default_generation_settings") or {}).get("n_ctx") or (entry.get("meta") or {}).get(
                "n_ctx"
            )
        return found if type(found) is int and found > 0 else None

    # How to ask it

    def _with_tokens(self, target: Target) -> Target:
        """With the long text as token ids, where the server makes them."""
        plain, marked = (self._tokenize(target, "a word", special) for special in (False, True))
        if plain is None or marked is None:
            return target
        first = marked[0] if len(marked) > len(plain) and marked[-len(plain) :] == plain else None
        step = 2000
        while step >= 20:
            pool: list[int] = []
            for start in range(0, len(words()), step):
                part = self._tokenize(target, " " + " ".join(words()[start : start + step]), False)
                if part is None:
                    break
                pool += part
            else:
                return replace(target, pool=tuple(pool), first=first) if len(pool) >= MIN_POOL_TOKENS else target
            step //= 10  # longer than the server takes at once
        return target

    def _tokenize(self, target: Target, text: str, special: bool) -> list[int] | None:
        body: dict[str, Any] = {"model": target.model, "prompt": text, "add_special_tokens": special}
        if target.kind == "llama.cpp":
            body = {"content": text, "add_special": special}
        try:
            response = self._client.post("/tokenize", json=body)
            tokens = response.json()["tokens"] if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return tokens if isinstance(tokens, list) and tokens and all(type(i) is int for i in tokens) else None

    def _agree(self, target: Target) -> Target:
        """Leaves out what the server refuses. Raises ServerError when nothing is left."""
        while True:
            prompts: Prompts[Any] = Prompts(target.pool or words(), 16, "agree", first=target.first)
            status, answer = self._ask(target, prompts.items(TraceRequest(0.0, 8, 1), 0), 1)
            _, error = answer.outcome(status, 1, False)
            if status == 200 and target.pool is not None and answer.prompt_tokens not in (0, 8):
                target = _as_text(target, f"{answer.prompt_tokens} tokens were counted for 8 ids")
            elif status == 200:
                return target if target.pool is not None else self._calibrated(target)
            elif status == 404 and target.path == COMPLETIONS:
                target = _as_text(replace(target, path=CHAT), "there is no /v1/completions")
            elif (fewer := _without_refused(target, error)) is not None:
                target = fewer
            elif target.pool is not None:
                target = _as_text(target, error)
            else:
                raise ServerError(f"the server at {self.address.base} refuses a plain request: {error}")

    def _calibrated(self, target: Target) -> Target:
        """Words a token, and tokens of a template, from what the server counts for two texts."""
        counts = []
        for num_words in (40, 160):
            status, answer = self._ask(target, list(words()[:num_words]), 1)
            counts.append(answer.prompt_tokens if status == 200 else 0)
        if min(counts) == 0 or counts[1] <= counts[0]:
            return replace(target, items_per_token=0.75, notes=(*target.notes, "prompts are text of about this length"))
        per_token = 120 / (counts[1] - counts[0])
        overhead = max(0, round(counts[0] - 40 / per_token))
        return replace(target, items_per_token=per_token, overhead_tokens=overhead)

    def _ask(self, target: Target, items: list[Any], max_tokens: int) -> tuple[int, Answer]:
        body: dict[str, Any] = {"model": target.model, **target.fields, "max_tokens": max_tokens}
        if target.seeds:
            body["seed"] = 1
        if target.pool is None:
            text = " ".join(items)
            chat = target.path == CHAT
            body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        else:
            body["prompt"] = items
        answer = Answer(time.monotonic())
        try:
            headers = {"Content-Type": "application/json"}
            with self._client.stream("POST", target.path, content=orjson.dumps(body), headers=headers) as response:
                for piece in response.iter_bytes():
                    answer.feed(response.status_code, piece, time.monotonic())
                return response.status_code, answer
        except httpx.HTTPError as error:
            raise ServerError(
                f"the server at {self.address.base} does not answer: {error or type(error).__name__}"
            ) from None


def _as_text(target: Target, why: str) -> Target:
    note = f"prompts are text, not token ids: {why}"
    return replace(target, pool=None, first=None, notes=(*target.notes, note))


def _without_refused(target: Target, error: str) -> Target | None:
    """One optional field less: the one that the refusal names, or the next in turn; None when there is none left."""
    present = [name for name in OPTIONAL if _has(target, name)]
    if not present:
        return None
    name = next((name for name in present if name in error), present[0])
    fields = {key: value for key, value in target.fields.items() if key != name}
    if name == "continuous_usage_stats":
        fields["stream_options"] = {"include_usage": True}
    note = f"the server does not take {name}"
    return replace(target, fields=fields, seeds=target.seeds and name != "seed", notes=(*target.notes, note))


def _has(target: Target, name: str) -> bool:
    if name == "continuous_usage_stats":
        return name in target.fields.get("stream_options", {})
    return target.seeds if name == "seed" else name in target.fields


_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)", re.M)


def read_counters(page: str) -> EngineCounters:
    """From a Prometheus page of Setpoint, vLLM (the same names) or llama.cpp."""
    totals: dict[str, float] = {}
    pool = None
    for name, labels, value in _samples(page):
        totals[name] = totals.get(name, 0.0) + value
        if name == "vllm:cache_config_info":
            found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if found.get("num_gpu_blocks", "").isdigit() and found.get("block_size", "").isdigit():
                pool = int(found["num_gpu_blocks"]) * int(found["block_size"])

    def total(*names: str) -> int | None:
        return next((int(totals[name]) for name in names if name in totals), None)

    return EngineCounters(
        prompt_tokens=total("vllm:prompt_tokens_total"),
        generation_tokens=total("vllm:generation_tokens_total", "llamacpp:tokens_predicted_total"),
        finished=total("vllm:request_success_total"),
        rejected=total("setpoint_requests_rejected_total"),
        preemptions=total("vllm:num_preemptions_total"),
        kv_pool_tokens=pool,
    )


def _samples(page: str) -> Iterator[tuple[str, str, float]]:
    for name, labels, value in _SAMPLE.findall(page):
        try:
            yield name, labels, float(value)
        except ValueError:
            continue
