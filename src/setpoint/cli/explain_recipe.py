"""`setpoint explain recipe.toml`"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setpoint.cli.console import say
from setpoint.errors import ConfigError

if TYPE_CHECKING:
    from setpoint.tune.plan.counterfactual import Change, Reasons
    from setpoint.tune.recipe import Recipe
    from setpoint.workload.trace import Trace

MOST_REQUESTS = 1000


def explain_recipe(path: Path, trace: Path | None) -> tuple[Recipe, Reasons]:
    """Raises ConfigError: no such trace or another one, another machine, no probe of this model."""
    from setpoint.assemble import models_directory, scheduler_limits, survey
    from setpoint.config import EngineConfig
    from setpoint.loaders.hub import resolve_model
    from setpoint.tune.plan.counterfactual import reasons
    from setpoint.tune.plan.plan import shortened
    from setpoint.tune.probe.calibration_store import load_calibration
    from setpoint.tune.probe.machine import this_identity
    from setpoint.tune.recipe import machine_fingerprint, mismatches, model_hash, read_recipe
    from setpoint.tune.simulate.simulator import EngineSetup
    from setpoint.tune.sla import Sla

    recipe = read_recipe(path)
    loaded = _trace(recipe, path, trace)
    name, given = str(recipe.model.get("name", "")), _table(recipe.provenance, "given")
    try:
        config = EngineConfig(**{"model": name, **given})
    except TypeError:
        raise ConfigError(f"{path.name} names knobs that this version does not have; tune again") from None
    model = model_hash(resolve_model(name, models_directory()))
    problems = mismatches(recipe, machine=machine_fingerprint(this_identity()), model=model)
    if problems:
        raise ConfigError(f"{path.name} cannot be explained here: {'; '.join(problems)}")
    surveyed = survey(config)
    found = load_calibration(this_identity(), surveyed.fingerprint, lambda problem: say(f"setpoint: {problem}"))
    if found is None:
        raise ConfigError(f"nothing is known here of this model's steps; run `setpoint probe {name}`")
    setup = EngineSetup(surveyed.info, surveyed.limits, found.cost, surveyed.config.enable_prefix_caching)
    return recipe, reasons(
        tuple(recipe.knobs.items()),
        Sla.parse(recipe.sla),
        shortened(loaded, MOST_REQUESTS),
        setup,
        lambda setting: scheduler_limits(replace(surveyed.config, **dict(setting))),
        gain=_table(recipe.evidence, "gain") or None,
        runs=_runs(recipe, path.with_suffix(".study.jsonl")),
        report=lambda line: say(f"setpoint: simulating {line}"),
    )


def _table(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Empty where it is missing. Raises ConfigError for what is no table."""
    found = holder.get(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"the recipe's {name} must be a table; tune again")
    return dict(found)


def _trace(recipe: Recipe, path: Path, given: Path | None) -> Trace:
    """The trace that the recipe was tuned on: given, or beside the recipe, or here."""
    from setpoint.tune.recipe import model_hash
    from setpoint.workload.trace import read_trace

    known = _table(recipe.provenance, "trace")
    name = Path(str(known.get("file", ""))).name
    places = [given] if given is not None else [path.parent / name, Path(name)]
    found = next((place for place in places if place is not None and place.is_file()), None)
    if found is None:
        raise ConfigError(f"the trace of this recipe ({name or 'unnamed'}) is not here; give it with --trace FILE")
    if model_hash(found) != known.get("sha256"):
        raise ConfigError(f"{found} is not the trace that this recipe was tuned on; give that one with --trace FILE")
    return read_trace(found)


def _runs(recipe: Recipe, path: Path) -> list[Any]:
    """Of the study beside the recipe, if it is that recipe's; the report does without them where it is not."""
    from setpoint.tune.search.study import StudyError, read_study

    try:
        head, runs = read_study(path)
    except StudyError as error:
        say(f"setpoint: no runs are shown: {error}")
        return []
    asked = {"trace": _table(recipe.provenance, "trace").get("sha256"), "sla": recipe.sla}
    if any(head.get(name) != value for name, value in asked.items()):
        say(f"setpoint: no runs are shown: {path.name} is the study of another recipe")
        return []
    return runs


def document(recipe: Recipe, found: Reasons) -> dict[str, Any]:
    return {"object": "recipe.explanation", "sla": recipe.sla, "verdict": recipe.verdict, **asdict(found)}


def draw(recipe: Recipe, found: Reasons) -> list[str]:
    rates = [("predicted capacity", found.capacity_rps), ("predicted of the default", found.default_rps)]
    lines = [f"{recipe.verdict}: {recipe.sla}"]
    lines += [f"{name}: " + ("no load holds" if rate is None else f"{rate:.3g} requests/s") for name, rate in rates]
    if found.gain:
        lines.append(f"measured gain over the default: {_gain_text(found.gain)}")
    lines += ["", "each knob back to its default:" if found.knobs else "no knob differs from its default"]
    lines += [f"  {_line(knob)}" for knob in found.knobs]
    if found.interaction is not None and len(found.knobs) > 1:
        lines.append(f"  together beyond their sum: {found.interaction:+.0%}")
    if found.binding is not None:
        lines += ["", f"beyond the capacity fails {', '.join(found.binding.terms)}"]
        lines.append(f"what binds: {found.binding.resource}")
    lines += ["", "what a tenth more would be worth (predicted; below 2 % is not told apart):"]
    lines += [f"  {_line(price)}" for price in found.prices]
    if found.rejected:
        lines += ["", "raced and not chosen (mean log margin to the SLA, over the default's in the same traffic):"]
        lines += [f"  {_line(other)}" for other in found.rejected]
    return lines


def _gain_text(gain: Mapping[str, Any]) -> str:
    """An interval without an end has its stand-ins in a recipe: -1 and 1e9."""
    low, high = gain.get("ci95", (-1.0, 1e9))
    ends = [f"at least {low:+.0%}"] if low > -1.0 else []
    ends += [f"at most {high:+.0%}"] if high < 1e9 else []
    return f"{gain.get('estimate', 0.0):+.0%} ({', '.join(ends) or 'no bounds are known'})"


def _line(change: Change) -> str:
    told = []
    if change.predicted is not None:
        told.append("no load holds" if change.predicted <= -1 else f"capacity {change.predicted:+.0%}, predicted")
    if change.measured is not None:
        told.append(f"by itself over the default {change.measured:+.3f} in {change.pairs} measured pairs")
    return f"{change.what}: {'; '.join(told) or 'not simulated, not measured'}"
