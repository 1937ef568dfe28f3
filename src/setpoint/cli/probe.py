"""setpoint probe"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from setpoint.cli.arguments import Json
from setpoint.cli.console import DownloadBar, command_app, print_json, say, status
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig

if TYPE_CHECKING:
    from setpoint.tune.probe.calibrate import Calibration
    from setpoint.tune.probe.machine import Ceilings, MachineIdentity, MachineRecord, Rate

app = command_app("Measure what this machine can do at most, and what steps of a model cost on it.")


@app.command()
@with_knobs(EngineConfig)
def probe(
    configure: Callable[..., EngineConfig],
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Measure the steps of this model. Default: the machine alone."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="About how long to measure. Default: 10, of a model at most 60.", min=1, max=300),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure a model even if it was measured before.")] = False,
    accept_noise: Annotated[
        bool, typer.Option("--accept-noise", help="Keep what a machine says that other work disturbs.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure arithmetic peaks, read bandwidths, barriers and the noise of this machine, and keep them.

    With MODEL: what a step costs by batch, context, prompt tokens and drafts, for `setpoint plan` and `setpoint tune`;
    the engine's flags count for a model only. `setpoint inspect machine` shows what was measured of the machine last.
    """
    if model is not None:
        _probe_model(configure(model=model), 60.0 if seconds is None else seconds, again, accept_noise, json)
        return
    from setpoint.tune.probe.ceilings import measure_machine
    from setpoint.tune.probe.machine import load, store

    load(lambda problem: say(f"setpoint: {problem}; measuring again"))
    record = measure_machine(10.0 if seconds is None else seconds, Progress())
    path = store(record)
    if json:
        print_json(asdict(record))
        return
    for line in record_lines(record):
        print(line)
    say(f"setpoint: kept in {path}")


def _probe_model(config: EngineConfig, seconds: float, again: bool, accept_noise: bool, json: bool) -> None:
    from setpoint.assemble import open_runner, survey
    from setpoint.tune.probe.calibrate import calibrate, check_noise
    from setpoint.tune.probe.calibration_store import STALE_S, load_calibration, store_calibration
    from setpoint.tune.probe.machine import this_identity

    machine = this_identity()
    with DownloadBar() as bar:
        surveyed = survey(config, progress=bar)
        found = load_calibration(machine, surveyed.fingerprint, lambda problem: say(f"setpoint: {problem}"))
        if found is None or again or found.age_s > STALE_S:
            runner, surveyed = open_runner(config, progress=bar, phase=status)
            try:
                found = calibrate(
                    runner,
                    machine=machine,
                    model=config.model,
                    fingerprint=surveyed.fingerprint,
                    max_num_seqs=surveyed.config.max_num_seqs,
                    max_num_batched_tokens=surveyed.config.max_num_batched_tokens,
                    seconds=seconds,
                    report=Progress(),
                )
            finally:
                runner.close()
            if not accept_noise:
                check_noise(found)
            say(f"setpoint: kept in {store_calibration(found)}")
        else:
            say("setpoint: measured before; --again measures anew")
    if json:
        print_json(asdict(found))
        return
    for line in calibration_lines(found):
        print(line)


def calibration_lines(found: Calibration) -> list[str]:
    """The fit beside what was measured, and how far it may be trusted."""
    cost = found.cost
    lines = [f"Steps of {found.model}, measured {_ago(found.age_s)} in {found.seconds:.0f} s"]
    lines.append(f"{'step':<48}{'measured ms':>12}{'fit':>9}{'off':>8}")
    for cell in found.cells:
        fitted = cost.runner_seconds(cell.shape)
        lines.append(
            f"{cell.cell!s:<48}{cell.seconds * 1e3:>12.2f}{fitted * 1e3:>9.2f}{fitted / cell.seconds - 1:>+8.0%}"
        )
    body, head = cost.body, cost.head
    largest = body.sizes[-1]
    per_token = (body.seconds[-1] - body.seconds[0]) / max(largest - body.sizes[0], 1)
    lines += [
        f"one token {1e3 * (body(1) + head(1)):.2f} ms; a further one of a large step {1e6 * per_token:.0f} us; "
        f"1000 tokens of context {1e6 * 1000 * cost.per_context_s:.0f} us; host {1e6 * cost.host_s:.0f} us a step "
        f"and {1e6 * cost.host_per_entry_s:.0f} us a sequence",
        f"error at a step that was left out of the fit: median {found.left_out_median:.1%}, 90th percentile "
        f"{found.left_out_p90:.1%}; equal steps differ by {found.noise:.1%}",
    ]
    if found.left_out_median > BAD_FIT:
        lines.append("The fit is poor: predictions are rough. Measure again when the machine is quiet.")
    return lines


class Progress:
    """The share that is done, on one line of a terminal or in quarters elsewhere."""

    def __init__(self) -> None:
        self._said = 0

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total
        if sys.stderr.isatty():
            print(f"\rsetpoint: measuring, {percent:>3} %", end="", file=sys.stderr, flush=True)
            if done == total and self._said < 100:
                print(file=sys.stderr)
            self._said = percent
        elif percent // 25 > self._said // 25:
            self._said = percent
            say(f"setpoint: measuring, {percent} %")


BUSY_FRACTION = 0.1
BAD_FIT = 0.15
ROWS = {
    "int8 GOP/s": "int8_gops",
    "int16 GOP/s": "int16_gops",
    "bf16 GFLOP/s": "bf16_gflops",
    "fp32 GFLOP/s": "fp32_gflops",
    "L1 read GB/s": "l1_read_gb_s",
    "L2 read GB/s": "l2_read_gb_s",
    "L3 read GB/s": "l3_read_gb_s",
    "memory read GB/s": "dram_read_gb_s",
}


def identity_line(identity: MachineIdentity) -> str:
    sets = ", ".join(identity.instruction_sets) or "no AVX2"
    caches = ", ".join(
        f"{name} {_size(size)}"
        for name, size in (("L1", identity.l1_bytes), ("L2", identity.l2_bytes), ("L3", identity.l3_bytes))
        if size
    )
    guest = ", a virtual machine" if identity.virtual else ""
    return f"{identity.memory_gib} GiB of memory{guest}; {sets}; {caches or 'caches unknown'}"


def record_lines(record: MachineRecord) -> list[str]:
    """The ceilings as a table: a column for each number of threads."""
    lines = [
        f"Ceilings, measured {_ago(record.age_s)}: median (10th percentile - best) of {record.rounds} slices of "
        f"{record.slice_ms:.0f} ms",
        " " * 18 + "".join(f"{_threads(ceilings):>24}" for ceilings in record.ceilings),
    ]
    missing = []
    for title, name in ROWS.items():
        rates: list[Rate | None] = [getattr(ceilings, name) for ceilings in record.ceilings]
        if any(rates):
            lines.append(f"{title:<18}" + "".join(f"{_rate(rate):>24}" for rate in rates))
        else:
            missing.append(title.rpartition(" ")[0])
    lines.append(
        f"{'barrier us, p99':<18}"
        + "".join(f"{f'{c.barrier_median_us:.2f}, {c.barrier_p99_us:.2f}':>24}" for c in record.ceilings)
    )
    if missing:
        lines.append(f"not measured, because this CPU has no such instructions or cache: {', '.join(missing)}")
    noise = record.noise
    lines += [
        f"Noise: {noise.slices} equal slices spread by {100 * noise.spread:.0f} % (10th to 90th percentile)",
        f"CPU time meanwhile: {100 * noise.steal_fraction:.1f} % stolen by the hypervisor, "
        f"{100 * noise.others_fraction:.0f} % used by other processes",
    ]
    if noise.steal_fraction + noise.others_fraction > BUSY_FRACTION:
        lines.append("The machine was busy: these are no ceilings. Measure again when it is quiet.")
    return lines


def _threads(ceilings: Ceilings) -> str:
    return "1 thread" if ceilings.threads == 1 else f"{ceilings.threads} threads"


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "-"
    digits = 1 if rate.best < 100 else 0
    return f"{rate.median:.{digits}f} ({rate.p10:.{digits}f} - {rate.best:.{digits}f})"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _ago(seconds: float) -> str:
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"
