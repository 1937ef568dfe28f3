"""`create_app(context)`: the routes, the middlewares around them, and the OpenAPI document."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from setpoint.errors import SetpointError
from setpoint.server import health
from setpoint.server.admission import Admission
from setpoint.server.auth import Auth
from setpoint.server.context import ServerContext
from setpoint.server.endpoints import Endpoints, json_response
from setpoint.server.errors import ApiError, as_api_error
from setpoint.server.limits import Limits
from setpoint.server.metrics import CONTENT_TYPE, Metrics
from setpoint.server.observe import Observe
from setpoint.server.openai import ChatRequest, CompletionRequest, DetokenizeRequest, ErrorBody, TokenizeRequest, Wire

PROBES: Final = frozenset({"startupz", "livez", "readyz", "health", "ping"})  # the routes that never need a key
_ERROR_STATUSES: Final = (400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 431, 500, 501, 503)
_WIRE_TYPES: Final = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, ErrorBody)


def create_app(context: ServerContext) -> FastAPI:
    """The ASGI app over a started engine. `app.state.admission` knows what is under way."""
    metrics = Metrics(
        context.model_name,
        context.max_model_len,
        context.engine.stats,
        version=context.version,
        cache_info=context.cache_info,
        grammars=context.grammars,
        pacer=context.engine.pacer,
    )
    admission = Admission(context)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        context.router.bind(asyncio.get_running_loop())
        context.started = True
        yield
        admission.close()

    app = FastAPI(
        title="Setpoint",
        version=context.version,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.admission = admission
    app.state.metrics = metrics
    _add_routes(app, context, Endpoints(context, admission, metrics), metrics)
    _add_error_handlers(app)
    _add_middlewares(app, context, metrics)
    _describe_bodies(app)
    return app


def _add_routes(app: FastAPI, context: ServerContext, endpoints: Endpoints, metrics: Metrics) -> None:
    def post(path: str, name: str, endpoint: Callable[..., Any], wire_type: type[Wire], *more: str) -> None:
        reference = {"$ref": f"#/components/schemas/{wire_type.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        answers = _answers("application/json", *more)
        extra = {"requestBody": body}
        app.add_api_route(path, endpoint, methods=["POST"], name=name, responses=answers, openapi_extra=extra)

    def get(path: str, name: str, endpoint: Callable[..., Any], media_type: str = "application/json") -> None:
        answers = _answers(media_type)
        app.add_api_route(path, endpoint, methods=["GET"], name=name, responses=answers, response_class=Response)

    post("/v1/chat/completions", "chat_completions", endpoints.chat, ChatRequest, "text/event-stream")
    post("/v1/completions", "completions", endpoints.completion, CompletionRequest, "text/event-stream")
    post("/tokenize", "tokenize", endpoints.tokenize, TokenizeRequest)
    post("/detokenize", "detokenize", endpoints.detokenize, DetokenizeRequest)
    get("/v1/models", "models", endpoints.models)
    get("/v1/models/{name:path}", "model", endpoints.model)
    app.add_api_route(
        "/v1/sessions/{session_id}",
        endpoints.delete_session,
        methods=["DELETE"],
        name="delete_session",
        responses=_answers("application/json"),
        response_class=Response,
    )
    get("/v1/requests/{request_id}/explain", "explain", endpoints.explain)
    get("/v1/setpoint/decisions", "decisions", endpoints.decisions)
    get("/server_info", "server_info", endpoints.server_info)

    async def version() -> Response:
        return json_response({"version": context.version})

    async def metrics_page() -> Response:
        return Response(metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    get("/version", "version", version)
    get("/metrics", "metrics", metrics_page, "text/plain")
    for name, check in (
        ("startupz", health.startup),
        ("livez", health.live),
        ("readyz", health.ready),
        ("health", health.ready),
        ("ping", health.ready),
    ):
        get(f"/{name}", name, _probe(context, check))


def _answers(*media_types: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "Success", "content": {media_type: {} for media_type in media_types}}}


def _probe(context: ServerContext, check: Callable[[ServerContext], health.Health]) -> Callable[..., Any]:
    async def probe() -> Response:
        result = check(context)
        return json_response(result.body(), result.status, {"Retry-After": "1"} if result.status == 503 else None)

    return probe


def _add_error_handlers(app: FastAPI) -> None:
    async def on_error(request: Request, error: Exception) -> Response:
        api_error = as_api_error(error)
        api_error.note(request.scope, error)
        return api_error.response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reasons = {404: "not_found", 405: "method_not_allowed"}
        messages = {404: "There is no such route.", 405: "The route does not take this method."}
        reason = reasons.get(error.status_code, "malformed")
        message = messages.get(error.status_code, "The request is malformed.")
        return await on_error(request, ApiError(reason, message, headers=dict(error.headers or {})))

    async def on_validation(request: Request, error: Exception) -> Response:
        return await on_error(request, ApiError("malformed", "The request is malformed."))

    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(SetpointError, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)


def _add_middlewares(app: FastAPI, context: ServerContext, metrics: Metrics) -> None:
    """The last one added is the outermost: Observe, then Auth, then Limits."""
    open_names = PROBES | {"metrics"} if context.settings.open_metrics else PROBES
    app.add_middleware(Limits, settings=context.settings)
    app.add_middleware(
        Auth, routes=app.router.routes, keys=context.keys, open_names=open_names, host=context.settings.host
    )
    app.add_middleware(Observe, log=context.log, rejected=metrics.rejected)


def _describe_bodies(app: FastAPI) -> None:
    """Put the wire types into the OpenAPI document; the routes read bodies themselves, so FastAPI does not see them.

    The error answers too: as an argument of FastAPI each would be modelled anew for each route, 60 ms at every start.
    """
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    errors = {str(status): {"description": HTTPStatus(status).phrase, "content": content} for status in _ERROR_STATUSES}
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, schemas = models_json_schema(
                [(wire_type, "validation") for wire_type in _WIRE_TYPES], ref_template="#/components/schemas/{model}"
            )
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"] |= errors
            own = document.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of 422, which we never send
                own.pop(name, None)
            own |= schemas["$defs"]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
