"""`setpoint probe MODEL` without a model: sound plans, the law of a runner found, the record kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_support import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint import assemble
from setpoint.cli.main import run
from setpoint.engine.plan import StepPlan, StepResult
from setpoint.engine.step_cost import ShapeOf
from setpoint.errors import ConfigError
from setpoint.runtime.fake import FakeRunner, fake_info
from setpoint.tune.probe import calibrate as calibrating
from setpoint.tune.probe import machine
from setpoint.tune.probe.calibrate import Calibration, calibrate, check_noise
from setpoint.tune.probe.calibration_store import calibration_path, load_calibration, store_calibration
from setpoint.tune.probe.grid import Cell, Grid, grid
from setpoint.tune.probe.machine import MachineIdentity

IDENTITY = MachineIdentity("Abacus 9", 25, 17, 1, "x86_64", True, 2, ("avx2",), 24, 1 << 15, 1 << 20, 1 << 25, 2)


class SlowRunner(FakeRunner):
    """The oracle of plans, on a clock that its steps move."""

    now = 0.0

    def execute(self, plan: StepPlan) -> StepResult:
        shape = ShapeOf(self.info.kv_groups)(plan.entries)
        type(self).now += 1e-3 + 1e-4 * shape.tokens + 1e-6 * shape.context + 1e-5 * shape.rows
        return super().execute(plan)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[SlowRunner]:
    monkeypatch.setattr(calibrating.time, "perf_counter", lambda: SlowRunner.now)
    monkeypatch.setattr(calibrating, "_MOST_REPEATS", 3)
    monkeypatch.setattr(calibrating, "measure_host", lambda runner, sizes: (2e-4, 1e-5))
    return SlowRunner


def silent(done: int, total: int) -> None:
    pass


def made(runner: FakeRunner, seconds: float = 1000.0, report: Callable[[int, int], None] = silent) -> Calibration:
    return calibrate(
        runner,
        machine=IDENTITY,
        model="abacus",
        fingerprint="f" * 64,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        seconds=seconds,
        report=report,
    )


INFO = fake_info(num_blocks=200, max_model_len=80)


def test_the_probe_finds_the_law_of_a_runner(clock: type[SlowRunner]) -> None:
    told: list[tuple[int, int]] = []
    found = made(clock(INFO), report=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert found.noise == pytest.approx(0.0, abs=1e-9)
    assert found.left_out_p90 < 0.03
    shape = replace(ShapeOf(INFO.kv_groups)([]), entries=5, tokens=5, rows=5, context=250)
    assert found.cost.runner_seconds(shape) == pytest.approx(1e-3 + 5e-4 + 2.5e-4 + 5e-5, rel=0.05)
    assert found.cost.seconds(shape) - found.cost.runner_seconds(shape) == pytest.approx(2.5e-4)
    check_noise(found)


def test_a_short_probe_measures_the_most_telling_cells(clock: type[SlowRunner]) -> None:
    short, whole = made(clock(INFO), seconds=0.3), made(clock(INFO))
    assert 1 <= len(short.cells) < len(whole.cells)
    assert [cell.cell for cell in short.cells] == [cell.cell for cell in whole.cells][: len(short.cells)]


def test_a_noisy_machine_is_refused_unless_told_otherwise(clock: type[SlowRunner]) -> None:
    found = made(clock(INFO))
    with pytest.raises(ConfigError, match=r"differ by 20%.*--accept-noise"):
        check_noise(replace(found, noise=0.2))


@settings(max_examples=scaled(10), deadline=None)
@given(
    st.sampled_from([1, 3, 8]),
    st.sampled_from([16, 40, 64]),
    st.integers(17, 120),
    st.sampled_from([(None,), (None, 24), (20,)]),
    st.integers(30, 400),
)
def test_every_cell_is_a_plan_that_a_scheduler_could_make(
    seqs: int, budget: int, context: int, windows: tuple[int | None, ...], num_blocks: int
) -> None:
    """The fake runner raises where a table, a position or a block is wrong."""
    info = fake_info(num_blocks=num_blocks, max_model_len=context, windows=windows)
    cells = grid(seqs, budget, context)
    assert len(cells) == len(set(cells))
    runner = FakeRunner(info) if windows == (None,) else Written(info)
    steps = Grid(runner, cells, max_num_batched_tokens=budget)
    for cell in steps.cells:
        result = steps.execute(cell)
        assert sum(len(entry.rows) for entry in result.entries) == cell.decodes * (1 + cell.drafts) + (
            cell.prompt > 0 and cell.is_last
        )
        shape = ShapeOf(info.kv_groups)(steps.plan_shape(cell))
        assert (shape.tokens, shape.entries) == (cell.tokens, cell.sequences)


class Written(FakeRunner):
    """Checks tables and blocks, not whether what a window hides was computed: its blocks serve several positions."""

    def execute(self, plan: StepPlan) -> StepResult:
        for group, positions in enumerate(self._positions):
            for entry in plan.entries:
                for index, block in enumerate(entry.block_tables[group]):
                    if block >= 0 and index * self.info.block_size < entry.start:
                        begin = index * self.info.block_size
                        positions[block] = range(begin, begin + self.info.block_size)
        return super().execute(plan)


def test_no_room_is_said() -> None:
    with pytest.raises(ConfigError, match="KV cache"):
        Grid(FakeRunner(fake_info(num_blocks=2)), [Cell(1, 128)], max_num_batched_tokens=16)


@pytest.fixture
def kept(clock: type[SlowRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    monkeypatch.setenv("SETPOINT_CACHE_DIR", str(tmp_path))
    return made(clock(INFO))


def test_a_calibration_comes_back_as_it_was(kept: Calibration) -> None:
    problems: list[str] = []
    assert load_calibration(IDENTITY, kept.fingerprint, problems.append) is None
    path = store_calibration(kept)
    assert list(path.parent.iterdir()) == [path]
    again = load_calibration(IDENTITY, kept.fingerprint, problems.append)
    assert again == kept
    assert load_calibration(IDENTITY, "another", problems.append) is None
    assert load_calibration(replace(IDENTITY, num_cpus=3), kept.fingerprint, problems.append) is None
    assert not problems


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: d.update(schema=7), "schema 7"),
        (lambda d: d.update(extra=1), "other fields"),
        (lambda d: d.update(fingerprint="x"), "another machine or model"),
        (lambda d: d["cost"]["body"]["seconds"].reverse(), "ascend"),
        (lambda d: d["cost"].update(per_pair_s=-1.0), "not in 0"),
        (lambda d: d["cells"].append({}), "other fields"),
    ],
)
def test_a_damaged_calibration_is_told_and_does_not_count(
    kept: Calibration, damage: Callable[[dict[str, object]], None], told: str
) -> None:
    path = store_calibration(kept)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    problems: list[str] = []
    assert load_calibration(IDENTITY, kept.fingerprint, problems.append) is None
    assert len(problems) == 1
    assert told in problems[0]


def test_the_file_is_where_its_machine_and_model_say(kept: Calibration) -> None:
    assert calibration_path(IDENTITY, "a") != calibration_path(IDENTITY, "b")
    path = calibration_path(IDENTITY, kept.fingerprint)
    path.parent.mkdir(parents=True)
    path.write_text("[" * 100_000)
    problems: list[str] = []
    assert load_calibration(IDENTITY, kept.fingerprint, problems.append) is None
    assert len(problems) == 1


@pytest.fixture
def command(clock: type[SlowRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """`setpoint probe m`, whose model is the slow runner."""
    config = SimpleNamespace(model="m", max_num_seqs=4, max_num_batched_tokens=32)
    surveyed = SimpleNamespace(config=config, fingerprint="f")
    opened: list[SlowRunner] = []

    def open_runner(config: object, **more: object) -> tuple[SlowRunner, SimpleNamespace]:
        opened.append(clock(INFO))
        return opened[-1], surveyed

    monkeypatch.setenv("SETPOINT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "this_identity", lambda: IDENTITY)
    monkeypatch.setattr(assemble, "survey", lambda config, progress: surveyed)
    monkeypatch.setattr(assemble, "open_runner", open_runner)

    def call(*arguments: str) -> tuple[int, int]:
        code = run("probe", ["m", *arguments])
        assert all(runner.closed for runner in opened)
        return code, len(opened)

    return call


def test_a_model_is_measured_once_and_again_when_asked(
    command: Callable[..., tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command() == (0, 1)
    out = capsys.readouterr().out
    assert "4 x 1 token behind 64" in out
    assert "error at a step that was left out of the fit" in out
    assert command() == (0, 1)
    assert "measured before" in capsys.readouterr().err
    assert command("--again", "--json") == (0, 2)
    assert json.loads(capsys.readouterr().out)["fingerprint"] == "f"


def test_a_noisy_probe_is_not_kept(
    command: Callable[..., tuple[int, int]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "MOST_NOISE", -1.0)
    assert command() == (2, 1)
    assert "--accept-noise" in capsys.readouterr().err.splitlines()[-1]
    assert command("--accept-noise") == (0, 2)  # nothing was kept
    assert command("--accept-noise") == (0, 2)
