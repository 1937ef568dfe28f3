"""The knobs: each declared once, as a field with metadata.

The command line, the reference table in the docs and (later) the tuner's search space are generated from these
fields. `resolve` turns what the user left open into numbers and says why. This is the only module that reads
environment variables (huggingface-hub reads its own).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from setpoint.errors import ConfigError

GIB = 1 << 30
MAX_CONTEXT = 1 << 25

Dtype = Literal["auto", "f32"]
KVCacheDtype = Literal["auto", "s16", "f16", "bf16", "f32"]
Isa = Literal["auto", "ref", "avx2", "avx512_vnni"]


@dataclass(frozen=True, slots=True)
class Knob:
    """What a field means to a person: help with its reason, unit, bounds or choices."""

    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    lossy: bool = False


def knob(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    lossy: bool = False,
) -> Any:
    meta = Knob(help, unit, low, high, choices, lossy)
    return field(default=default, metadata={"knob": meta})


def knob_of(declared: Field[Any]) -> Knob:
    meta = declared.metadata["knob"]
    assert isinstance(meta, Knob)
    return meta


def check_bounds(config: object) -> None:
    """Raise ConfigError for the first field outside its declared bounds."""
    for declared in fields(config):  # type: ignore[arg-type]
        if "knob" not in declared.metadata:
            continue
        meta, value = knob_of(declared), getattr(config, declared.name)
        flag = "--" + declared.name.replace("_", "-")
        if value is None:
            continue
        if meta.choices and value not in meta.choices:
            raise ConfigError(f"{flag} is {value!r}; choose one of {', '.join(meta.choices)}")
        if meta.low is not None and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or value < meta.low
        ):
            raise ConfigError(f"{flag} is {value!r}; it must be at least {meta.low:g}")
        if meta.high is not None and value > meta.high:
            raise ConfigError(f"{flag} is {value!r}; it must be at most {meta.high:g}")


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


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine needs to know. `None` means: derive it (see `resolve`)."""

    model: str
    dtype: Dtype = knob(
        "auto",
        "Arithmetic: auto keeps the file's weight format with 8-bit activations; f32 is the reference program.",
        choices=get_args(Dtype),
        lossy=True,
    )
    kv_cache_dtype: KVCacheDtype = knob(
        "auto",
        "Number format of the KV cache: s16 is 16-bit integers with a scale per token and head; auto is s16, and f32 "
        "under --dtype f32.",
        choices=get_args(KVCacheDtype),
    )
    max_model_len: int | None = knob(
        None,
        "Longest prompt plus output. Default: what the model was trained for.",
        unit="tokens",
        low=16,
        high=MAX_CONTEXT,
    )
    kv_cache_memory_bytes: int | None = knob(
        None,
        "Memory of the KV cache. Default: a quarter of what the weights leave free, at most what can be used.",
        unit="bytes",
        low=1,
        high=1 << 46,
    )
    max_num_seqs: int = knob(64, "Most sequences in one step.", unit="sequences", low=1, high=4096)
    max_num_batched_tokens: int = knob(
        512,
        "Token budget of one step: larger favours throughput, smaller favours steady output.",
        unit="tokens",
        low=16,
        high=65536,
    )
    enable_prefix_caching: bool = knob(True, "Reuse the KV cache of a prompt's prefix; never changes the output.")
    kv_host_bytes: int = knob(
        0,
        "Memory below the KV cache: blocks that lose their place there are kept here, and copied back where that is "
        "faster than computing them. 0 keeps none.",
        unit="bytes",
        low=0,
        high=1 << 46,
    )
    kv_disk_path: str | None = knob(
        None, "Directory below that, which survives a restart; it holds what prompts say. Default: none is kept."
    )
    kv_disk_bytes: int = knob(
        16 * GIB,
        "Disk for blocks in --kv-disk-path; the least recently used go first.",
        unit="bytes",
        low=1 << 20,
        high=1 << 50,
    )
    session_ttl: float = knob(
        600.0,
        "Time that a session's prefix is kept before others after its last request.",
        unit="seconds",
        low=0,
        high=86400,
    )
    session_share: float = knob(
        0.5, "Part of the KV cache that the sessions of one API key may keep like that; 0 keeps none.", low=0, high=1
    )
    max_num_queued_reqs: int = knob(
        1024, "Waiting requests before new ones get 429.", unit="requests", low=1, high=1 << 20
    )
    max_num_queued_tokens: int = knob(
        1 << 20, "Waiting prompt tokens before new requests get 429.", unit="tokens", low=1, high=1 << 32
    )
    speculative_config: str = knob(
        "auto",
        "Guess tokens and verify several in a step; never changes the output, and stops where it does not pay. "
        'auto, off, prompt-lookup, suffix, draft, or {"method": ..., "model": ..., "num_speculative_tokens": ...}.',
        unit="JSON",
    )
    num_threads: int | None = knob(
        None, "Compute threads. Default: one per CPU we may use.", unit="threads", low=1, high=1024
    )
    weight_cache_bytes: int = knob(
        16 * GIB,
        "Disk for repacked weights, which start faster; the least recently used go first, 0 keeps none.",
        unit="bytes",
        low=0,
        high=1 << 46,
    )
    isa: Isa = knob("auto", "Instruction set of the kernels; all give the same bits.", choices=get_args(Isa))
    seed: int | None = knob(
        None, "Seed for requests that bring none. Default: from the system.", low=0, high=(1 << 63) - 1
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        SpeculativeConfig.parse(self.speculative_config)
        if not self.model or len(self.model) > 4096 or "\0" in self.model:
            raise ConfigError("the model name is empty or malformed; see `setpoint models list`")
        if self.kv_disk_path is not None and (not self.kv_disk_path or "\0" in self.kv_disk_path):
            raise ConfigError("--kv-disk-path is empty or malformed; give a directory")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the HTTP server needs to know."""

    host: str = knob("127.0.0.1", "Address to listen on; a public one needs an API key.")
    port: int = knob(8000, "Port to listen on; 0 picks a free one.", low=0, high=65535)
    served_model_name: str | None = knob(None, "Name of the model in the API. Default: the name it was asked for by.")
    api_key: tuple[str, ...] = knob((), "Accepted API key; may be given several times, or SETPOINT_API_KEY.")
    api_key_file: str | None = knob(None, "File of accepted API keys, one a line; read again when it changes.")
    open_metrics: bool = knob(False, "Serve /metrics without a key even when keys are set.")
    shutdown_timeout: float = knob(
        30.0, "Time that running requests get after SIGTERM.", unit="seconds", low=0, high=3600
    )

    def __post_init__(self) -> None:
        check_bounds(self)


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


def this_machine() -> Machine:
    """CPUs this process may use and memory that is free now (container limit included)."""
    return Machine(len(os.sched_getaffinity(0)), _available_memory())


def _available_memory() -> int:
    available = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min(available, available_in_container(Path("/sys/fs/cgroup")))


def available_in_container(group: Path) -> int:
    """What the memory limit of a cgroup (version 2) leaves, counting as free what the kernel drops when it must."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if not limit.isdigit():
            return 1 << 62
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62
    droppable = sum(int(statistics.get(name, 0)) for name in ("active_file", "inactive_file", "slab_reclaimable"))
    return max(int(limit) - max(used - droppable, 0), 0)


def cache_directory() -> Path:
    """Where downloads and repacked weights live: SETPOINT_CACHE_DIR, else the user's cache directory."""
    own = os.environ.get("SETPOINT_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "setpoint"


def spare_library_threads() -> None:
    """numpy's linear algebra starts a thread per CPU as it is imported: 50 ms for what nothing here uses."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def api_key_from_environment() -> str | None:
    return os.environ.get("SETPOINT_API_KEY") or None


def log_level() -> str:
    level = os.environ.get("SETPOINT_LOG_LEVEL", "info").lower()
    if level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"SETPOINT_LOG_LEVEL is {level!r}; choose one of debug, info, warning, error")
    return level
