"""The probes on this machine: numbers that physics allows, and the commands that measure and show them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from setpoint import _native
from setpoint.cli.main import main
from setpoint.tune.documents import from_document
from setpoint.tune.probe import machine
from setpoint.tune.probe.ceilings import Probe, thread_counts
from setpoint.tune.probe.machine import Ceilings, MachineRecord

CPUS = _native.num_cpus()
MS = 5
# No core does 10 GHz or more than 1024 8-bit operations a cycle; none reads 4 KiB a cycle.
MOST_GOPS, MOST_GB_S = 10 * 1024 * CPUS, 10 * 4096 * CPUS


@pytest.fixture(scope="module")
def probe() -> _native.Probe:
    return _native.Probe()


@pytest.mark.parametrize("threads", sorted({1, CPUS}))
@pytest.mark.parametrize("kind", ["int8", "int16", "bf16", "fp32"])
def test_peaks_are_what_a_cpu_can_do(kind: str, threads: int, probe: _native.Probe) -> None:
    rate = probe.peak(kind, threads, MS / 1e3)
    needed = "avx512_bf16" if kind == "bf16" else "avx2"
    if needed in _native.cpu_features():
        assert rate is not None
        assert 0 < rate < MOST_GOPS
    else:
        assert rate is None


@pytest.mark.parametrize("threads", sorted({1, CPUS}))
@pytest.mark.parametrize("working_set", [0, 16 << 10, 512 << 10, 8 << 20, 1 << 60])
def test_reads_are_what_a_memory_can_do(working_set: int, threads: int, probe: _native.Probe) -> None:
    assert 0 < probe.read(threads, working_set, MS / 1e3) < MOST_GB_S
    assert 0 < probe.dram(threads, MS / 1e3) < MOST_GB_S


@pytest.mark.parametrize("threads", sorted({1, CPUS}))
def test_a_barrier_takes_time_and_its_tail_no_less(threads: int, probe: _native.Probe) -> None:
    median, p99 = probe.barrier(threads, MS / 1e3)
    assert 0 < median <= p99 < 1e6


def test_the_buffer_is_larger_than_the_caches_and_allocated_by_the_first_read() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    fresh = _native.Probe()
    before = resident()
    fresh.peak("int8", 1, MS / 1e3)
    assert resident() - before < fresh.buffer_bytes // 4
    assert fresh.buffer_bytes >= 32 << 20
    fresh.dram(1, MS / 1e3)
    held = resident()
    assert held - before > fresh.buffer_bytes // 2
    for threads in (1, CPUS):
        fresh.dram(threads, MS / 1e3)
    assert resident() - held < fresh.buffer_bytes // 4


def test_callers_take_turns(probe: _native.Probe) -> None:
    rates: list[float | None] = []
    callers = [threading.Thread(target=lambda: rates.append(probe.dram(CPUS, MS / 1e3))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(rates) == 4


@pytest.mark.parametrize("threads", [0, -1, CPUS + 1, 1 << 30])
def test_absurd_thread_counts_are_refused(threads: int, probe: _native.Probe) -> None:
    with pytest.raises(ValueError, match="a probe runs with 1 to"):
        probe.dram(threads, 0.001)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 61.0, float("nan"), float("inf")])
def test_absurd_times_are_refused(seconds: float, probe: _native.Probe) -> None:
    with pytest.raises(ValueError, match="more than 0 and at most 60 seconds"):
        probe.peak("int8", 1, seconds)


def test_an_unknown_peak_is_refused(probe: _native.Probe) -> None:
    with pytest.raises(ValueError, match="unknown peak 'int4'"):
        probe.peak("int4", 1, 0.001)


def test_cpu_times_go_forward_and_add_up(probe: _native.Probe) -> None:
    before = _native.cpu_times()
    probe.peak("fp32", CPUS, 0.05)
    after = _native.cpu_times()
    assert all(after[name] >= before[name] for name in after)
    assert after["own_s"] - before["own_s"] > 0.001
    assert after["busy_s"] + after["steal_s"] <= after["total_s"] + 0.1


def test_adjacent_probes_for_benchmarks() -> None:
    probe = Probe()
    rate = probe.vnni(1, ms=MS)
    assert (rate is not None) == ("avx2" in _native.cpu_features())
    assert 0 < probe.dram(CPUS, ms=MS) < MOST_GB_S


def test_thread_counts_double_up_to_all() -> None:
    expected = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 6: [1, 2, 4, 6], 8: [1, 2, 4, 8]}
    assert {cpus: thread_counts(cpus) for cpus in expected} == expected


def test_probe_measures_keeps_and_inspect_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SETPOINT_CACHE_DIR", str(tmp_path))
    assert main(["inspect", "machine"]) == 0
    assert "not measured yet; `setpoint probe` does it" in capsys.readouterr().out

    assert main(["probe", "--seconds", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    record = from_document(MachineRecord, json.loads(out))
    assert [line for line in err.splitlines() if "%" in line][-1].endswith("100 %")
    assert [c.threads for c in record.ceilings] == thread_counts(CPUS)
    for ceilings in record.ceilings:
        assert_plausible(ceilings)
    assert record.rounds >= 1
    assert record.age_s < 600
    assert list((tmp_path / "machines").iterdir()) == [machine.record_path(record.identity)]

    assert main(["inspect", "machine", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert from_document(MachineRecord, shown["measured"]) == record
    assert main(["inspect", "machine"]) == 0
    out, err = capsys.readouterr()
    assert record.identity.cpu_model in out
    assert "memory read GB/s" in out
    assert err == ""


def assert_plausible(ceilings: Ceilings) -> None:
    fast = "avx2" in _native.cpu_features()
    assert (ceilings.int8_gops is not None) == (ceilings.fp32_gflops is not None) == fast
    assert (ceilings.bf16_gflops is not None) == ("avx512_bf16" in _native.cpu_features())
    for rate in (ceilings.int8_gops, ceilings.l1_read_gb_s, ceilings.dram_read_gb_s):
        assert rate is None or 0 < rate.p10 <= rate.median <= rate.best < max(MOST_GOPS, MOST_GB_S)
    assert 0 < ceilings.barrier_median_us <= ceilings.barrier_p99_us


def test_a_damaged_record_is_told_by_both_commands_and_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SETPOINT_CACHE_DIR", str(tmp_path))
    path = machine.record_path(machine.this_identity())
    path.parent.mkdir()
    path.write_text("{")
    assert main(["inspect", "machine"]) == 0
    out, err = capsys.readouterr()
    assert "not measured yet" in out
    assert err.count("\n") == 1
    assert "does not count" in err
    assert main(["probe", "--seconds", "1"]) == 0
    out, err = capsys.readouterr()
    assert sum("does not count" in line and "measuring again" in line for line in err.splitlines()) == 1
    assert "memory read GB/s" in out
    problems: list[str] = []
    assert machine.load(problems.append) is not None
    assert problems == []


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--seconds", "0"]) == 2
    assert "--seconds" in capsys.readouterr().err
