"""The two shapes of a generation on the wire, streamed or whole: chat completions and completions.

A form turns pieces into JSON-ready dictionaries, for a stream (`opening`, `chunk`, `usage_chunk`) or whole (`body`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from setpoint.server.context import ServerContext
from setpoint.server.generation import Generation, Job, Piece
from setpoint.server.logprobs import LogprobWriter


class Form(Protocol):
    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that a choice starts with, if the form has one."""
        ...

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """The chunk of a piece; None when it has nothing to show."""
        ...

    def usage_chunk(self) -> dict[str, Any]: ...

    def body(self, choices: Sequence[Piece]) -> dict[str, Any]:
        """The whole answer, from one joined piece per choice."""
        ...


def usage(generation: Generation) -> dict[str, Any]:
    prompt, output = generation.num_prompt_tokens, generation.num_output_tokens
    details: dict[str, Any] = {"cached_tokens": generation.num_cached_tokens}
    divergence = generation.prefix_divergence()
    if divergence is not None:
        details["prefix_divergence"] = divergence
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": details,
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


class _Frame:
    """What every object of one answer repeats."""

    def __init__(self, context: ServerContext, generation: Generation, whole: str, part: str) -> None:
        job = generation.job
        self._generation = generation
        self._whole = {"id": job.id, "object": whole, "created": job.created, "model": context.model_name}
        self._part = {**self._whole, "object": part}
        self._fingerprint = f"setpoint-{context.version}"
        self._response_metrics = context.settings.response_metrics

    def part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        job = self._generation.job
        chunk = {**self._part, "choices": choices, "system_fingerprint": self._fingerprint}
        if job.continuous_usage or (job.include_usage and not choices):
            chunk["usage"] = usage(self._generation)
        elif job.include_usage:
            chunk["usage"] = None
        return chunk

    def whole(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        body = {
            **self._whole,
            "choices": choices,
            "usage": usage(self._generation),
            "system_fingerprint": self._fingerprint,
            **more,
        }
        if self._response_metrics:
            body["metrics"] = _metrics(self._generation)
        return body


def _metrics(generation: Generation) -> dict[str, float | None]:
    timing = generation.timing

    def span_ms(begin: float | None, end: float | None) -> float | None:
        return None if begin is None or end is None else round((end - begin) * 1e3, 3)

    tokens = sum(num_tokens for _, num_tokens in timing.gaps)
    return {
        "queue_time_ms": span_ms(timing.arrival, timing.scheduled),
        "time_to_first_token_ms": span_ms(timing.arrival, timing.first_token),
        "mean_itl_ms": round(sum(gap for gap, _ in timing.gaps) / tokens * 1e3, 3) if tokens else None,
    }


class ChatForm:
    def __init__(self, context: ServerContext, generation: Generation) -> None:
        self._frame = _Frame(context, generation, "chat.completion", "chat.completion.chunk")
        self._job: Job = generation.job
        self._logprobs = LogprobWriter(context.tokenizer, tokens_as_ids=generation.job.tokens_as_ids)

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        chunk = self._frame.part([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        if self._job.return_token_ids:
            chunk["prompt_token_ids"] = self._job.prompts[0].token_ids
        return chunk

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        wants_tokens = self._job.return_token_ids and piece.token_ids
        if not (piece.text or piece.logprobs or piece.finish_reason or wants_tokens):
            return None
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs.chat(piece.logprobs) if piece.logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._job.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return self._frame.part([choice])

    def usage_chunk(self) -> dict[str, Any]:
        return self._frame.part([])

    def body(self, choices: Sequence[Piece]) -> dict[str, Any]:
        more: dict[str, Any] = {}
        prompt_logprobs = choices[0].prompt_logprobs
        if self._job.prompts[0].params.prompt_logprobs is not None:
            more["prompt_logprobs"] = self._logprobs.prompt(prompt_logprobs or ())
        if self._job.return_token_ids:
            more["prompt_token_ids"] = self._job.prompts[0].token_ids
        return self._frame.whole([self._choice(piece) for piece in choices], **more)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        asked = self._job.prompts[0].params.logprobs is not None
        choice = {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text},
            "logprobs": self._logprobs.chat(piece.logprobs) if asked else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._job.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice


class CompletionForm:
    """`echo` puts the prompt in front of the text and, with logprobs, its tokens in front of the lists."""

    def __init__(self, context: ServerContext, generation: Generation) -> None:
        self._frame = _Frame(context, generation, "text_completion", "text_completion")
        self._job = generation.job
        self._tokenizer = context.tokenizer
        self._logprobs = LogprobWriter(context.tokenizer, tokens_as_ids=generation.job.tokens_as_ids)
        self._offsets: dict[int, int] = {}  # choice -> where its next token starts in the text
        self._prompt_logprobs: dict[int, Any] = {}  # prompt -> its log-probabilities, which come with choice 0

    def opening(self, index: int) -> None:
        return None

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        starts = piece.index not in self._offsets
        wants_tokens = self._job.return_token_ids and piece.token_ids
        if not (piece.text or piece.logprobs or piece.finish_reason or wants_tokens or (starts and self._job.echo)):
            return None
        return self._frame.part([self._choice(piece, starts=starts)])

    def usage_chunk(self) -> dict[str, Any]:
        return self._frame.part([])

    def body(self, choices: Sequence[Piece]) -> dict[str, Any]:
        return self._frame.whole([self._choice(piece, starts=True, whole=True) for piece in choices])

    def _choice(self, piece: Piece, *, starts: bool, whole: bool = False) -> dict[str, Any]:
        number = piece.index // self._job.n
        prompt = self._job.prompts[number]
        if piece.prompt_logprobs is not None:
            self._prompt_logprobs[number] = piece.prompt_logprobs
        echo = starts and self._job.echo
        text = piece.text
        if echo:
            text = (self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text) + text
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": text,
            "logprobs": self._legacy(piece, number, echo=echo),
            "finish_reason": piece.finish_reason,
        }
        if whole or piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if whole and prompt.params.prompt_logprobs is not None and not self._job.echo:
            choice["prompt_logprobs"] = self._logprobs.prompt(self._prompt_logprobs.get(number, ()))
        if self._job.return_token_ids:
            choice["token_ids"] = piece.token_ids
            if starts:
                choice["prompt_token_ids"] = prompt.token_ids
        return choice

    def _legacy(self, piece: Piece, number: int, *, echo: bool) -> dict[str, Any] | None:
        prompt = self._job.prompts[number]
        offset = self._offsets.setdefault(piece.index, 0)
        if prompt.params.logprobs is None:
            return None
        lists = self._logprobs.completion((), (), offset)
        if echo:
            entries = self._prompt_logprobs.get(number) or [None] * len(prompt.token_ids)
            lists.extend(self._logprobs.completion(entries, prompt.token_ids, lists.end))
        lists.extend(self._logprobs.completion(piece.logprobs, piece.token_ids[: len(piece.logprobs)], lists.end))
        self._offsets[piece.index] = lists.end
        return lists.body()
