"""One generation request on the event loop: submitted to the engine, its events turned into pieces of text.

A request has `len(prompts) x n` choices. Each choice has its own text stream, which holds back incomplete characters
and possible stop strings; a stop string found here aborts the choice in the engine, which knows token ids only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from setpoint.engine.constraint import Grammar
from setpoint.engine.diagnosis import Divergence
from setpoint.engine.events import Event, TokenLogprob
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.slo import Slo
from setpoint.errors import EngineDeadError
from setpoint.server.context import ServerContext
from setpoint.server.errors import ApiError, as_api_error
from setpoint.server.events import Inbox
from setpoint.text.stream import TextStream

EXCERPT_CHARS = 80


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    params: SamplingParams  # max_tokens resolved against this prompt's length
    text: str | None = None  # None for token ids


@dataclass(frozen=True, slots=True)
class Job:
    """What a request asks for, after validation, templates and tokenisation."""

    id: str
    created: int
    prompts: Sequence[Prompt]
    priority: int = 0
    slo: Slo | None = None
    cache_salt: str = ""
    session_id: str = ""
    tenant: str = ""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    stream_interval: int = 1
    return_token_ids: bool = False
    tokens_as_ids: bool = False
    echo: bool = False
    continues_text: bool = False  # the output goes on from the prompt, its leading space included
    grammar: Grammar | None = None  # of the prompts' structured_outputs
    grammar_s: float = 0.0  # that compiling it, or waiting for that, took
    messages: tuple[Mapping[str, Any], ...] = ()  # of a chat, where ServerSettings.keeps_messages

    @property
    def n(self) -> int:
        return self.prompts[0].params.n


@dataclass(frozen=True, slots=True)
class Piece:
    """What moved in one choice. `finish_reason` is set once, in the last piece of the choice."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


def join(pieces: Sequence[Piece]) -> Piece:
    """Consecutive pieces of one choice as one."""
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        tuple(entry for piece in pieces for entry in piece.logprobs),
        next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None), None),
        pieces[-1].finish_reason,
        pieces[-1].stop_reason,
    )


@dataclass(slots=True)
class Timing:
    """Seconds of the engine's clock. `gaps` are between two events of a choice, with the tokens of the second."""

    arrival: float | None = None
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    gaps: list[tuple[float, int]] = field(default_factory=list)

    def note(self, event: Event, previous: float | None) -> None:
        self.arrival = event.arrival_time if self.arrival is None else self.arrival
        self.scheduled = event.first_scheduled_time if self.scheduled is None else self.scheduled
        if event.token_ids:
            self.first_token = event.time if self.first_token is None else self.first_token
            self.last_token = event.time
            if previous is not None:
                self.gaps.append((event.time - previous, len(event.token_ids)))


@dataclass(slots=True)
class _Choice:
    engine_id: str
    params: SamplingParams
    stream: TextStream
    num_tokens: int = 0
    finish_reason: str | None = None
    last_token_time: float | None = None
    held: list[Piece] = field(default_factory=list)  # waiting for `stream_interval` tokens


class Generation:
    def __init__(self, context: ServerContext, job: Job) -> None:
        self.job = job
        self.timing = Timing()
        self.num_cached_tokens = 0
        self.divergence: Divergence | None = None  # of the first prompt that has one
        self.num_preemptions = 0
        self._context = context
        self._inbox = Inbox()
        self._error: ApiError | None = None
        self._first_choice = {f"{job.id}-{number}": number * job.n for number in range(len(job.prompts))}
        self.choices = [
            _Choice(engine_id, prompt.params, _text_stream(context, prompt.params, continuation=job.continues_text))
            for engine_id, prompt in zip(self._first_choice, job.prompts, strict=True)
            for _ in range(job.n)
        ]

    @property
    def engine_ids(self) -> Collection[str]:
        """The engine's names of the prompts."""
        return self._first_choice.keys()

    def submit(self) -> None:
        """Hand every prompt to the engine; nothing stays behind when one is refused. Raises what the engine raises."""
        context, job = self._context, self.job
        self.check_engine()
        try:
            for engine_id, prompt in zip(self._first_choice, job.prompts, strict=True):
                context.router.open(engine_id, self._inbox)
                context.engine.submit(
                    Request(
                        request_id=engine_id,
                        prompt_token_ids=prompt.token_ids,
                        params=prompt.params,
                        priority=job.priority,
                        slo=job.slo,
                        cache_salt=job.cache_salt,
                        session_id=job.session_id,
                        tenant=job.tenant,
                        eos_token_ids=context.tokenizer.eos_token_ids,
                        grammar=job.grammar,
                    )
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop listening and abort whatever still runs. Harmless twice and in any state."""
        for engine_id in self._first_choice:
            self._context.router.close(engine_id)
        for engine_id in {choice.engine_id for choice in self.choices if choice.finish_reason is None}:
            self._context.engine.abort(engine_id)

    def fail(self, error: ApiError) -> None:
        """End the request with this error at once."""
        self._error = error
        self._inbox.wake()

    def wake(self) -> None:
        """Let `next` return, with nothing if nothing has arrived."""
        self._inbox.wake()

    def check_engine(self) -> None:
        if not self._context.engine.is_alive:
            raise EngineDeadError("the engine is not running")

    async def next(self) -> list[Piece]:
        """The pieces that have arrived since the last call, possibly none. Raises ApiError when the request failed."""
        events = await self._inbox.get()
        if self._error is not None:
            raise self._error
        return [piece for event in events for piece in self._advance(event)]

    def _advance(self, event: Event) -> list[Piece]:
        index = self._first_choice[event.request_id] + event.index
        choice = self.choices[index]
        if choice.finish_reason is not None:
            return []  # what the engine produced before it saw our abort
        if event.finish_reason == "error":
            choice.finish_reason = "error"
            raise as_api_error(event.error or RuntimeError("the engine gave no reason"))
        if event.finish_reason == "abort":
            choice.finish_reason = "abort"
            raise ApiError("draining" if self._context.draining else "engine_error", "The request was aborted.")
        self.timing.note(event, choice.last_token_time)
        if event.token_ids:
            if choice.num_tokens == 0 and event.index == 0:
                self.num_cached_tokens += event.num_cached_tokens
                self.divergence = self.divergence or event.divergence
            choice.last_token_time = event.time
        self.num_preemptions = max(self.num_preemptions, event.num_preemptions)
        choice.held.append(self._piece(index, choice, event))
        num_held = sum(len(piece.token_ids) for piece in choice.held)
        if choice.finish_reason is None and num_held < self.job.stream_interval:
            return []
        held, choice.held = choice.held, []
        return [held[0] if len(held) == 1 else join(held)]

    def _piece(self, index: int, choice: _Choice, event: Event) -> Piece:
        token_ids, reason = event.token_ids, event.finish_reason
        stop_reason: str | int | None = event.stop_reason
        ended = reason == "stop" and not event.is_complete
        delta = choice.stream.push(token_ids, final=reason is not None, ended=ended)
        if delta.stop is not None:
            token_ids = token_ids[: delta.num_tokens]
            if reason is None:
                self._context.engine.abort(choice.engine_id, event.index)
            reason, stop_reason = "stop", delta.stop
        choice.num_tokens += len(token_ids)
        choice.finish_reason = reason
        logprobs = tuple(event.logprobs or ())[: len(token_ids)]
        return Piece(index, delta.text, token_ids, logprobs, event.prompt_logprobs, reason, stop_reason)

    def prefix_divergence(self) -> dict[str, object] | None:
        """Where the prompt stopped being what its session had, for its owner: never for a log."""
        found = self.divergence
        if found is None:
            return None
        body: dict[str, object] = {
            "cause": found.cause,
            "token_index": found.token_index,
            "lost_tokens": found.num_lost_tokens,
        }
        if found.cause == "text":
            decode = self._context.tokenizer.decode
            for name, ids in (("expected", found.expected), ("found", found.found)):
                body[name] = decode(list(ids), skip_special_tokens=False)[:EXCERPT_CHARS]
        return body

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.job.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)


def _text_stream(context: ServerContext, params: SamplingParams, *, continuation: bool) -> TextStream:
    return TextStream(
        context.tokenizer,
        stop=params.stop,
        include_stop=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        min_tokens=params.min_tokens,
        continuation=continuation,
    )
