"""The kernel workshop builds, agrees with the reference on a few cases of every op, and says what it measured."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from setpoint import _native

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workshop() -> Path:
    """The executable, built in the directory of the native module (whose objects it shares)."""
    caches = sorted(ROOT.glob("build/*/CMakeCache.txt"), key=lambda path: path.stat().st_mtime)
    assert caches, "no build directory: run `make .venv/.installed`"
    build = caches[-1].parent
    cmake = Path(sys.executable).with_name("cmake")
    with (build / "kernel_bench.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes build one after the other
        done = subprocess.run(
            [cmake, "--build", build, "--target", "kernel_bench"], capture_output=True, text=True, timeout=280
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return build / "kernel_bench"


def run(workshop: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([workshop, *arguments], capture_output=True, text=True, timeout=200)


STATES = ("cold", "warm")
FILTERS = [
    *(f"matmul {name} gemma3-270m o {rows} warm" for name in ("Q4_K", "Q6_K", "Q2_K") for rows in ("m1", "m3", "m96")),
    *(f"matmul {name} smollm2-135m o {rows} cold" for name in ("Q4_0", "Q4_1", "Q8_0", "F16") for rows in ("m1", "m8")),
    *(f"attention s16 smollm2-135m {phase} c256 {state}" for phase in ("decode", "prefill") for state in STATES),
    "attention f16 smollm2-135m decode c256 cold",
    "attention bf16 gemma3-270m decode c256 scattered",
    *(f"{name} smollm2-135m m32" for name in ("quantize_rows", "rms_norm", "silu_mul", "gelu_tanh_mul", "add", "rope")),
    "kv_store s16 m512",
    "sample smollm2-135m",
]  # fmt: skip


@pytest.mark.parametrize("filter", FILTERS)
def test_every_variant_agrees_with_the_reference(filter: str, workshop: Path) -> None:
    done = run(workshop, "--check", "--filter", filter)
    assert done.returncode == 0, done.stdout + done.stderr
    names = run(workshop, "--list", "--filter", filter).stdout.splitlines()
    variants = set(_native.available_isas()) - {"ref"}
    assert {segment for name in names for segment in name.split("/")} >= variants
    assert done.stdout.startswith(f"{len(names)} cases, 0 differ")


def test_a_measurement_has_its_ceilings_beside_it(workshop: Path) -> None:
    done = run(
        workshop, "--json", "--seconds", "0.02", "--filter", f"Q4_0 smollm2-135m o m8 {_native.available_isas()[-1]}"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["cases"], document["wrong"]) == (2, 0)
    assert [row["case"].rpartition("/")[2] for row in document["rows"]] == ["cold", "warm"]
    for row in document["rows"]:
        assert row["us"] > 0
        assert row["gops"] == pytest.approx(2 * 8 * 576 * 576 / row["us"] / 1e3, rel=0.02)
        assert row["ceiling_gb_s"] > 0
        assert row["share"] > 0
        assert row["bound"] in ("compute", "memory", "cache")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fliter", "x"], "unknown argument --fliter"),
        (["--filter"], "--filter needs a value"),
        (["--threads", "0x"], "--threads is not a number"),
        (["--threads", "0"], "--threads must lie in"),
        (["--threads", "99999"], "--threads must lie in"),
        (["--seconds", "nan"], "--seconds must lie in"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, workshop: Path) -> None:
    done = run(workshop, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_filter_that_matches_nothing_fails(workshop: Path) -> None:
    done = run(workshop, "--check", "--filter", "no-such-op")
    assert done.returncode == 1
    assert "no case matches" in done.stderr
