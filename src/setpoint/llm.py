"""The Python API: `LLM(model).generate(prompts, params)` and `.chat(messages)`, in this process."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from setpoint.assemble import Assembly, build_engine
from setpoint.assemble import require_chat_template as chat_template_of
from setpoint.config import EngineConfig
from setpoint.engine.events import Event, TokenLogprob
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.errors import ConfigError, QueueFullError, RequestError
from setpoint.loaders.download import Progress, silent
from setpoint.text.stream import TextStream
from setpoint.text.tokenizer import Tokenizer

OnText = Callable[[int, str], None]  # (index of the prompt, new text), for choice 0
Messages = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. `finish_reason` is 'stop' or 'length'; `stop_reason` the stop string or token id."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request, in seconds."""

    queue_time_s: float = 0.0
    time_to_first_token_s: float = 0.0
    total_s: float = 0.0
    decode_tokens_per_s: float = 0.0  # after the first token, all choices together


@dataclass(slots=True)
class RequestOutput:
    """A prompt with its `n` continuations."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0


class _Collector:
    """Turns the events of one request into its RequestOutput."""

    def __init__(
        self, request: Request, prompt: str | None, tokenizer: Tokenizer, on_text: Callable[[str], None]
    ) -> None:
        params = request.params
        self.request, self.on_text = request, on_text
        self.output = RequestOutput(
            request.request_id, prompt, request.prompt_token_ids, [CompletionOutput(i) for i in range(params.n)]
        )
        if params.logprobs is not None:
            for completion in self.output.outputs:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
        self.streams = [
            TextStream(
                tokenizer,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            )
            for _ in range(params.n)
        ]
        self.first_time: float | None = None
        self.last_time = 0.0

    def accept(self, event: Event) -> bool:
        """Take one event; True when its sequence has met a stop string and must be aborted."""
        completion = self.output.outputs[event.index]
        if event.error is not None:
            raise event.error
        if completion.finish_reason is not None:
            return False  # tokens that were under way when the stop string was found
        if event.prompt_logprobs is not None:
            self.output.prompt_logprobs = list(event.prompt_logprobs)
        if event.index == 0:
            self.output.num_cached_tokens = event.num_cached_tokens
        if event.token_ids and self.first_time is None:
            self.first_time = event.time
        self.last_time = event.time
        stopped = self._add_tokens(completion, event)
        if completion.finish_reason is not None and all(out.finish_reason for out in self.output.outputs):
            self._finish(event)
        return stopped

    def _add_tokens(self, completion: CompletionOutput, event: Event) -> bool:
        final = event.finish_reason is not None
        delta = self.streams[event.index].push(self._visible(event), final=final)
        accepted = len(event.token_ids) if delta.stop is None else delta.num_tokens
        completion.token_ids.extend(event.token_ids[:accepted])
        completion.text += delta.text
        if event.index == 0 and delta.text:
            self.on_text(delta.text)
        if completion.logprobs is not None and event.logprobs is not None:
            kept = event.logprobs[:accepted]
            completion.logprobs.extend(kept)
            completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + sum(p.logprob for p in kept)
        if delta.stop is not None:
            completion.finish_reason, completion.stop_reason = "stop", delta.stop
            return not final
        completion.finish_reason, completion.stop_reason = event.finish_reason, event.stop_reason
        return False

    def _visible(self, event: Event) -> Sequence[int]:
        """Token ids that become text: the token that ended the sequence stays out of it, as in the OpenAI API."""
        if event.finish_reason == "stop" and event.token_ids and event.token_ids[-1] in self.request.stop_ids:
            return event.token_ids[:-1]
        return event.token_ids

    def _finish(self, event: Event) -> None:
        first = event.time if self.first_time is None else self.first_time
        decoded = sum(len(out.token_ids) for out in self.output.outputs) - len(self.output.outputs)
        elapsed = self.last_time - first
        self.output.finished = True
        self.output.metrics = RequestMetrics(
            queue_time_s=event.queued_s,
            time_to_first_token_s=first - event.arrival_time,
            total_s=event.time - event.arrival_time,
            decode_tokens_per_s=decoded / elapsed if elapsed > 0 else 0.0,
        )


class LLM:
    """An engine in this process. A context manager; leaves no thread behind.

    `LLM("smollm2-135m")`, `LLM("model.gguf", max_model_len=2048)`: keyword arguments are the knobs of `EngineConfig`.
    Raises ConfigError or ModelError before any work is done.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        progress: Progress = silent,
        phase: Callable[[str], None] = lambda name: None,
        **knobs: Any,
    ) -> None:
        if (model is None) == (config is None):
            raise ConfigError("give either a model or a config")
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        if config is None:
            try:
                config = EngineConfig(model=model or "", **knobs)
            except TypeError as error:
                raise ConfigError(f"unknown knob: {str(error).rpartition('argument ')[2]}") from error
        self._assembly: Assembly = build_engine(config, self._events.put, progress=progress, phase=phase)
        self._ids = itertools.count()
        self._lock = threading.Lock()  # one generate() at a time owns the event queue
        self._assembly.engine.start()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and release its memory; safe to call twice."""
        self._assembly.engine.shutdown()

    @property
    def config(self) -> EngineConfig:
        """The resolved configuration."""
        return self._assembly.config

    def get_tokenizer(self) -> Tokenizer:
        return self._assembly.tokenizer

    def require_chat_template(self) -> None:
        """Raise RequestError when the model has no chat template."""
        chat_template_of(self._assembly)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt (text or token ids); results keep the order of the prompts.

        Raises RequestError naming the field, before anything runs, when one of them is invalid.
        """
        many: Sequence[Any] = [prompts] if isinstance(prompts, str) else prompts
        tokenizer = self._assembly.tokenizer
        texts = [prompt if isinstance(prompt, str) else None for prompt in many]
        ids = [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in many]
        return self._run(texts, ids, _one_each(params, len(many)), on_text)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | None = None,
        *,
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several (a list of conversations)."""
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        template = chat_template_of(self._assembly)
        texts: list[str | None] = [template.render(conversation) for conversation in conversations]
        ids = [self._assembly.tokenizer.encode(text or "", add_special_tokens=False) for text in texts]
        chosen = params or SamplingParams(max_tokens=None)
        return self._run(texts, ids, [chosen] * len(ids), on_text)

    def _run(
        self, texts: list[str | None], ids: list[list[int]], params: list[SamplingParams], on_text: OnText | None
    ) -> list[RequestOutput]:
        with self._lock:
            collectors = list(self._collectors(texts, ids, params, on_text))
            by_id = {collector.request.request_id: collector for collector in collectors}
            waiting = list(reversed(collectors))
            open_ids = set(by_id)
            try:
                while open_ids:
                    self._submit_some(waiting)
                    self._take_events(by_id, open_ids)
            finally:
                for request_id in open_ids:  # an error, or Ctrl-C
                    self._assembly.engine.abort(request_id)
                if open_ids:
                    self._forget(open_ids - {collector.request.request_id for collector in waiting})
            return [collector.output for collector in collectors]

    def _collectors(
        self, texts: list[str | None], ids: list[list[int]], params: list[SamplingParams], on_text: OnText | None
    ) -> Iterator[_Collector]:
        tokenizer, info = self._assembly.tokenizer, self._assembly.engine.limits
        for index, (text, prompt, chosen) in enumerate(zip(texts, ids, params, strict=True)):
            if not prompt:
                raise RequestError("the prompt is empty", param="prompt")
            request = Request(
                f"llm-{next(self._ids)}",
                prompt,
                chosen.resolve(info.max_model_len, len(prompt)),
                eos_token_ids=tokenizer.eos_token_ids,
            )
            request.validate(vocab_size=info.vocab_size, max_model_len=info.max_model_len)

            def show(piece: str, index: int = index) -> None:
                if on_text is not None:
                    on_text(index, piece)

            yield _Collector(request, text, tokenizer, show)

    def _submit_some(self, waiting: list[_Collector]) -> None:
        """Fill the engine's bounded queue; what does not fit is tried again after the next events."""
        while waiting:
            try:
                self._assembly.engine.submit(waiting[-1].request)
            except QueueFullError:
                return
            waiting.pop()

    def _take_events(self, by_id: dict[str, _Collector], open_ids: set[str]) -> None:
        try:
            events = self._events.get(timeout=1.0)
        except queue.Empty:
            self._assembly.engine.check_alive()
            return
        for event in events:
            collector = by_id.get(event.request_id)
            if collector is None or event.request_id not in open_ids:
                continue
            if collector.accept(event):
                self._assembly.engine.abort(event.request_id, event.index)
            if collector.output.finished:
                open_ids.discard(event.request_id)

    def _forget(self, request_ids: set[str]) -> None:
        """Swallow the last events of aborted requests, so that the next call does not meet them."""
        deadline = time.monotonic() + 5.0
        while request_ids and time.monotonic() < deadline:
            try:
                events = self._events.get(timeout=0.1)
            except queue.Empty:
                continue
            request_ids -= {event.request_id for event in events if event.finish_reason is not None}


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{count} prompts but {len(params)} sampling parameters", param="params")
    return [replace(one) for one in params]
