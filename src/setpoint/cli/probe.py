"""setpoint probe"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from setpoint.cli.arguments import Json
from setpoint.cli.console import command_app, print_json, say

if TYPE_CHECKING:
    from setpoint.tune.machine import Ceilings, MachineIdentity, MachineRecord, Rate

app = command_app("Measure what this machine can do at most.")


@app.command()
def probe(
    seconds: Annotated[float, typer.Option(help="About how long to measure.", min=1, max=300)] = 10.0,
    json: Json = False,
) -> None:
    """Measure arithmetic peaks, read bandwidths, barriers and the noise of this machine, and keep them.

    `setpoint inspect machine` shows what was measured last.
    """
    from setpoint.tune.machine import load, store
    from setpoint.tune.probe import measure_machine

    load(lambda problem: say(f"setpoint: {problem}; measuring again"))
    record = measure_machine(seconds, Progress())
    path = store(record)
    if json:
        print_json(asdict(record))
        return
    for line in record_lines(record):
        print(line)
    say(f"setpoint: kept in {path}")


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
