"""Every error Setpoint raises on purpose.

    SetpointError
    ├── ConfigError            a flag, file or environment value is wrong          exit 2
    ├── ModelError             the model cannot be served                          exit 3
    │   ├── ModelNotFoundError     no such path, alias or repository
    │   ├── ModelFileError         a file is malformed, truncated or hostile
    │   ├── ModelDownloadError     network, space or digest
    │   └── UnsupportedModelError  a family, format or layer we do not implement
    ├── RequestError           the client asked for something invalid              HTTP 400
    │   └── ContextLengthError     prompt (plus output) longer than the context
    ├── QueueFullError         the bounded queue is full                           HTTP 429
    │   └── ShedError              the request would miss its target and others' too   HTTP 429
    └── EngineError            the engine failed while serving the request         HTTP 500
        ├── EngineDeadError        the engine is not running any more              HTTP 503
        └── OutputViolationError   the output does not have the structure asked for

Messages are one line with the remedy; they hold no addresses, paths of the server, keys or prompt text
when they can reach a client (`RequestError`, `QueueFullError`, `EngineError`).
"""

from __future__ import annotations


class SetpointError(Exception):
    """Base of the tree; `exit_code` is what the command line returns."""

    exit_code = 70


class ConfigError(SetpointError):
    exit_code = 2


class ModelError(SetpointError):
    exit_code = 3


class ModelNotFoundError(ModelError):
    pass


class ModelFileError(ModelError):
    pass


class ModelDownloadError(ModelError):
    pass


class UnsupportedModelError(ModelError):
    pass


class RequestError(SetpointError):
    """A request that can never succeed as written.

    `param` names the offending field, `reason` is one of the stable reasons of the wire format:
    unknown_field, out_of_range, bad_constraint, compile_limit, conflict, context_length_exceeded, not_supported.
    """

    def __init__(self, message: str, *, param: str | None = None, reason: str = "out_of_range") -> None:
        super().__init__(message)
        self.param = param
        self.reason = reason


class ContextLengthError(RequestError):
    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, reason="context_length_exceeded")


class QueueFullError(SetpointError):
    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShedError(QueueFullError):
    pass


class EngineError(SetpointError):
    pass


class EngineDeadError(EngineError):
    pass


class OutputViolationError(EngineError):
    pass
