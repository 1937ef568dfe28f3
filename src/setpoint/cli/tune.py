"""setpoint tune MODEL --trace FILE --slo SLA"""

from __future__ import annotations

import math
import queue
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from setpoint.cli.arguments import Json, Model
from setpoint.cli.console import DownloadBar, command_app, print_json, printable, say, status
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig
from setpoint.errors import ConfigError

if TYPE_CHECKING:
    from setpoint.assemble import Survey
    from setpoint.tune.probe.calibrate import Calibration
    from setpoint.tune.search.space import Setting
    from setpoint.tune.search.tuned import Tuned
    from setpoint.tune.sla import Sla
    from setpoint.workload.trace import Trace

app = command_app("Measure which knobs hold an SLA at the highest load, and certify it.")

HOLDOUT = 0.3
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@app.command()
@with_knobs(EngineConfig)
def tune(
    model: Model,
    configure: Callable[..., EngineConfig],
    trace: Annotated[Path, typer.Option(metavar="FILE", help="The traffic: a trace, see `setpoint trace`.")],
    slo: Annotated[str, typer.Option(metavar="SLA", help="What to hold, as in ttft.p95<200ms,tpot.p95<30ms.")],
    budget: Annotated[str, typer.Option(help="Time to measure, as in 90s, 10m, 1h.")] = "10m",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the recipe goes.")] = Path(
        "recipe.toml"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study beside the recipe.")] = False,
    accept_noise: Annotated[
        bool, typer.Option("--accept-noise", help="Go on where other work disturbs this machine; the recipe says so.")
    ] = False,
    json: Json = False,
) -> None:
    """Try the hot knobs on a live engine under the traffic of a trace, and prove the best on a part held out.

    Knobs that you give stay as they are. The default always competes; without a gain beyond the noise it is the result.
    Exit code 1 without a recipe: the SLA is not met, the evidence does not suffice, or the machine is too noisy.
    """
    from setpoint import __version__
    from setpoint.assemble import models_directory
    from setpoint.loaders.hub import resolve_model
    from setpoint.tune.probe.machine import this_identity
    from setpoint.tune.recipe import machine_fingerprint, model_hash, write_recipe
    from setpoint.tune.search import outcome
    from setpoint.tune.search.page import tune_page
    from setpoint.tune.search.study import Study
    from setpoint.tune.search.trial import check_sla
    from setpoint.tune.search.tuner import check_budget
    from setpoint.tune.sla import Sla
    from setpoint.workload.trace import read_trace

    sla, seconds = Sla.parse(slo), parse_budget(budget)
    check_sla(sla)
    check_budget(seconds)
    loaded, config = read_trace(trace), configure(model=model)
    if not output.parent.is_dir():
        raise ConfigError(f"--output: there is no directory {output.parent}")
    with DownloadBar() as bar:
        path = resolve_model(model, models_directory(), progress=bar)
    identity, of_model = this_identity(), {"name": model[:256], "sha256": model_hash(path)}
    machine = {"fingerprint": machine_fingerprint(identity), "cpu": identity.cpu_model}
    of_trace = model_hash(trace)
    given = _given(config)
    head = {
        "sla": str(sla),
        "budget_s": seconds,
        "model": of_model["sha256"],
        "machine": machine["fingerprint"],
        "trace": of_trace,
        "version": __version__,
        "given": given,
        "accept_noise": accept_noise,
    }
    study = Study(output.with_suffix(".study.jsonl"), head, resume=resume)
    try:
        tuned = _tune(config, loaded, sla, seconds, study, accept_noise)
    except KeyboardInterrupt:
        say(f"\nsetpoint: stopped; {study.path} holds {len(study.lines)} runs, --resume goes on with it")
        raise typer.Exit(130) from None
    tuned.notes += [f"not tried, since they change the output and no verdict on quality exists: {', '.join(_lossy())}"]
    if accept_noise:
        tuned.notes.append("--accept-noise: the checks of other work on this machine were off")
    provenance = {
        "engine": __version__,
        "trace": {"file": trace.name, "sha256": of_trace, "requests": len(loaded.requests), "held_out": HOLDOUT},
        "budget_s": seconds,
        "traffic": _lengths(loaded),
        "seeds": {"tune": [0, 8999], "held_out": [9000, 9399]},
        "given": given,
        "accept_noise": accept_noise,
        "created_unix_s": round(time.time()),
        "command": f"setpoint tune {model} --trace {trace.name} --slo {sla} --budget {budget}",
    }
    recipe = outcome.recipe_of(tuned, sla=str(sla), model=of_model, machine=machine, provenance=provenance)
    if recipe is not None:
        write_recipe(recipe, output)
    page = output.with_suffix(".html")
    page.write_text(tune_page(tuned, study, provenance), encoding="utf-8")
    say(f"setpoint: report in {page}")
    if json:
        print_json(outcome.document(tuned) | {"provenance": provenance})
    else:
        for line in outcome.lines(tuned):
            print(printable(line))
    if recipe is None:
        say("setpoint: no recipe was written")
        raise typer.Exit(1)
    say(f"setpoint: {output} written; `setpoint serve {model} --recipe {output}` uses it")


def parse_budget(text: str) -> float:
    """`90s`, `10m`, `1.5h`. Raises ConfigError."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([smhd])", text.strip())
    if found is None:
        raise ConfigError(f"--budget {text[:32]!r} is not a time; give one such as 90s, 10m or 1h")
    return float(found[1]) * _SECONDS[found[2]]


def _given(config: EngineConfig) -> dict[str, Any]:
    """The knobs that the user set: they are not searched, and a recipe is true only with them."""
    from setpoint.cli.knobs import knob_fields

    pairs = {d.name: getattr(config, d.name) for d in knob_fields(type(config)) if getattr(config, d.name) != d.default}
    return dict(pairs)


def _lengths(trace: Trace) -> dict[str, float]:
    """Mean and deviation of the logarithms of lengths: what `serve --recipe` compares its traffic with."""
    logs = {
        "input": [math.log(max(request.input_tokens, 1)) for request in trace.requests],
        "output": [math.log(max(request.output_tokens, 1)) for request in trace.requests],
    }
    means = {f"{name}_log_mean": statistics.fmean(values) for name, values in logs.items()}
    return means | {f"{name}_log_deviation": statistics.pstdev(values) for name, values in logs.items()}


def _lossy() -> tuple[str, ...]:
    from setpoint.tune.search.space import left_out

    return left_out(EngineConfig(model="any"))


def _tune(config: EngineConfig, trace: Trace, sla: Sla, budget_s: float, study: Any, accept_noise: bool) -> Tuned:
    from setpoint.assemble import build_engine, scheduler_limits, survey
    from setpoint.engine.events import Event
    from setpoint.tune.replay.prompts import words
    from setpoint.tune.replay.urgency import become_urgent
    from setpoint.tune.search.live import LiveMeasure, Replayer
    from setpoint.tune.search.space import space
    from setpoint.tune.search.tuner import Job, Tuner
    from setpoint.tune.simulate.simulator import check_lengths
    from setpoint.workload.transform import more_bursts, scale_lengths, split

    surveyed = survey(config)
    check_lengths(trace, surveyed.info.max_model_len)
    tuned_on, held_out = split(trace, 1 - HOLDOUT)
    calibration = _calibration(config, surveyed, budget_s)
    dimensions = space(config)
    slowest_s = max((term.bound for term in sla.terms if term.metric in ("ttft", "e2e")), default=0.0)
    job = Job(dimensions, budget_s, accept_noise=accept_noise, slowest_s=slowest_s)
    job = _with_prediction(job, surveyed, calibration, tuned_on, sla, config)
    ceilings = {d.knob: max(d.values) for d in dimensions if isinstance(d.default, int)}
    # The cache keeps the size that the default has, so that limits are all that differs between two runs.
    built = replace(surveyed.config, **ceilings)
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    with DownloadBar() as bar:
        assembly = build_engine(built, events.put, progress=bar, phase=status, chats=False)
    try:
        assembly.engine.start()
        become_urgent()  # this thread sends the requests; the engine's threads are there already and stay as they are
        pool = assembly.tokenizer.encode(" ".join(words()), add_special_tokens=False)
        replayer = Replayer(assembly.engine, events, pool, assembly.tokenizer.bos_token_id)

        def limits_of(setting: Setting) -> Any:
            return scheduler_limits(replace(surveyed.config, **dict(setting)))

        parts = {
            "tune": tuned_on,
            "holdout": held_out,
            "longer": scale_lengths(held_out, 1 / 1.2),
            "burstier": more_bursts(held_out),
        }
        measure = LiveMeasure(replayer, parts, sla, limits_of, accept_noise=accept_noise)
        measure.warm_up()
        return Tuner(job, measure, study, lambda line: say(f"setpoint: {line}")).run()
    finally:
        assembly.engine.shutdown()


def _calibration(config: EngineConfig, surveyed: Survey, budget_s: float) -> Calibration:
    from setpoint.assemble import open_runner
    from setpoint.tune.probe.calibrate import calibrate
    from setpoint.tune.probe.calibration_store import load_calibration, store_calibration
    from setpoint.tune.probe.machine import this_identity

    machine = this_identity()
    found = load_calibration(machine, surveyed.fingerprint, lambda problem: say(f"setpoint: {problem}"))
    if found is not None:
        return found
    status("measuring what steps of this model cost")
    runner, _ = open_runner(config)
    try:
        found = calibrate(
            runner,
            machine=machine,
            model=config.model,
            fingerprint=surveyed.fingerprint,
            max_num_seqs=surveyed.config.max_num_seqs,
            max_num_batched_tokens=surveyed.config.max_num_batched_tokens,
            seconds=min(60.0, max(10.0, budget_s / 10)),
        )
    finally:
        runner.close()
    store_calibration(found)
    return found


def _with_prediction(
    job: Any, surveyed: Survey, calibration: Calibration, trace: Trace, sla: Sla, config: EngineConfig
) -> Any:
    """Where the default's capacity is by simulation, and what settings score there."""
    from setpoint.assemble import scheduler_limits
    from setpoint.tune.search.live import window
    from setpoint.tune.search.trial import observe
    from setpoint.tune.search.tuner import RACE_AT
    from setpoint.tune.simulate.simulator import EngineSetup, simulate

    setup = EngineSetup(surveyed.info, surveyed.limits, calibration.cost, surveyed.config.enable_prefix_caching)
    seconds = 60.0

    def seen(setting: Setting, load: float) -> Any:
        limits = scheduler_limits(replace(surveyed.config, **dict(setting)))
        run = simulate(window(trace, load, 1, seconds), replace(setup, limits=limits), patience_s=20.0).run
        return observe(run, sla, 0.0)

    status("simulating the default")
    low, high, load = 0.0, 0.0, 1.0
    for _ in range(12):
        if seen((), load).is_met:
            low = load
        else:
            high = load
        if low and high and high / low < 1.1:
            break
        load = (low * high) ** 0.5 if low and high else load * 2 if low else load / 2
        if not 1 / 64 <= load <= 256:
            break
    start = min(max(load, 1 / 32), 128.0)
    say(f"setpoint: simulation expects the default to hold the SLA up to about {start:.3g} times the trace's load")
    known: dict[Any, float] = {}

    def predict(setting: Setting) -> float:
        """Guessing is not simulated: settings that differ in nothing else are predicted alike."""
        hot = tuple(pair for pair in setting if pair[0] != "speculative_config")
        if hot not in known:
            known[hot] = float(seen(hot, min(RACE_AT * start, 256.0)).score)
        return known[hot]

    return replace(
        job,
        start_load=start,
        predict=predict,
        model_error=max(calibration.left_out_median, 0.02),
    )
