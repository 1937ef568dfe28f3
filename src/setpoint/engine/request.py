"""What a client asked, as token ids: the engine's input."""

from __future__ import annotations

from dataclasses import dataclass, field

from setpoint.engine.constraint import Grammar
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.slo import Slo
from setpoint.errors import RequestError

MAX_PRIORITY = 127
MAX_NAME_CHARS = 128


@dataclass(slots=True)
class Request:
    """One prompt and how to continue it, `params.n` times.

    Lower `priority` runs earlier. `tenant` and `cache_salt` separate prefix caches: only requests equal in both
    share blocks. `eos_token_ids` end a sequence unless `params.ignore_eos`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    session_id: str = ""  # of the tenant; keeps this prefix for the next request. "" = none
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)
    grammar: Grammar | None = None  # of `params.structured_outputs`, compiled
    slo: Slo | None = None  # its own targets, where the engine holds an SLA
    submitted_time: float | None = field(default=None, repr=False, compare=False)  # set when it is counted in

    def validate(self, *, vocab_size: int, max_model_len: int) -> None:
        """Raise RequestError unless every number is within the bounds of this model."""
        if not self.request_id or len(self.request_id) > MAX_NAME_CHARS:
            raise RequestError(f"request_id must have 1 to {MAX_NAME_CHARS} characters", param="request_id")
        if type(self.priority) is not int or not -MAX_PRIORITY - 1 <= self.priority <= MAX_PRIORITY:
            raise RequestError(f"priority must be in -{MAX_PRIORITY + 1}..{MAX_PRIORITY}", param="priority")
        if len(self.session_id) > MAX_NAME_CHARS:
            raise RequestError(f"session_id must have at most {MAX_NAME_CHARS} characters", param="session_id")
        salt = self.cache_salt
        if len(salt) > MAX_NAME_CHARS or not (salt.isascii() and salt.isprintable()):
            message = f"cache_salt must have at most {MAX_NAME_CHARS} printable ASCII characters"
            raise RequestError(message, param="cache_salt")
        if not self.prompt_token_ids:
            raise RequestError("the prompt is empty; send at least one token", param="prompt")
        self.params.resolve(max_model_len, len(self.prompt_token_ids))  # ContextLengthError
        ids = self.prompt_token_ids
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab_size:
            raise RequestError(f"prompt token ids must be integers in 0..{vocab_size - 1}", param="prompt")
        if any(not 0 <= token < vocab_size for token in self.eos_token_ids):
            raise RequestError(f"eos token ids must be in 0..{vocab_size - 1}", param="eos_token_ids")
        self.params.check_vocabulary(vocab_size)
        if self.grammar is None and self.params.structured_outputs is not None:  # never unconstrained text instead
            message = "structured_outputs was not compiled for this request"
            raise RequestError(message, param="structured_outputs", reason="not_supported")
        self._validate_allowed_ids()

    def _validate_allowed_ids(self) -> None:
        """Fail closed where min_tokens would ban every allowed token."""
        allowed = self.params.allowed_token_ids
        if allowed is not None and self.params.min_tokens > 0 and self.stop_ids.issuperset(allowed):
            raise RequestError(
                "allowed_token_ids holds only tokens that end the output, and min_tokens bans them",
                param="allowed_token_ids",
                reason="conflict",
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token id that ends a sequence of this request."""
        eos = frozenset() if self.params.ignore_eos else self.eos_token_ids
        return eos.union(self.params.stop_token_ids)
