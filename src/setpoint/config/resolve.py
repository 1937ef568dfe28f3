"""From what the user left open to numbers, and why: facts of machine and model in, a whole config and reasons out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, Literal

from setpoint.config.knob import knob_of
from setpoint.config.knobs import GIB, EngineConfig
from setpoint.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a knob has its value: source is 'given', 'default' or 'derived'."""

    knob: str
    value: Any
    source: Literal["given", "default", "derived"]
    why: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts of the machine that `resolve` uses."""

    num_cpus: int
    available_memory_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts of the model that `resolve` uses."""

    max_position: int
    kv_values_per_token: int  # K and V numbers a token adds over all layers
    kv_vectors_per_token: int = 0  # that they are in: one K and one V for each kv head
    weight_bytes: int = 0  # at least; they are in memory before the cache is
    step_bytes_per_token: int = 0  # what a step works in, for each token of --max-num-batched-tokens

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        scales = 4 * self.kv_vectors_per_token if kv_dtype == "s16" else 0
        return self.kv_values_per_token * (4 if kv_dtype == "f32" else 2) + scales


def resolve(config: EngineConfig, machine: Machine, model: ModelFacts) -> tuple[EngineConfig, list[Reason]]:
    """Fill in every knob that was left open; returns a new config and a reason for each knob.

    Raises ConfigError when the machine cannot hold what was asked for.
    """
    derived: dict[str, tuple[Any, str]] = {}
    kv_dtype = config.kv_cache_dtype
    if kv_dtype == "auto":
        kv_dtype = "f32" if config.dtype == "f32" else "s16"
        derived["kv_cache_dtype"] = (kv_dtype, "s16 is as exact as f16 and faster; f32 for the reference")
    context = config.max_model_len
    if context is None:
        context = model.max_position
        derived["max_model_len"] = (context, "the context the model was trained for")
    elif context > model.max_position:
        raise ConfigError(
            f"--max-model-len {context} is longer than the model's context of {model.max_position} tokens; lower it"
        )
    threads = config.num_threads
    if threads is None:
        threads = machine.num_cpus
        derived["num_threads"] = (threads, "one per CPU this process may use")
    free = machine.available_memory_bytes - model.weight_bytes
    if free <= 0:
        raise ConfigError(
            f"the weights take {model.weight_bytes / GIB:.1f} GiB, {machine.available_memory_bytes / GIB:.1f} GiB of "
            "memory are free; choose a smaller model or a coarser weight format"
        )
    step_bytes = model.step_bytes_per_token * config.max_num_batched_tokens
    free -= step_bytes
    if free <= 0:
        raise ConfigError(
            f"steps of {config.max_num_batched_tokens} tokens work in {step_bytes / GIB:.1f} GiB, more than weights "
            "leave free; lower --max-num-batched-tokens"
        )
    free -= config.kv_host_bytes
    if free <= 0:
        raise ConfigError(
            f"--kv-host-bytes {config.kv_host_bytes} is more than the {free + config.kv_host_bytes} bytes that "
            "weights and steps leave of the memory; lower it"
        )
    token_bytes = model.kv_bytes_per_token(kv_dtype)
    kv_bytes = config.kv_cache_memory_bytes
    if kv_bytes is None:
        most = token_bytes * context * config.max_num_seqs
        kv_bytes = max(min(free // 4, most), token_bytes * 16)
        why = (
            "all sequences at full context fit"
            if kv_bytes == most
            else "a quarter of the memory that weights and steps leave"
        )
        derived["kv_cache_memory_bytes"] = (kv_bytes, why)
        shortest = kv_bytes // token_bytes
        if shortest < context and config.max_model_len is None:
            context = max(shortest // 16 * 16, 16)
            derived["max_model_len"] = (context, f"the KV cache of {kv_bytes / GIB:.1f} GiB holds no more")
    elif kv_bytes > free:
        raise ConfigError(
            f"--kv-cache-memory-bytes {kv_bytes} is more than the {free} bytes of free memory that weights and steps "
            "leave"
        )
    if kv_bytes < token_bytes * context:
        raise ConfigError(
            f"the KV cache of {kv_bytes} bytes holds {kv_bytes // token_bytes} tokens, less than one sequence of "
            f"{context}; lower --max-model-len or raise --kv-cache-memory-bytes"
        )
    resolved = replace(config, **{name: value for name, (value, _) in derived.items()})
    return resolved, [
        _reason(config, resolved, declared, derived) for declared in fields(config) if declared.name != "model"
    ]


def _reason(
    given: EngineConfig, resolved: EngineConfig, declared: Field[Any], derived: Mapping[str, tuple[Any, str]]
) -> Reason:
    value = getattr(resolved, declared.name)
    if declared.name in derived:
        return Reason(declared.name, value, "derived", derived[declared.name][1])
    if declared.default is not MISSING and getattr(given, declared.name) == declared.default:
        return Reason(declared.name, value, "default", knob_of(declared).help)
    return Reason(declared.name, value, "given", "set by the user")
