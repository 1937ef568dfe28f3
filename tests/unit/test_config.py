from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.config import (
    EngineConfig,
    Machine,
    ModelFacts,
    ServerConfig,
    available_in_container,
    cache_directory,
    knob_of,
    log_level,
    resolve,
)
from setpoint.errors import ConfigError

GIB = 1 << 30
MACHINE = Machine(num_cpus=2, available_memory_bytes=8 * GIB)
MODEL = ModelFacts(max_position=8192, kv_values_per_token=30 * 2 * 3 * 64, kv_vectors_per_token=30 * 2 * 3)
TOKEN_BYTES = MODEL.kv_bytes_per_token("s16")


def test_every_number_has_bounds() -> None:
    for config in (EngineConfig(model="m"), ServerConfig()):
        for name, declared in type(config).__dataclass_fields__.items():
            if "int" in str(declared.type) or "float" in str(declared.type):
                knob = knob_of(declared)
                assert knob.low is not None, name
                assert knob.high is not None, name


@pytest.mark.parametrize(
    ("knobs", "flag"),
    [
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"max_num_seqs": True}, "--max-num-seqs"),
        ({"max_model_len": 1 << 40}, "--max-model-len"),
        ({"isa": "avx1024"}, "--isa"),
        ({"dtype": "int1"}, "--dtype"),
        ({"num_threads": -1}, "--num-threads"),
    ],
)
def test_a_value_out_of_bounds_names_its_flag(knobs: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        EngineConfig(model="m", **knobs)  # type: ignore[arg-type]


def test_open_knobs_are_derived_with_a_reason() -> None:
    resolved, reasons = resolve(EngineConfig(model="m", max_num_seqs=8), MACHINE, MODEL)
    by_name = {reason.knob: reason for reason in reasons}
    assert resolved.num_threads == 2
    assert resolved.max_model_len == 8192
    assert resolved.kv_cache_dtype == "s16"
    assert resolved.kv_cache_memory_bytes == 8 * 8192 * TOKEN_BYTES
    assert by_name["num_threads"].source == "derived"
    assert by_name["max_num_seqs"].source == "given"
    assert by_name["isa"].source == "default"
    assert all(reason.why for reason in reasons)


def test_a_small_machine_gets_a_shorter_context() -> None:
    small = Machine(1, 4 * 1000 * TOKEN_BYTES)
    resolved, _ = resolve(EngineConfig(model="m"), small, MODEL)
    assert resolved.max_model_len is not None
    assert 900 <= resolved.max_model_len <= 1000


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_model_len": 9000}, "8192"),
        ({"kv_cache_memory_bytes": 1 << 45}, "free memory"),
        ({"kv_cache_memory_bytes": 7 * GIB}, "free memory"),
        ({"kv_cache_memory_bytes": 1 << 20, "max_model_len": 4096}, "less than one sequence"),
    ],
)
def test_what_cannot_be_held_is_refused(knobs: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(EngineConfig(model="m", **knobs), MACHINE, replace(MODEL, weight_bytes=2 * GIB))  # type: ignore[arg-type]


def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"weights take 8\.0 GiB, 8\.0 GiB of memory are free"):
        resolve(EngineConfig(model="m"), MACHINE, replace(MODEL, weight_bytes=8 * GIB))


def test_what_steps_work_in_counts() -> None:
    config = EngineConfig(model="m", max_num_batched_tokens=65536)
    with pytest.raises(ConfigError, match=r"steps of 65536 tokens work in 8\.0 GiB.*--max-num-batched-tokens"):
        resolve(config, MACHINE, replace(MODEL, step_bytes_per_token=1 << 17))
    plain, _ = resolve(config, MACHINE, MODEL)
    working, _ = resolve(config, MACHINE, replace(MODEL, step_bytes_per_token=1 << 16))
    assert plain.kv_cache_memory_bytes is not None
    assert working.kv_cache_memory_bytes == plain.kv_cache_memory_bytes - GIB


@given(
    memory=st.integers(1 << 26, 1 << 40),
    seqs=st.integers(1, 256),
    context=st.integers(16, 1 << 20),
    weights=st.integers(0, 1 << 25),
    step=st.integers(0, 1 << 15),
)
def test_resolve_never_promises_more_than_there_is(
    memory: int, seqs: int, context: int, weights: int, step: int
) -> None:
    facts = ModelFacts(context, MODEL.kv_values_per_token, MODEL.kv_vectors_per_token, weights, step)
    weights += step * EngineConfig(model="m").max_num_batched_tokens
    resolved, _ = resolve(EngineConfig(model="m", max_num_seqs=seqs), Machine(2, memory), facts)
    assert resolved.kv_cache_memory_bytes is not None
    assert resolved.max_model_len is not None
    assert resolved.kv_cache_memory_bytes <= memory - weights
    assert resolved.max_model_len <= context
    assert resolved.max_model_len * TOKEN_BYTES <= resolved.kv_cache_memory_bytes


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETPOINT_CACHE_DIR", "/somewhere")
    assert str(cache_directory()) == "/somewhere"
    monkeypatch.setenv("SETPOINT_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="SETPOINT_LOG_LEVEL"):
        log_level()


@pytest.mark.parametrize(
    ("limit", "current", "statistics", "free"),
    [
        ("1000", "900", "active_file 300\ninactive_file 400\nslab_reclaimable 50\nanon 150\n", 850),
        ("1000", "900", "anon 900\n", 100),
        ("1000", "1100", "anon 1100\n", 0),
        ("1000", "100", "inactive_file 400\n", 1000),
        ("max", "900", "anon 900\n", 1 << 62),
        ("1000", "a word", "", 1 << 62),
        ("1000", "900", "no number at all\n", 1 << 62),
    ],
)
def test_the_page_cache_of_a_container_counts_as_free(
    tmp_path: Path, limit: str, current: str, statistics: str, free: int
) -> None:
    for name, content in (("max", limit), ("current", current), ("stat", statistics)):
        (tmp_path / f"memory.{name}").write_text(content)
    assert available_in_container(tmp_path) == free
    assert available_in_container(tmp_path / "none") == 1 << 62
