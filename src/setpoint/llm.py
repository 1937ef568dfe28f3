"""The Python API: `LLM(model).generate(prompts, params)` and `.chat(messages)`, in this process."""

from __future__ import annotations

import difflib
import itertools
import json
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import TracebackType
from typing import Any

from setpoint.assemble import Assembly, build_engine
from setpoint.assemble import require_chat_template as chat_template_of
from setpoint.config import EngineConfig
from setpoint.engine.diagnosis import Divergence
from setpoint.engine.events import Event, TokenLogprob
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import ConfigError, EngineError, QueueFullError, RequestError
from setpoint.loaders.download import Progress, silent
from setpoint.text.spellings import spellings
from setpoint.text.stream import TextStream
from setpoint.text.tokenizer import Tokenizer

OnText = Callable[[int, str], None]  # (index of the prompt, new text), for choice 0
_Prompt = tuple[str | None, list[int]]  # as text when it was text, and as token ids
Messages = Sequence[Mapping[str, Any]]
SessionIds = str | Sequence[str | None] | None  # of all prompts, or of each


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
    prefix_divergence: Divergence | None = None  # why the prompt found less than its session had


class _Collector:
    """Turns the events of one request into its RequestOutput."""

    def __init__(
        self, request: Request, prompt: str | None, stream: Callable[[], TextStream], on_text: Callable[[str], None]
    ) -> None:
        params = request.params
        self.request, self.on_text = request, on_text
        self.output = RequestOutput(
            request.request_id, prompt, request.prompt_token_ids, [CompletionOutput(i) for i in range(params.n)]
        )
        if params.logprobs is not None:
            for completion in self.output.outputs:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
        self.streams = [stream() for _ in range(params.n)]
        self.first_time: float | None = None
        self.last_time = 0.0

    def accept(self, event: Event) -> bool:
        """Take one event; True when its sequence has met a stop string and must be aborted."""
        completion = self.output.outputs[event.index]
        if completion.finish_reason is not None:
            return False  # what was under way when the stop string was found
        if event.error is not None:
            raise event.error
        if event.finish_reason == "abort":
            raise EngineError("the request was aborted")  # by whoever shut the engine down
        if event.prompt_logprobs is not None:
            self.output.prompt_logprobs = list(event.prompt_logprobs)
        if event.index == 0:
            self.output.num_cached_tokens = event.num_cached_tokens
            self.output.prefix_divergence = self.output.prefix_divergence or event.divergence
        if event.token_ids and self.first_time is None:
            self.first_time = event.time
        self.last_time = event.time
        stopped = self._add_tokens(completion, event)
        if completion.finish_reason is not None and all(out.finish_reason for out in self.output.outputs):
            self._finish(event)
        return stopped

    def _add_tokens(self, completion: CompletionOutput, event: Event) -> bool:
        params, final = self.request.params, event.finish_reason is not None
        accepted, stop, text = len(event.token_ids), None, ""
        if params.detokenize:
            ended = event.finish_reason == "stop" and not event.is_complete
            delta = self.streams[event.index].push(event.token_ids, final=final, ended=ended)
            text, stop = delta.text, delta.stop
            accepted = accepted if stop is None else delta.num_tokens
        completion.token_ids.extend(event.token_ids[:accepted])
        completion.text += text
        if event.index == 0 and text:
            self.on_text(text)
        if completion.logprobs is not None and event.logprobs is not None:
            kept = event.logprobs[:accepted]
            completion.logprobs.extend(kept)
            completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + sum(p.logprob for p in kept)
        if stop is not None:
            completion.finish_reason, completion.stop_reason = "stop", stop
            return not final
        completion.finish_reason, completion.stop_reason = event.finish_reason, event.stop_reason
        return False

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
            config = _config(model or "", knobs)
        elif knobs:
            raise ConfigError(f"give {', '.join(knobs)} in the config")
        self._assembly: Assembly = build_engine(config, self._events.put, progress=progress, phase=phase, chats=False)
        self._ids = itertools.count()
        self._lock = threading.Lock()  # one generate() at a time owns the event queue
        self._assembly.engine.start()
        self._end = weakref.finalize(self, self._assembly.engine.shutdown)  # also when nobody calls close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and release its memory; safe to call twice."""
        self._end()

    @property
    def config(self) -> EngineConfig:
        """The resolved configuration."""
        return self._assembly.config

    def get_tokenizer(self) -> Tokenizer:
        return self._assembly.tokenizer

    def require_chat_template(self) -> None:
        """Raise RequestError when the model has no chat template, ModelFileError when it does not compile."""
        chat_template_of(self._assembly).compile()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        session_id: SessionIds = None,
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt (text or token ids); results keep the order of the prompts.

        The prefixes of a session (1 to 128 characters; one for all prompts, or one or None for each) are kept before
        others, for a later prompt that goes on from them. `on_text` receives the text as it comes. It must not call
        `generate` or `chat` itself.
        Raises RequestError naming the field, before anything runs, when one of them is invalid; EngineError when the
        engine fails one of them, and then the others end too.
        """
        many: Sequence[Any] = [prompts] if isinstance(prompts, str) else prompts
        read = [self._read_prompt(prompt) for prompt in many]
        wanted = _one_each(params, SamplingParams(), len(read))
        return self._run(read, wanted, _sessions(session_id, len(read)), on_text, continuation=True)

    def _read_prompt(self, prompt: Any) -> _Prompt:
        if isinstance(prompt, str):
            try:
                return prompt, self._assembly.tokenizer.encode(prompt)
            except RequestError as error:
                raise RequestError(str(error), param="prompt", reason=error.reason) from None
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise RequestError("a prompt must be text or a list of token ids", param="prompt")
        return None, list(prompt)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        session_id: SessionIds = None,
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several (a list of conversations); without `params`, up to the context's end.

        Errors, sessions and `on_text` are those of `generate`.
        """
        if not messages:
            raise RequestError("messages is empty", param="messages")
        conversations: Sequence[Any] = [messages] if isinstance(messages[0], Mapping) else messages
        template = chat_template_of(self._assembly)
        texts = [template.render(conversation) for conversation in conversations]
        read: list[_Prompt] = [
            (text, self._assembly.tokenizer.encode(text, add_special_tokens=False)) for text in texts
        ]
        wanted = _one_each(params, SamplingParams(max_tokens=None), len(read))
        return self._run(read, wanted, _sessions(session_id, len(read)), on_text, continuation=False)

    def delete_session(self, session_id: str) -> bool:
        """Keep the prefixes of a session no longer than others; False when there is no such session."""
        return self._assembly.engine.delete_session("", session_id)

    def _run(
        self,
        prompts: list[_Prompt],
        params: list[SamplingParams],
        sessions: list[str],
        on_text: OnText | None,
        *,
        continuation: bool,
    ) -> list[RequestOutput]:
        with self._lock:
            collectors = [
                self._collector(prompt, self._request(prompt[1], chosen, session), index, on_text, continuation)
                for index, (prompt, chosen, session) in enumerate(zip(prompts, params, sessions, strict=True))
            ]
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
                self._forget(open_ids - {collector.request.request_id for collector in waiting})
            return [collector.output for collector in collectors]

    def _collector(
        self, prompt: _Prompt, request: Request, index: int, on_text: OnText | None, continuation: bool
    ) -> _Collector:
        stream = partial(self._text_stream, request.params, continuation)
        return _Collector(request, prompt[0], stream, partial(on_text or _nobody, index))

    def _request(self, prompt: list[int], params: SamplingParams, session_id: str) -> Request:
        tokenizer, limits = self._assembly.tokenizer, self._assembly.engine.limits
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt")
        if params.bad_words:
            params = replace(params, bad_words_token_ids=spellings(tokenizer, params.bad_words))
        wanted = params.structured_outputs
        request = Request(
            f"llm-{next(self._ids)}",
            prompt,
            params.resolve(limits.max_model_len, len(prompt)),
            session_id=session_id,
            eos_token_ids=tokenizer.eos_token_ids,
            grammar=None if wanted is None else self._assembly.grammars.compile(StructuredOutputs.of(wanted)),
        )
        request.validate(vocab_size=limits.vocab_size, max_model_len=limits.max_model_len)
        return request

    def _text_stream(self, params: SamplingParams, continuation: bool) -> TextStream:
        return TextStream(
            self._assembly.tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
            continuation=continuation,
        )

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


def _nobody(index: int, piece: str) -> None:
    """The listener of somebody who waits for the end."""


def _config(model: str, knobs: Mapping[str, Any]) -> EngineConfig:
    known = [declared.name for declared in fields(EngineConfig) if "knob" in declared.metadata]
    for name in knobs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the knobs are {', '.join(known)}"
            raise ConfigError(f"{name} is not supported; {hint}")
    speculative = knobs.get("speculative_config")
    if isinstance(speculative, Mapping):
        knobs = {**knobs, "speculative_config": json.dumps(dict(speculative))}
    return EngineConfig(model=model, **knobs)


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or default] * count
    if any(not isinstance(one, SamplingParams) for one in params):
        raise RequestError("params must be SamplingParams", param="params")
    if len(params) != count:
        raise RequestError(f"{count} prompts but {len(params)} sampling parameters", param="params")
    return list(params)


def _sessions(given: SessionIds, count: int) -> list[str]:
    """The engine's names: "" for none."""
    each = [given] * count if given is None or isinstance(given, str) else list(given)
    if len(each) != count:
        raise RequestError(f"{count} prompts but {len(each)} sessions", param="session_id")
    if any(name is not None and not (isinstance(name, str) and name) for name in each):
        raise RequestError("session_id must have 1 to 128 characters", param="session_id")
    return [name or "" for name in each]
