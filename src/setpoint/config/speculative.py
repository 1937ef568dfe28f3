"""`--speculative-config`: a knob that is a small language of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from setpoint.errors import ConfigError

SPECULATION_METHODS = ("auto", "off", "prompt-lookup", "suffix", "draft")
MAX_SPECULATIVE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """Who guesses the tokens that follow, and how many of them a step may verify for one sequence."""

    method: str = "auto"
    model: str | None = None  # of method "draft"; with "auto", one more that guesses
    num_speculative_tokens: int = MAX_SPECULATIVE_TOKENS

    @classmethod
    def parse(cls, text: str) -> SpeculativeConfig:
        """From a JSON object, or the bare name of a method. Raises ConfigError."""
        flag = "--speculative-config"
        try:
            given = json.loads(text) if text.lstrip().startswith("{") else {"method": text}
        except ValueError as error:
            raise ConfigError(f"{flag} is not valid JSON: {error}") from None
        names = [declared.name for declared in fields(cls)]
        for name in given:
            if name not in names:
                raise ConfigError(f"{flag} has no {name[:64]!r}; it takes {', '.join(names)}")
        method, model = given.get("method", "draft" if "model" in given else "auto"), given.get("model")
        if method not in SPECULATION_METHODS:
            raise ConfigError(f"{flag}: method is {str(method)[:64]!r}; choose one of {', '.join(SPECULATION_METHODS)}")
        if model is not None and (not isinstance(model, str) or not 0 < len(model) <= 4096 or "\0" in model):
            raise ConfigError(f"{flag}: model must be the name or path of a model")
        if method == "draft" and model is None:
            raise ConfigError(f"{flag}: method 'draft' needs a model that guesses: add \"model\"")
        if method not in ("draft", "auto") and model is not None:
            raise ConfigError(f"{flag}: method {method!r} takes no model; leave it out or choose 'draft'")
        count = given.get("num_speculative_tokens", MAX_SPECULATIVE_TOKENS)
        if type(count) is not int or not 1 <= count <= MAX_SPECULATIVE_TOKENS:
            raise ConfigError(f"{flag}: num_speculative_tokens must be in 1..{MAX_SPECULATIVE_TOKENS}")
        return cls(method, model, count)
