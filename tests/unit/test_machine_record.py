"""The record of `setpoint probe`: kept and read back, and nothing believed that another machine or a bad disk wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from setpoint.cli.probe import record_lines
from setpoint.tune.documents import DocumentError, from_document
from setpoint.tune.probe import machine
from setpoint.tune.probe.machine import Ceilings, MachineIdentity, MachineRecord, Noise, Rate

IDENTITY = MachineIdentity(
    cpu_model="Abacus 9",
    cpu_family=25,
    cpu_model_number=17,
    cpu_stepping=1,
    architecture="x86_64",
    virtual=True,
    num_cpus=2,
    instruction_sets=("avx2",),
    memory_gib=24,
    l1_bytes=32 << 10,
    l2_bytes=1 << 20,
    l3_bytes=32 << 20,
    l3_cpus=2,
)


def ceilings(threads: int) -> Ceilings:
    rate = Rate(100.0 * threads, 90.0, 120.5)
    return Ceilings(threads, rate, rate, None, rate, rate, rate, None, Rate(20.0, 15.0, 30.0), 0.25, 0.5)


RECORD = MachineRecord(1, IDENTITY, 1.7e9, 50.0, 12, (ceilings(1), ceilings(2)), Noise(40, 0.1, 0.01, 0.2))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SETPOINT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "this_identity", lambda: IDENTITY)
    return tmp_path


def no_problem(problem: str) -> None:
    raise AssertionError(problem)


def test_a_record_comes_back_as_it_was(cache: Path) -> None:
    assert machine.load(no_problem) is None
    path = machine.store(RECORD)
    assert path.parent == cache / "machines"
    assert machine.load(no_problem) == RECORD
    newer = replace(RECORD, rounds=13)
    assert machine.store(newer) == path
    assert machine.load(no_problem) == newer
    assert list(path.parent.iterdir()) == [path]  # no parts left behind


@pytest.mark.parametrize(
    "change",
    [{"cpu_model": "Abacus 10"}, {"num_cpus": 4}, {"instruction_sets": ("avx2", "avx512_vnni")}, {"memory_gib": 48},
     {"l3_bytes": 16 << 20}, {"cpu_stepping": 2}],
    ids=str,
)  # fmt: skip
def test_another_machine_has_no_record(change: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.store(RECORD)
    monkeypatch.setattr(machine, "this_identity", lambda: replace(IDENTITY, **change))
    assert machine.load(no_problem) is None


def test_a_file_that_names_another_machine_does_not_count(cache: Path) -> None:
    path = machine.store(replace(RECORD, identity=replace(IDENTITY, num_cpus=4)))
    path.rename(machine.record_path(IDENTITY))
    problems: list[str] = []
    assert machine.load(problems.append) is None
    assert "of another machine" in problems[0]


def edit(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (edit("schema", to=2), "schema 2 instead of 1"),
        (edit("surprise", to=1), "other fields than"),
        (lambda document: document.pop("noise"), "other fields than"),
        (edit("rounds", to="12"), "record.rounds: not of type int"),
        (edit("rounds", to=True), "record.rounds: not of type int"),
        (edit("rounds", to=-1), "record.rounds: not in 0.."),
        (edit("rounds", to=10**400), "record.rounds: not in 0.."),
        (edit("measured_at_unix_s", to=-1.0), "not in 0.."),
        (edit("noise", "spread", to=math.nan), "record.noise.spread: not in 0.."),
        (edit("noise", "spread", to=math.inf), "record.noise.spread: not in 0.."),
        (edit("noise", to=[]), "record.noise: not an object"),
        (edit("ceilings", to={}), "record.ceilings: not a list"),
        (edit("ceilings", to=[]), "thread counts"),
        (edit("ceilings", 0, "threads", to=2), "thread counts"),
        (edit("ceilings", 1, "int8_gops", to=5.0), "record.ceilings[1].int8_gops: not an object"),
        (edit("ceilings", 1, "dram_read_gb_s", to=None), "dram_read_gb_s: not an object"),
        (edit("identity", "cpu_model", to="x" * 300), "longer than 256"),
        (edit("identity", "instruction_sets", to=["avx2"] * 300), "not a list of at most 256"),
    ],
)
def test_a_damaged_record_is_told_and_does_not_count(
    damage: Callable[[dict[str, Any]], Any], told: str, cache: Path
) -> None:
    path = machine.store(RECORD)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    problems: list[str] = []
    assert machine.load(problems.append) is None
    assert len(problems) == 1
    assert told in problems[0]
    assert "\n" not in problems[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b'"record"', b" " * (machine.MAX_FILE_BYTES + 1)],
    ids=["empty", "cut", "not text", "deep", "null", "list", "string", "large"],
)
def test_a_file_of_anything_is_told_and_does_not_count(content: bytes, cache: Path) -> None:
    path = machine.store(RECORD)
    path.write_bytes(content)
    problems: list[str] = []
    assert machine.load(problems.append) is None
    assert len(problems) == 1


def test_a_folder_in_the_way_is_told(cache: Path) -> None:
    machine.record_path(IDENTITY).mkdir(parents=True)
    problems: list[str] = []
    assert machine.load(problems.append) is None
    assert len(problems) == 1


def test_the_document_is_the_record() -> None:
    assert from_document(MachineRecord, json.loads(json.dumps(asdict(RECORD)))) == RECORD
    with pytest.raises(DocumentError, match="not an object"):
        from_document(MachineRecord, 7)


def test_the_ceilings_of_a_thread_count_in_between() -> None:
    record = replace(RECORD, ceilings=(ceilings(1), ceilings(2), ceilings(4), ceilings(6)))
    assert [record.at(threads).threads for threads in (1, 2, 3, 4, 5, 6, 64)] == [1, 2, 2, 4, 4, 6, 6]


def test_the_age_is_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.time, "time", lambda: 1.7e9 + 3 * 86400)
    assert RECORD.age_s == 3 * 86400
    assert "measured 3 days ago" in record_lines(RECORD)[0]
    monkeypatch.setattr(machine.time, "time", lambda: 1.6e9)  # a clock set back
    assert RECORD.age_s == 0


def test_a_busy_machine_is_called_busy() -> None:
    quiet = replace(RECORD, noise=replace(RECORD.noise, others_fraction=0.05))
    assert "busy" not in record_lines(quiet)[-1]
    assert "The machine was busy" in record_lines(RECORD)[-1]


def test_what_was_not_measured_is_named() -> None:
    lines = record_lines(RECORD)
    assert "200 (90 - 120)" in lines[2]  # int8 with two threads
    assert sum("no such instructions or cache: bf16, L3 read" in line for line in lines) == 1
