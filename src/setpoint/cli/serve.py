"""setpoint serve MODEL"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from setpoint.cli.arguments import Model
from setpoint.cli.console import DownloadBar, command_app, status
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig, ServerConfig, api_key_from_environment, log_level
from setpoint.errors import ConfigError

if TYPE_CHECKING:
    from setpoint.engine.slo import HeldSla
    from setpoint.engine.step_cost import StepCost
    from setpoint.tune.recipe import Recipe

app = command_app("Serve a model over an OpenAI-compatible HTTP API.")


@app.command()
@with_knobs(EngineConfig, ServerConfig)
def serve(
    model: Model,
    configure: Callable[..., EngineConfig],
    configure_server: Callable[..., ServerConfig],
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Print every knob with its value and reason, and leave.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Set the knobs that `setpoint tune` certified.")
    ] = None,
    recipe_anyway: Annotated[
        bool, typer.Option("--recipe-anyway", help="Use a recipe of another machine or model: nothing is certified.")
    ] = False,
) -> None:
    """Serve MODEL until SIGTERM or Ctrl-C; then finish what runs (--shutdown-timeout) and leave with 0."""
    from setpoint.assemble import build_engine, scheduler_limits
    from setpoint.cli.recording import record_server
    from setpoint.engine.slo import HeldSla
    from setpoint.server.auth import KeyRing, check_bind
    from setpoint.server.context import ServerContext, ServerSettings
    from setpoint.server.events import EventRouter
    from setpoint.server.logs import EventLog
    from setpoint.server.run import FORCED, bind
    from setpoint.server.run import serve as run_server

    config, http = configure(model=model), configure_server()
    tuned = None if recipe is None else with_recipe(config, recipe, anyway=recipe_anyway)
    if check_config:
        _print_reasons(config if tuned is None else tuned.config)
        return
    held = HeldSla.parse(http.slo) if http.slo else None if tuned is None else tuned.held
    environment_key = api_key_from_environment()
    keys = KeyRing(
        [*http.api_key, *([environment_key] if environment_key else [])],
        Path(http.api_key_file) if http.api_key_file else None,
    )
    check_bind(http.host, keys)
    listener = bind(http.host, http.port)  # a taken port is an error now, not after the weights are loaded
    try:
        router = EventRouter()
        with DownloadBar() as bar:
            built = config if tuned is None else tuned.built
            assembly = build_engine(
                built, router.deliver, progress=bar, phase=status, held=held, find_cost=_probed_cost
            )
        if tuned is not None:
            assembly.engine.set_limits(scheduler_limits(tuned.config))
        name = http.served_model_name or _display_name(model)
        context = ServerContext(
            engine=assembly.engine,
            router=router,
            tokenizer=assembly.tokenizer,
            chat_template=assembly.chat_template,
            grammars=assembly.grammars,
            model_names=(name,),
            max_model_len=assembly.engine.limits.max_model_len,
            settings=ServerSettings(
                host=http.host,
                open_metrics=http.open_metrics,
                shutdown_timeout_s=http.shutdown_timeout,
                keeps_messages=http.record_text,
            ),
            keys=keys,
            log=EventLog(level=log_level()),
            cache_info=assembly.cache_info,
            server_info={
                "isa": assembly.isa,
                "knobs": {reason.knob: reason.value for reason in assembly.reasons}
                | ({} if tuned is None else dict(tuned.knobs)),
            },
        )
        recording = None if http.record is None else record_server(context, http)
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in assembly.phases.items())

        def announce(url: str, command: str) -> None:
            print(f"setpoint: serving {name} at {url} ({phases}); try:\n\n{command}\n", file=sys.stderr, flush=True)

        assembly.engine.start()
        code = run_server(context, sock=listener, host=http.host, on_ready=announce)
        if recording is not None and code != FORCED:  # cut short, it stays readable as it is
            recording.close()
    finally:
        listener.close()
    if code == FORCED:  # threads may be inside native code: an interpreter that ends under them aborts
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


@dataclass(frozen=True)
class Tuned:
    """What a recipe makes of a config. The engine is `built` as it was for the trials, with the cache of the default
    and room for larger limits; then the limits of `config` are set."""

    config: EngineConfig
    built: EngineConfig
    knobs: Mapping[str, Any]
    held: HeldSla | None  # its SLA, if steps can hold it, with the rows of its envelope


def with_recipe(config: EngineConfig, path: Path, *, anyway: bool) -> Tuned:
    """Raises ConfigError when the evidence of the recipe does not count here."""
    from setpoint.assemble import models_directory, survey
    from setpoint.loaders.hub import resolve_model
    from setpoint.tune.probe.machine import this_identity
    from setpoint.tune.recipe import machine_fingerprint, mismatches, model_hash, read_recipe

    found = read_recipe(path)
    with DownloadBar() as bar:
        model = model_hash(resolve_model(config.model, models_directory(), progress=bar))
    problems = mismatches(found, machine=machine_fingerprint(this_identity()), model=model)
    given = found.provenance.get("given", {})
    default = EngineConfig(model=config.model)
    for declared in fields(config):
        name, value = declared.name, getattr(config, declared.name)
        if name == "model":
            continue
        if name in found.knobs and value not in (getattr(default, name), found.knobs[name]):
            problems.append(f"--{name.replace('_', '-')} {value} is not what it sets")
        elif name not in found.knobs and value != given.get(name, getattr(default, name)) and name != "seed":
            problems.append(f"it was certified without --{name.replace('_', '-')} {value}")
    if problems and not anyway:
        raise ConfigError(f"the recipe {path.name} does not count: {'; '.join(problems)}; see --recipe-anyway")
    rest = {name: value for name, value in found.knobs.items() if getattr(config, name) == getattr(default, name)}
    what = f"UNCERTIFIED ({'; '.join(problems)})" if problems else found.verdict
    print(f"setpoint: recipe {path.name}: {what}", file=sys.stderr, flush=True)
    larger: dict[str, Any] = {}
    for knobs in (rest, *(row["set"] for row in found.envelope)):
        for name, value in knobs.items():
            if isinstance(value, int) and value > max(larger.get(name, 0), getattr(default, name)):
                larger[name] = value
    built = replace(survey(config).config, **larger) if larger else config
    return Tuned(replace(config, **rest), built, dict(found.knobs), _to_hold(found, config))


def _to_hold(recipe: Recipe, config: EngineConfig) -> HeldSla | None:
    """None, with a line that says why, for an SLA that was certified but cannot be held step by step."""
    from setpoint.assemble import scheduler_limits
    from setpoint.engine.envelope import EnvelopeRow, Traffic
    from setpoint.engine.slo import HeldSla

    try:
        held = HeldSla.parse(recipe.sla)
    except ConfigError as error:
        print(f"setpoint: the recipe's SLA is not held while serving: {error}", file=sys.stderr, flush=True)
        return None
    default = EngineConfig(model=config.model)
    rows = []
    for row in recipe.envelope:
        knobs = {name: value for name, value in row["set"].items() if getattr(config, name) == getattr(default, name)}
        rows.append(EnvelopeRow(float(row["up_to_rps"]), scheduler_limits(replace(config, **knobs))))
    lengths = recipe.provenance.get("traffic", {})
    names = ("input_log_mean", "input_log_deviation", "output_log_mean", "output_log_deviation")
    known = all(isinstance(lengths.get(name), float) for name in names)
    return replace(held, rows=tuple(rows), traffic=Traffic(*(lengths[name] for name in names)) if known else None)


def _probed_cost(fingerprint: str) -> StepCost | None:
    """What `setpoint probe` measured here for this model."""
    from setpoint.tune.probe.calibration_store import load_calibration
    from setpoint.tune.probe.machine import this_identity

    found = load_calibration(
        this_identity(), fingerprint, lambda problem: print(f"setpoint: {problem}", file=sys.stderr)
    )
    if found is None:
        print("setpoint: no probe of this model; --slo learns what steps cost as it serves", file=sys.stderr)
    return None if found is None else found.cost


def _display_name(model: str) -> str:
    """A path is served under its file's name; an alias or repository under itself."""
    path = Path(model).expanduser()
    return path.name.removesuffix(".gguf") if path.exists() else model


def _print_reasons(config: EngineConfig) -> None:
    from setpoint.assemble import load_model, model_facts
    from setpoint.config import resolve, this_machine

    with DownloadBar() as bar:
        loaded = load_model(config.model, progress=bar)
    _, reasons = resolve(config, this_machine(), model_facts(loaded.model, loaded.checkpoint.num_bytes))
    width = max(len(reason.knob) for reason in reasons)
    for reason in reasons:
        print(f"{reason.knob:<{width}}  {reason.value!s:>12}  {reason.source:<8}  {reason.why}")
