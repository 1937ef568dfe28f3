"""The knobs of engine and server.

The command line, the reference table in the docs and (later) the tuner's search space are generated from these fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from setpoint.config.knob import check_bounds, knob
from setpoint.config.speculative import SpeculativeConfig
from setpoint.errors import ConfigError

GIB = 1 << 30
MAX_CONTEXT = 1 << 25

Dtype = Literal["auto", "f32"]
KVCacheDtype = Literal["auto", "s16", "f16", "bf16", "f32"]
Isa = Literal["auto", "ref", "avx2", "avx512_vnni"]


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
    max_num_seqs: int = knob(
        64,
        "Most sequences in one step.",
        unit="sequences",
        low=1,
        high=4096,
        search=(4, 8, 16, 32, 64, 128, 256),
    )
    max_num_batched_tokens: int = knob(
        512,
        "Token budget of one step: larger favours throughput, smaller favours steady output.",
        unit="tokens",
        low=16,
        high=65536,
        search=(32, 64, 128, 256, 512, 1024, 2048),
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
        search=("off", '{"num_speculative_tokens": 2}', '{"num_speculative_tokens": 5}', "auto"),
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
    slo: str | None = knob(
        None,
        "Targets to hold while load changes, such as ttft.p95<200ms,tpot.p95<30ms: steps are sized and prompts ordered "
        "by them, and what cannot be in time gets 429. Default: none.",
    )
    shutdown_timeout: float = knob(
        30.0, "Time that running requests get after SIGTERM.", unit="seconds", low=0, high=3600
    )
    record: str | None = knob(
        None,
        "Directory for a trace of the traffic: lengths, times, prompts as salted hashes. Default: none is kept.",
    )
    record_text: bool = knob(False, "Keep the messages in that trace too.")
    record_bytes: int = knob(
        GIB, "Disk for one recording; its oldest part goes first.", unit="bytes", low=1 << 20, high=1 << 46
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.record is not None and (not self.record or "\0" in self.record):
            raise ConfigError("--record is empty or malformed; give a directory")
        if self.record_text and self.record is None:
            raise ConfigError("--record-text needs --record DIR")
