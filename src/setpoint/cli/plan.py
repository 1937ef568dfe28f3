"""setpoint plan MODEL --trace FILE --slo SLA"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from setpoint.cli.arguments import Json, Model
from setpoint.cli.console import DownloadBar, command_app, print_json, printable, say
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig

if TYPE_CHECKING:
    from setpoint.assemble import Survey
    from setpoint.tune.plan.plan import LoadPoint, MemoryMap, Plan
    from setpoint.tune.probe.calibrate import Calibration

app = command_app("Predict what a model can serve on this machine under an SLA.")

GIB = 1 << 30


@app.command()
@with_knobs(EngineConfig)
def plan(
    model: Model,
    configure: Callable[..., EngineConfig],
    trace: Annotated[Path, typer.Option(metavar="FILE", help="The traffic: a trace, see `setpoint trace`.")],
    slo: Annotated[str, typer.Option(metavar="SLA", help="What to hold, as in ttft.p95<200ms,tpot.p95<30ms.")],
    rate: Annotated[
        float | None, typer.Option(help="Requests a second to serve: says how many engines that takes.", min=1e-6)
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests of the trace to simulate.", min=20, max=1_000_000)] = 300,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a page with charts as well.")] = None,
    json: Json = False,
) -> None:
    """Memory, predicted latencies over load, what binds, what each knob would change, engines for a rate.

    Simulated from what `setpoint probe MODEL` measured; nothing is measured here. Exit code 1 when no load meets the
    SLA, with what could be met instead.
    """
    from setpoint.assemble import survey
    from setpoint.errors import ConfigError
    from setpoint.tune.plan.plan import MemoryMap, contexts, make_plan, shortened, tokens_held
    from setpoint.tune.probe.calibration_store import load_calibration
    from setpoint.tune.probe.machine import this_identity
    from setpoint.tune.simulate.simulator import EngineSetup
    from setpoint.tune.sla import Sla
    from setpoint.workload.trace import read_trace

    sla, loaded = Sla.parse(slo), read_trace(trace)
    with DownloadBar() as bar:
        surveyed = survey(configure(model=model), progress=bar)
    found = load_calibration(this_identity(), surveyed.fingerprint, lambda problem: say(f"setpoint: {problem}"))
    if found is None:
        raise ConfigError(f"nothing is known of this model's steps; run `setpoint probe {model}` with the same flags")
    setup = EngineSetup(surveyed.info, surveyed.limits, found.cost, surveyed.config.enable_prefix_caching)
    kv_tokens = tokens_held(surveyed.info, surveyed.limits.max_num_seqs)
    memory = MemoryMap(
        available=surveyed.available_bytes,
        weights=surveyed.weight_bytes,
        step=surveyed.step_bytes,
        kv=surveyed.config.kv_cache_memory_bytes or 0,
        host_tier=surveyed.config.kv_host_bytes,
        kv_tokens=kv_tokens,
        max_model_len=surveyed.info.max_model_len,
        contexts=contexts(kv_tokens, surveyed.info.max_model_len, surveyed.limits.max_num_seqs),
    )
    made = make_plan(shortened(loaded, requests), setup, sla, rate=rate, report=lambda line: say(f"setpoint: {line}"))
    if html is not None:
        _write_page(html, made, lines(made, memory, surveyed, found), model)
    if json:
        print_json(document(made, memory, surveyed, found))
    else:
        for line in lines(made, memory, surveyed, found):
            print(printable(line))
    if not made.is_feasible:
        raise typer.Exit(1)


def _write_page(path: Path, made: Plan, table: list[str], model: str) -> None:
    from setpoint.errors import ConfigError
    from setpoint.tune.plan.page import plan_page

    try:
        path.write_text(plan_page(made, table, model), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another --html") from None


def document(made: Plan, memory: MemoryMap, surveyed: Survey, found: Calibration) -> dict[str, Any]:
    """Numbers that JSON knows: what is infinite is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    plain = asdict(made) | {"sla": str(made.sla), "feasible": made.is_feasible, "impossible": made.impossible}
    probe = {"noise": found.noise, "left_out_median": found.left_out_median, "left_out_p90": found.left_out_p90}
    head: dict[str, Any] = {"model": surveyed.config.model, "memory": asdict(memory), "probe": probe}
    return head | {str(name): finite(value) for name, value in plain.items()}


def lines(made: Plan, memory: MemoryMap, surveyed: Survey, found: Calibration) -> list[str]:
    return [
        *memory_lines(memory),
        "",
        f"{made.requests} requests in {made.seconds:.0f} s ({made.base_rate_rps:.3g}/s), SLA {made.sla}; predicted "
        f"from steps with an error of {found.left_out_median:.0%} (90th percentile {found.left_out_p90:.0%})",
        *verdict_lines(made),
        "",
        *curve_lines(made),
        "",
        *knob_lines(made),
        *replica_lines(made),
        *(f"note: {note}" for note in made.notes),
    ]


def memory_lines(memory: MemoryMap) -> list[str]:
    parts = (
        ("free", memory.available),
        ("weights", memory.weights),
        ("a step", memory.step),
        ("KV cache", memory.kv),
        ("host tier", memory.host_tier),
        ("left", memory.left),
    )
    held = ", ".join(f"{count} x {context}" for count, context in memory.contexts.items())
    return [
        "memory, GiB: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts),
        f"the KV cache holds {memory.kv_tokens} tokens: {held} (sequences x tokens)",
    ]


def verdict_lines(made: Plan) -> list[str]:
    from setpoint.tune.plan.plan import shown

    floor = ", ".join(f"{term} -> {shown(term, value)}" for term, value in zip(made.sla.terms, made.alone, strict=True))
    if made.capacity is None:
        told = [f"INFEASIBLE at any load with these knobs; requests that meet nobody: {floor}"]
        if made.impossible:
            told.append("no load and no number of engines can meet: " + "; ".join(made.impossible))
        return told
    best = made.capacity
    met = ", ".join(f"{term} -> {shown(term, value)}" for term, value in zip(made.sla.terms, best.values, strict=True))
    return [
        f"holds up to {best.rate_rps:.3g} requests/s ({best.load:.2f} x the trace): {met}",
        f"tightest that could be promised, to requests that meet nobody: {floor}",
        f"beyond that fails {', '.join(made.binding.terms)}",
        f"what binds: {made.binding.resource}",
        "time of the steps: " + ", ".join(f"{part} {share:.0%}" for part, share in made.binding.shares.items()),
    ]


def curve_lines(made: Plan) -> list[str]:
    title = f"{'req/s':>8}{'TTFT p50':>10}{'p95 ms':>9}{'TPOT p50':>10}{'p95 ms':>8}{'good':>7}{'good/s':>8}"
    return [title + f"{'busy':>6}{'batch':>7}{'cached':>8}  SLA", *map(_curve_line, made.curve)]


def _curve_line(point: LoadPoint) -> str:
    def ms(seconds: float, digits: int) -> str:
        return "never" if math.isinf(seconds) else f"{seconds * 1e3:.{digits}f}"

    return (
        f"{point.rate_rps:>8.3g}{ms(point.ttft_p50_s, 0):>10}{ms(point.ttft_p95_s, 0):>9}"
        f"{ms(point.tpot_p50_s, 1):>10}{ms(point.tpot_p95_s, 1):>8}{point.attainment:>7.1%}{point.goodput_rps:>8.3g}"
        f"{point.busy:>6.0%}{point.mean_batch:>7.1f}{point.cached_share:>8.0%}  {'holds' if point.holds else 'fails'}"
    )


def knob_lines(made: Plan) -> list[str]:
    told = ["each knob alone, against the capacity (differences below 15 % are not told apart):"]
    for effect in made.knobs:
        if math.isinf(effect.change):
            change = f"holds up to {effect.rate_rps:.3g}/s"
        elif effect.rate_rps == 0:
            change = "holds at no load"
        else:
            change = "no difference" if effect.change == 0 else f"{effect.change:+.0%}"
        told.append(f"  --{effect.knob.replace('_', '-')} {effect.value:<8} {change}")
    return told


def replica_lines(made: Plan) -> list[str]:
    if made.replicas is None:
        return []
    found = made.replicas
    each = found.point
    return [
        "",
        f"{found.rate_rps:g} requests/s: {found.count} engines like this one, each at {each.rate_rps:.3g}/s, "
        f"{each.busy:.0%} busy. Simulated is one of them at its share; requests are spread evenly.",
    ]
