"""How a client wants tokens chosen: `SamplingParams`, and the bounds of every field of it, stated once.

A value is a plain frozen record; whoever builds one (HTTP, batch file, Python) gets the same checks and the same
messages. Errors are `RequestError` with the field in `param` and `out_of_range` or `conflict` as reason.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Literal

from setpoint.engine.structured_outputs import StructuredOutputs
from setpoint.errors import ContextLengthError, RequestError

MAX_VOCABULARY: Final = 1 << 24  # far above any model; the real width is checked by check_vocabulary()
MAX_CONTEXT: Final = 1 << 30  # likewise, see resolve()


@dataclass(frozen=True, slots=True)
class Bound:
    """The limits of one field.

    For 'str' the limits are those of the length. `max_items` set: the field holds up to that many such values;
    `max_inner_items` set: each of them is itself a list.
    """

    kind: Literal["int", "float", "str"]
    minimum: int | float
    maximum: int | float
    exclusive_minimum: bool = False
    min_items: int = 0
    max_items: int | None = None
    max_inner_items: int | None = None

    def __str__(self) -> str:
        return f"{'(' if self.exclusive_minimum else '['}{self.minimum}, {self.maximum}]"


BOUNDS: Final[Mapping[str, Bound]] = MappingProxyType(
    {
        "n": Bound("int", 1, 64),
        "presence_penalty": Bound("float", -2, 2),
        "frequency_penalty": Bound("float", -2, 2),
        "repetition_penalty": Bound("float", 0, 10, exclusive_minimum=True),
        "temperature": Bound("float", 0, 2),
        "top_p": Bound("float", 0, 1, exclusive_minimum=True),
        "top_k": Bound("int", -1, MAX_VOCABULARY),
        "min_p": Bound("float", 0, 1),
        "seed": Bound("int", -(1 << 63), (1 << 63) - 1),
        "stop": Bound("str", 1, 256, max_items=16),
        "stop_token_ids": Bound("int", 0, MAX_VOCABULARY - 1, max_items=64),
        "max_tokens": Bound("int", 1, MAX_CONTEXT),
        "min_tokens": Bound("int", 0, MAX_CONTEXT),
        "logprobs": Bound("int", 0, 20),
        "prompt_logprobs": Bound("int", 0, 20),
        "logit_bias": Bound("float", -100, 100, max_items=1024),  # of the values; the keys are token ids
        "allowed_token_ids": Bound("int", 0, MAX_VOCABULARY - 1, min_items=1, max_items=MAX_VOCABULARY),
        "bad_words": Bound("str", 1, 256, max_items=128),
        # a word has a few spellings (with and without a leading space), a token at least one byte of UTF-8
        "bad_words_token_ids": Bound("int", 0, MAX_VOCABULARY - 1, max_items=512, max_inner_items=1024),
    }
)
_TOKEN_ID: Final = Bound("int", 0, MAX_VOCABULARY - 1)
_OPTIONAL: Final = frozenset({"seed", "max_tokens", "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids"})
_FLAGS: Final = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What to generate and how; the names and bounds of the HTTP API.

    `temperature` 0 is greedy. `top_k` 0 is off (-1 is read as 0). `max_tokens` None: up to the context. Lists may be
    any sized collection; they are kept as tuples. `bad_words_token_ids` is the tokenized `bad_words`: the front end
    fills it in. `structured_outputs` may be a mapping; it is kept as a `StructuredOutputs`.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()  # a string alone is one stop string
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = field(default=(), repr=False)
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, bound in BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            object.__setattr__(self, name, _checked(name, value, bound))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false.", param=name)
        if self.top_k < 0:
            object.__setattr__(self, "top_k", 0)
        if self.structured_outputs is not None:
            object.__setattr__(self, "structured_outputs", StructuredOutputs.of(self.structured_outputs))
        self._check_conflicts()

    def _check_conflicts(self) -> None:
        if self.n > 1 and self.temperature == 0:
            raise _conflict("n", "n must be 1 when temperature is 0: greedy choices are all the same.")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            message = f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})."
            raise RequestError(message, param="min_tokens")
        if self.stop and not self.detokenize:
            raise _conflict("stop", "stop strings need detokenize to be true.")
        if self.allowed_token_ids is not None:
            never = {ids[0] for ids in self.bad_words_token_ids if len(ids) == 1}
            if self.min_tokens > 0:
                never.update(self.stop_token_ids)
            if never.issuperset(self.allowed_token_ids):
                raise _conflict("allowed_token_ids", "allowed_token_ids leaves no token that may be generated.")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses ids outside [0, vocab_size) and a top_k above vocab_size; vocab_size is the width of the logits."""
        lists: dict[str, Iterable[int]] = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": self.logit_bias or (),
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": (token_id for ids in self.bad_words_token_ids for token_id in ids),
        }
        for name, ids in lists.items():
            highest = max(ids, default=-1)
            if highest >= vocab_size:
                message = f"{name} holds token id {highest}; this model's ids are below {vocab_size}."
                raise RequestError(message, param=name)
        if self.top_k > vocab_size:
            message = f"top_k must not exceed this model's {vocab_size} tokens, got {self.top_k}."
            raise RequestError(message, param="top_k")

    def resolve(self, max_model_len: int, num_prompt_tokens: int) -> SamplingParams:
        """The same parameters with `max_tokens` a number that fits the context; ContextLengthError if none does."""
        limit = f"This model's maximum context length is {max_model_len} tokens"
        room = max_model_len - num_prompt_tokens
        if room < 1:
            raise ContextLengthError(f"{limit}, but the prompt has {num_prompt_tokens}. Shorten the prompt.")
        if self.max_tokens is None:
            return replace(self, max_tokens=room)  # checks min_tokens again, against the number
        if self.max_tokens > room:
            asked = f"the prompt has {num_prompt_tokens} and max_tokens asks for {self.max_tokens} more"
            raise ContextLengthError(f"{limit}, but {asked}. Shorten one of them.", param="max_tokens")
        return self


def _conflict(name: str, message: str) -> RequestError:
    return RequestError(message, param=name, reason="conflict")


def _checked(name: str, value: Any, bound: Bound) -> Any:
    """`value` in its one normal form (int, float, str, tuple of them, or dict for logit_bias), within `bound`."""
    if bound.max_items is None:
        return _scalar(name, value, bound)
    if name == "logit_bias":
        if not isinstance(value, Mapping):
            raise RequestError("logit_bias must map token ids to numbers.", param=name)
        _check_length(name, len(value), bound.min_items, bound.max_items)
        return {_scalar(name, key, _TOKEN_ID): _scalar(name, bias, bound) for key, bias in value.items()}
    if value is None:
        return ()
    if name == "stop" and isinstance(value, str):
        value = (value,)
    items = _items(name, value, bound.min_items, bound.max_items)
    if bound.max_inner_items is None:
        return tuple(_scalar(name, item, bound) for item in items)
    inner = [_items(name, item, 1, bound.max_inner_items) for item in items]
    return tuple(tuple(_scalar(name, token_id, bound) for token_id in ids) for ids in inner)


def _items(name: str, value: Any, minimum: int, maximum: int) -> Collection[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise RequestError(f"{name} must be a list.", param=name)
    _check_length(name, len(value), minimum, maximum)
    return value


def _check_length(name: str, length: int, minimum: int, maximum: int) -> None:
    if not minimum <= length <= maximum:
        raise RequestError(f"{name} must hold {minimum} to {maximum} entries, got {length}.", param=name)


def _scalar(name: str, value: Any, bound: Bound) -> int | float | str:
    if bound.kind == "str":
        if not isinstance(value, str):
            raise RequestError(f"{name} must hold strings.", param=name)
        if not bound.minimum <= len(value) <= bound.maximum:
            message = f"{name} must be {bound.minimum} to {bound.maximum} characters long, got {len(value)}."
            raise RequestError(message, param=name)
        return value
    number = _number(value, whole=bound.kind == "int")
    if number is None:
        kind = "an integer" if bound.kind == "int" else "a number"
        raise RequestError(f"{name} must be {kind} in {bound}.", param=name)
    # NaN fails every comparison
    above = number > bound.minimum if bound.exclusive_minimum else number >= bound.minimum
    if not (above and number <= bound.maximum):
        raise RequestError(f"{name} must be in {bound}, got {_shown(number)}.", param=name)
    return number if bound.kind == "int" else float(number)


def _number(value: Any, *, whole: bool) -> int | float | None:
    """An int or float from a Python or numpy scalar; None for booleans, strings and, where `whole`, floats."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # numpy refuses its booleans here
    except TypeError:
        pass
    # numpy floats other than float64 are no `float`, but they know __float__ and have a dtype
    if whole or not (isinstance(value, float) or getattr(getattr(value, "dtype", None), "kind", "") == "f"):
        return None
    try:
        return float(value)
    except TypeError:  # an array
        return None


def _shown(number: int | float) -> str:
    if isinstance(number, int) and number.bit_length() > 64:
        return f"an integer of {number.bit_length()} bits"  # its digits could fill a page
    return str(number)
