"""What a user may set (`knobs`), what follows from it (`resolve`), and what the process finds (`environment`)."""

from setpoint.config.environment import (
    api_key_from_environment,
    available_in_container,
    cache_directory,
    log_level,
    spare_library_threads,
    this_machine,
)
from setpoint.config.knob import Knob, check_bounds, knob, knob_of
from setpoint.config.knobs import EngineConfig, ServerConfig
from setpoint.config.resolve import Machine, ModelFacts, Reason, resolve
from setpoint.config.speculative import MAX_SPECULATIVE_TOKENS, SpeculativeConfig

__all__ = [
    "MAX_SPECULATIVE_TOKENS",
    "EngineConfig",
    "Knob",
    "Machine",
    "ModelFacts",
    "Reason",
    "ServerConfig",
    "SpeculativeConfig",
    "api_key_from_environment",
    "available_in_container",
    "cache_directory",
    "check_bounds",
    "knob",
    "knob_of",
    "log_level",
    "resolve",
    "spare_library_threads",
    "this_machine",
]
