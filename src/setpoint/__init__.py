"""Setpoint: an inference engine that takes a target instead of a hundred flags.

The whole public surface. Names load on first use, so that `import setpoint` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from setpoint import errors as errors
    from setpoint.config import EngineConfig as EngineConfig
    from setpoint.engine.engine import Engine as Engine
    from setpoint.engine.sampling import SamplingParams as SamplingParams
    from setpoint.engine.structured_outputs import StructuredOutputs as StructuredOutputs
    from setpoint.llm import LLM as LLM
    from setpoint.llm import CompletionOutput as CompletionOutput
    from setpoint.llm import RequestOutput as RequestOutput

__version__ = "0.1.0"

_HOMES = {
    "LLM": "setpoint.llm",
    "RequestOutput": "setpoint.llm",
    "CompletionOutput": "setpoint.llm",
    "SamplingParams": "setpoint.engine.sampling",
    "StructuredOutputs": "setpoint.engine.structured_outputs",
    "Engine": "setpoint.engine.engine",
    "EngineConfig": "setpoint.config",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("setpoint.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'setpoint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
