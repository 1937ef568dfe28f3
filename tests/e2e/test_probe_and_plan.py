"""From a file to a plan: probe, then plan, in processes of their own; another configuration needs its own probe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from setpoint.workload.trace import Trace, TraceHeader, TraceRequest, write_trace


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def setpoint(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "setpoint.cli.main", *arguments]
    environment = os.environ | {"SETPOINT_CACHE_DIR": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_probe_and_plan(tiny_llama: Path, cache: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    requests = [TraceRequest(0.05 * number, 40, 12, (1, number)) for number in range(40)]
    write_trace(Trace(TraceHeader("test"), requests), trace)
    flags = ("--trace", str(trace), "--slo", "ttft.p95<2s,tpot.p95<1s")
    unknown = setpoint(cache, "plan", str(tiny_llama), *flags)
    assert unknown.returncode == 2
    assert "setpoint probe" in unknown.stderr
    probed = setpoint(cache, "probe", str(tiny_llama), "--seconds", "2", "--accept-noise", "--json")
    assert probed.returncode == 0, probed.stderr
    found = json.loads(probed.stdout)
    assert len(found["cells"]) > 5
    assert all(cell["first_s"] > 0 < cell["second_s"] for cell in found["cells"])
    assert 0 < found["cost"]["host_s"] + found["cost"]["host_per_entry_s"] < 0.1
    planned = setpoint(cache, "plan", str(tiny_llama), *flags, "--json", "--rate", "1000")
    assert planned.returncode == 0, planned.stderr
    document = json.loads(planned.stdout)
    assert document["capacity"]["rate_rps"] > 1
    assert document["replicas"]["count"] >= 1
    impossible = setpoint(cache, "plan", str(tiny_llama), "--trace", str(trace), "--slo", "ttft.p95<1us")
    assert impossible.returncode == 1
    assert "INFEASIBLE" in impossible.stdout
    other = setpoint(cache, "plan", str(tiny_llama), *flags, "--num-threads", "1")
    assert other.returncode == 2
    assert "with the same flags" in other.stderr
