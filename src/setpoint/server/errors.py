"""The one error shape of the wire, and which exception becomes which status.

Every answer that is not a success has the body
`{"error": {"message", "type", "param", "code", "reason"}}`; `code` is the HTTP status and `reason` comes from the
closed list `REASONS`. Messages hold no addresses, paths, tracebacks, keys or prompt text.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from setpoint.errors import ConfigError, EngineDeadError, QueueFullError, RequestError, ShedError

REASONS: Final = {
    "unknown_field": 400,
    "out_of_range": 400,
    "bad_constraint": 400,
    "compile_limit": 400,
    "conflict": 400,
    "context_length_exceeded": 400,
    "malformed": 400,  # not HTTP, not JSON, or of the wrong type
    "unauthorized": 401,
    "forbidden_origin": 403,
    "not_your_request": 403,
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "client_too_slow": 408,
    "busy": 409,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "media_rejected": 422,
    "queue_full": 429,
    "shed": 429,
    "rate_limited": 429,
    "headers_too_large": 431,
    "engine_error": 500,
    "not_supported": 501,
    "loading": 503,
    "draining": 503,
    "not_ready": 503,
    "deadline": 504,
}

_TYPES: Final = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
_PATH = re.compile(r"(?<![\w/.])(?:/[\w.+@-]+){2,}/?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def clean(message: str, limit: int = 500) -> str:
    """The message without control characters, addresses and absolute paths, cut at `limit` characters."""
    message = _CONTROL.sub(" ", message[: 2 * limit]).encode("utf-8", "replace").decode("utf-8")
    return _PATH.sub("<path>", _ADDRESS.sub("<address>", message))[:limit]


class ApiError(Exception):
    """An error with its place on the wire. `headers` are added to the answer."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = REASONS[reason] if status is None else status
        self.message = clean(message)
        self.param = param
        self.headers = dict(headers or {})
        if self.status == 501:
            self.headers["X-Should-Retry"] = "false"  # official clients repeat every 5xx unless told not to
        if self.status in (429, 503):
            self.headers.setdefault("Retry-After", "1")

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES[self.status],
                "param": None if self.param is None else clean(self.param, 128),
                "code": self.status,
                "reason": self.reason,
            }
        }

    def note(self, scope: Scope, cause: BaseException | None = None) -> None:
        """Leave the reason with the request's record, for the log and the metrics."""
        record = scope.get("setpoint.record")
        if record is not None:
            record.reason = self.reason
            if cause is not None and cause is not self and self.status >= 500:
                record.cause = cause

    def response(self) -> Response:
        return Response(orjson.dumps(self.body()), self.status, self.headers, media_type="application/json")


def as_api_error(error: BaseException) -> ApiError:
    """Any exception tied to one request, as the error that its client gets; unforeseen ones become `engine_error`."""
    match error:
        case ApiError():
            return error
        case RequestError():
            reason = error.reason if error.reason in REASONS else "out_of_range"
            return ApiError(reason, str(error), param=error.param, status=400)
        case QueueFullError():
            wait = max(1, math.ceil(error.retry_after_s))
            reason = "shed" if isinstance(error, ShedError) else "queue_full"
            return ApiError(reason, str(error), headers={"Retry-After": str(wait)})
        case EngineDeadError():
            return ApiError("not_ready", "The engine is not running.", headers={"Retry-After": "5"})
        case _:
            return ApiError("engine_error", "The engine failed while serving this request.")


async def send_error(
    error: ApiError, scope: Scope, receive: Receive, send: Send, *, cause: BaseException | None = None
) -> None:
    error.note(scope, cause)
    await error.response()(scope, receive, send)


class PortError(ConfigError):
    """The address cannot be bound."""

    exit_code = 4
