"""What each route does, between a parsed body and an answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import RequestError
from setpoint.server.admission import Admission
from setpoint.server.context import ServerContext
from setpoint.server.errors import ApiError
from setpoint.server.explain import Explanations
from setpoint.server.fields import parse
from setpoint.server.forms import ChatForm, CompletionForm, Form
from setpoint.server.generation import Generation, Job
from setpoint.server.json_body import parse_object
from setpoint.server.metrics import Metrics
from setpoint.server.openai import (
    NAME,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    TokenizeRequest,
    Wire,
)
from setpoint.server.prepare import check_model, prepare_chat, prepare_completion, render, tokenise_text
from setpoint.server.slo import HEADER, requested_slo
from setpoint.server.stream import EventStream, Finish, JsonAnswer
from setpoint.server.structure import compile_structure

WireT = TypeVar("WireT", bound=Wire)
BodyT = TypeVar("BodyT", bound=GenerationFields)
_JSON: Final = re.compile(r"application/json\s*(;\s*charset\s*=\s*\"?utf-8\"?\s*)?", re.IGNORECASE)
_SMALL_BODY: Final = 64 << 10  # bytes; parsed on the event loop, larger ones in a worker


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


class Endpoints:
    def __init__(self, context: ServerContext, admission: Admission, metrics: Metrics) -> None:
        self._context = context
        self._admission = admission
        self._metrics = metrics
        self._explanations = Explanations(context.engine.explain, context.clock)

    # Generation

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest, prepare_chat, ChatForm)

    async def completion(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest, prepare_completion, CompletionForm)

    async def _generate(
        self,
        request: Request,
        wire_type: type[BodyT],
        prepare: Callable[[ServerContext, BodyT, str], Job],
        form_type: Callable[[ServerContext, Generation], Form],
    ) -> Response:
        context, tenant = self._context, request.scope.get("setpoint.tenant", "")
        arrival = context.clock()
        with self._admission.enter(generates=True):
            body, ignored = await self._read(request, wire_type)
            if body.request_id is not None:
                request.scope["setpoint.record"].request_id = body.request_id
            slo = requested_slo(body.slo, request.headers.getlist(HEADER))
            if slo is not None and context.engine.pacer is None:  # there is nobody to hold it
                ignored = [*ignored, "slo"]
            job = await self._admission.run(lambda: prepare(context, body, tenant))
            job = job if slo is None else replace(job, slo=slo)
            wanted = job.prompts[0].params.structured_outputs
            if wanted is not None:
                began, structure = context.clock(), StructuredOutputs.of(wanted)
                grammar = await self._admission.run_slow(lambda: compile_structure(context, structure))
                job = replace(job, grammar=grammar, grammar_s=context.clock() - began)
            self._admission.check_open()
            generation = Generation(context, job)
            form = form_type(context, generation)
            generation.submit()
            self._admission.add(generation)
            self._explanations.begin(generation, arrival)
        headers = {"X-Setpoint-Ignored-Params": ", ".join(ignored)} if ignored else {}
        answer_type = EventStream if job.stream else JsonAnswer
        return answer_type(generation, form, context.settings, headers, self._finisher(request, generation, arrival))

    def _finisher(self, request: Request, generation: Generation, arrival: float) -> Finish:
        def finish(ending: str) -> None:
            self._admission.remove(generation)
            self._explanations.end(generation, ending)
            self._metrics.finished(generation, ending)
            request.scope["setpoint.record"].fields.update(_log_fields(generation, ending))
            if self._context.on_end is not None:
                self._context.on_end(generation, arrival)

        return finish

    # Tokens

    async def tokenize(self, request: Request) -> Response:
        with self._admission.enter(generates=False):
            body, ignored = await self._read(request, TokenizeRequest)
            result = await self._admission.run(lambda: self._tokenize(body))
        return json_response(result, headers={"X-Setpoint-Ignored-Params": ", ".join(ignored)} if ignored else None)

    def _tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        context = self._context
        check_model(context, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Send either 'prompt' or 'messages'.", param="prompt", reason="conflict")
        text, special = body.prompt, body.add_special_tokens is not False
        if body.messages is not None:
            text, special = render(context, body, body.messages), bool(body.add_special_tokens)
        param = "prompt" if body.messages is None else "messages"
        tokens = tokenise_text(context, text or "", add_special_tokens=special, param=param)
        names = [context.tokenizer.id_to_token(token) or "" for token in tokens] if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": context.max_model_len,
            "tokens": tokens,
            "token_strs": names,
        }

    async def detokenize(self, request: Request) -> Response:
        with self._admission.enter(generates=False):
            body, _ = await self._read(request, DetokenizeRequest)
            check_model(self._context, body.model)
            limit = self._context.tokenizer.vocab_size
            if max(body.tokens, default=0) >= limit:
                raise RequestError(f"Token ids must be below {limit}.", param="tokens")
            decode = self._context.tokenizer.decode
            text = await self._admission.run(lambda: decode(body.tokens, skip_special_tokens=False))
        return json_response({"prompt": text})

    # Models

    async def models(self) -> Response:
        data = [self._model(name) for name in self._context.model_names]
        return json_response({"object": "list", "data": data})

    async def model(self, name: str) -> Response:
        check_model(self._context, name)
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._context.created,
            "owned_by": "setpoint",
            "root": self._context.model_name,
            "parent": None,
            "max_model_len": self._context.max_model_len,
        }

    # Sessions

    async def delete_session(self, request: Request, session_id: str) -> Response:
        tenant = request.scope.get("setpoint.tenant", "")
        if not re.fullmatch(NAME, session_id) or not self._context.engine.delete_session(tenant, session_id):
            raise ApiError("not_found", "There is no such session.", param="session_id")
        return json_response({"id": session_id, "object": "session", "deleted": True})

    # Requests

    async def explain(self, request: Request, request_id: str) -> Response:
        tenant = request.scope.get("setpoint.tenant", "")
        body = self._explanations.body(request_id, tenant) if re.fullmatch(NAME, request_id) else None
        if body is None:
            raise ApiError("not_found", "There is no such request, or it was forgotten.", param="request_id")
        return json_response(body)

    async def decisions(self) -> Response:
        """What the pacer chose of late and from what; it says nothing of whom it was for."""
        pacer = self._context.engine.pacer
        if pacer is None:
            raise ApiError("not_found", "This server holds no SLA; start it with --slo.")
        kept = pacer.decisions.latest()
        documents = await self._admission.run(lambda: [decision.document() for decision in kept])
        return json_response({"object": "list", "data": documents})

    async def server_info(self) -> Response:
        context, settings = self._context, self._context.settings
        stats = context.engine.stats()
        return json_response(
            {
                "version": context.version,
                "model": context.model_name,
                "max_model_len": context.max_model_len,
                "num_running": stats.num_running,
                "num_waiting": stats.num_waiting,
                "limits": {
                    "max_body_bytes": settings.max_body_bytes,
                    "max_header_bytes": settings.max_header_bytes,
                    "max_concurrent_requests": settings.max_concurrent_requests,
                },
                **context.server_info,
            }
        )

    async def _read(self, request: Request, wire_type: type[WireT]) -> tuple[WireT, list[str]]:
        content_types = request.headers.getlist("content-type")
        if len(content_types) != 1 or not _JSON.fullmatch(content_types[0]):  # what a form of another site cannot send
            message = "Content-Type must be application/json."
            raise ApiError("unsupported_media_type", message, param="Content-Type", headers={"Connection": "close"})
        try:
            raw = await request.body()
        except ClientDisconnect:
            raise ApiError("client_too_slow", "The client went away.") from None
        if len(raw) <= _SMALL_BODY:
            return parse(parse_object(raw), wire_type)
        return await self._admission.run(lambda: parse(parse_object(raw), wire_type))


def _log_fields(generation: Generation, ending: str) -> dict[str, Any]:
    timing = generation.timing
    fields: dict[str, Any] = {
        "prompt_tokens": generation.num_prompt_tokens,
        "output_tokens": generation.num_output_tokens,
        "finish_reason": generation.choices[0].finish_reason,
    }
    if timing.arrival is not None and timing.first_token is not None:
        fields["ttft_ms"] = round((timing.first_token - timing.arrival) * 1e3, 3)
    if timing.arrival is not None and timing.scheduled is not None:
        fields["queue_ms"] = round((timing.scheduled - timing.arrival) * 1e3, 3)
    num_gaps = sum(num_tokens for _, num_tokens in timing.gaps)
    if num_gaps:
        fields["tpot_ms"] = round(sum(gap for gap, _ in timing.gaps) / num_gaps * 1e3, 3)
    if generation.divergence is not None:  # never its text
        fields["prefix_divergence"] = generation.divergence.cause
        fields["prefix_divergence_token"] = generation.divergence.token_index
    if ending != "ok":
        fields["cancel_reason"] = ending
    if generation.job.tenant:
        fields["tenant"] = generation.job.tenant[:12]
    return fields
