"""setpoint bench serve URL --trace T"""

from __future__ import annotations

import json as json_module
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from setpoint.cli.console import RequestBar, print_json, printable, say, status
from setpoint.errors import ConfigError

if TYPE_CHECKING:
    from setpoint.tune.measure import Run
    from setpoint.tune.metrics import Targets
    from setpoint.tune.replay.capacity import Capacity
    from setpoint.workload.trace import Trace

UNMET, INVALID, INTERRUPTED = 1, 5, 130
MAX_INVALID = 3  # runs in a row before a search gives up
MOST_POINT = 6.0  # times its length, for a run at a low load
POINT_S = 60.0  # of trace for each load of a search


def serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="An OpenAI-compatible server: http://127.0.0.1:8000.")],
    trace: Annotated[Path, typer.Option(metavar="FILE", help="The requests: see `setpoint trace`.")],
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="SLO", help="Such as ttft.p95<200ms,tpot.p95<30ms; CLASS=... for one class. Repeatable."),
    ] = None,
    rate_scale: Annotated[float, typer.Option(help="So many times the requests a second.", min=1e-3, max=1e3)] = 1.0,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of the trace; with --find-capacity of each run (60).", min=0.001)
    ] = None,
    find_capacity: Annotated[bool, typer.Option(help="Search the highest load that meets the SLO.")] = False,
    max_runs: Annotated[int, typer.Option(help="Runs of a search at most.", min=4, max=200)] = 12,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Figures as one JSON document; - prints it.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="A page with charts.")] = None,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Every request as JSON lines, to compute all anew.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Which of the server's models.")] = None,
    processes: Annotated[int, typer.Option(help="Of the client; more from some 500 streams on.", min=1, max=64)] = 1,
    cpus: Annotated[str, typer.Option(metavar="LIST", help="CPUs of the client, as in 1 or 2,3.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is a miss.", min=0.1, max=1e5)] = 300.0,
    temperature: Annotated[float, typer.Option(help="Of the sampling; each request has its seed.", min=0, max=2)] = 0.8,
    natural_end: Annotated[
        bool, typer.Option("--natural-end", help="Let answers end by themselves, not where the trace says.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the parts of the trace that a search takes.", min=0)] = 0,
    salt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Equal salts make equal prompts; new ones by default.")
    ] = None,
) -> None:
    """Replay a trace against a server, in an open loop: requests leave when the trace says, whatever became of others.

    Exit codes: 0, 1 the SLO is not met, 5 the run is invalid (a tripwire says why), 130 interrupted.
    """
    from setpoint.config import api_key_from_environment
    from setpoint.tune.metrics import Targets
    from setpoint.tune.replay.capacity import check_targets
    from setpoint.tune.replay.client import ReplayOptions, replay
    from setpoint.tune.replay.server import Surveyor
    from setpoint.workload.trace import read_trace

    targets = Targets.parse(slo or [])
    if find_capacity:
        check_targets(targets)
    loaded = read_trace(trace)
    options = ReplayOptions(salt or secrets.token_hex(8), processes, timeout, _cpu_list(cpus))
    with Surveyor(url, api_key_from_environment()) as surveyor:
        status(f"asking {surveyor.address.base} what it can do")
        target = surveyor.target(model, temperature=temperature, natural_end=natural_end)
        target.check(loaded)

        def measure(part: Trace, salt: str, what: str, warm_up: bool) -> Run:
            provenance = {"trace_file": trace.name, "seed": seed, "slo": slo or []}
            with RequestBar(len(part.requests), what) as bar:
                chosen = ReplayOptions(salt, processes, timeout, options.cpus, warm_up)
                return replay(surveyor, target, part, chosen, slas=targets.all, provenance=provenance, on_progress=bar)

        if find_capacity:
            code = _search(
                loaded, targets, measure, options.salt, seed, duration, rate_scale, max_runs, json, html, log
            )
        else:
            code = _once(_part(loaded, rate_scale, duration, seed), targets, measure, options.salt, json, html, log)
    if code:
        raise SystemExit(code)


Measure = Callable[["Trace", str, str, bool], "Run"]


def _once(
    part: Trace, targets: Targets, measure: Measure, salt: str, json: Path | None, html: Path | None, log: Path | None
) -> int:
    from setpoint.tune.replay.page import run_page
    from setpoint.tune.replay.report import is_met, run_document, run_lines

    run = measure(part, salt, "replay", True)
    _write(json, run_document(run, targets), html, lambda: run_page(run, targets), run, log)
    if str(json) != "-":
        for line in run_lines(run, targets):
            print(printable(line))
    if run.is_cut_short:
        return INTERRUPTED
    if not run.is_valid:
        return INVALID
    return UNMET if is_met(run, targets) is False else 0


def _search(
    loaded: Trace,
    targets: Targets,
    measure: Measure,
    salt: str,
    seed: int,
    duration: float | None,
    start: float,
    max_runs: int,
    json: Path | None,
    html: Path | None,
    log: Path | None,
) -> int:
    from setpoint.tune.replay.capacity import CapacitySearch, point_of
    from setpoint.tune.replay.page import capacity_page
    from setpoint.tune.replay.report import capacity_lines, capacity_report, run_document

    search = CapacitySearch(start=start, max_points=max_runs)
    base_rate = len(loaded.requests) / max(loaded.seconds, 1e-9)
    runs: list[Run] = []
    invalid = 0
    while (factor := search.next_factor()) is not None:
        number = len(runs)
        seconds = enough_seconds(duration or POINT_S, base_rate * factor, targets)
        if seconds > (duration or POINT_S):
            say(f"load {factor:.3f}: {seconds:.0f} s, since fewer requests cannot show the SLA")
        part = point_trace(loaded, factor, seconds, seed + number)
        run = measure(part, f"{salt}.{number}", f"load {factor:.3f}", number == 0)
        runs.append(run)
        if run.is_cut_short:
            break
        if not run.is_valid:
            invalid += 1
            reasons = "; ".join(f"{v.tripwire}: {v.detail}" for v in run.verdicts if v.outcome == "invalid")
            say(f"invalid, not counted: {reasons}")
            if invalid == MAX_INVALID:
                break
            continue
        invalid = 0
        search.add(point_of(run, factor, targets))
        point = search.points[-1]
        say(f"load {factor:.3f}: attainment {point.attainment:.1%}, {'met' if point.is_met else 'not met'}")
    capacity: Capacity = search.result()
    last = runs[-1]
    document = capacity_report(capacity, base_rate, targets, last_run=run_document(last, targets))
    _write(json, document, html, lambda: capacity_page(capacity, base_rate, last, targets), last, log)
    if str(json) != "-":
        for line in capacity_lines(capacity, base_rate):
            print(printable(line))
    if last.is_cut_short:
        return INTERRUPTED
    if invalid == MAX_INVALID:
        say(f"{MAX_INVALID} invalid runs in a row: this machine cannot decide now")
        return INVALID
    return UNMET if capacity.interval is None else 0


def enough_seconds(seconds: float, rate: float, targets: Targets) -> float:
    """At least `seconds`, and until as many requests have come as a percentile needs that none misses; bounded."""
    from setpoint.tune.statistics import requests_needed

    levels = [term.level for sla in targets.all for term in sla.terms if term.level is not None and 0 < term.level < 1]
    needed = max((requests_needed(level) for level in levels), default=0)
    return max(seconds, min(needed / max(rate, 1e-9), MOST_POINT * seconds))


def point_trace(trace: Trace, factor: float, seconds: float, seed: int) -> Trace:
    """Traffic of this load and length, from another place of the trace for every seed."""
    import random

    from setpoint.workload.transform import excerpt, scale_rate

    scaled = scale_rate(trace, factor, seed)
    return excerpt(scaled, random.Random(seed).random() * scaled.seconds, seconds)


def _part(trace: Trace, rate_scale: float, duration: float | None, seed: int) -> Trace:
    from setpoint.workload.transform import excerpt, scale_rate

    scaled = scale_rate(trace, rate_scale, seed)
    if duration is None or scaled.seconds <= duration:
        return scaled
    return excerpt(scaled, 0.0, duration)


def _cpu_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(f"--cpus is {text!r}; give numbers separated by commas, as in 2,3") from None


def _write(
    json: Path | None, document: Any, html: Path | None, page: Callable[[], str], run: Run, log: Path | None
) -> None:
    """All that was asked for, before anything is printed. Raises ConfigError."""
    from setpoint.tune.replay.run_file import write_run

    if log is not None:
        write_run(run, log)
    try:
        if json is not None and str(json) != "-":
            json.write_text(json_module.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
        if html is not None:
            html.write_text(page(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from None
    if str(json) == "-":
        print_json(document)
