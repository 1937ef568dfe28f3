"""`setpoint explain recipe.toml`"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setpoint.cli.console import say
from setpoint.errors import ConfigError

if TYPE_CHECKING:
    from setpoint.tune.explain.measured import Measured, Tried
    from setpoint.tune.explain.simulated import Question, Simulated
    from setpoint.tune.recipe import Recipe
    from setpoint.workload.trace import Trace

MOST_REQUESTS = 1000
MOST_REJECTED = 8  # that are told of, those that ran most
RESOURCES = {
    "kv": "KV cache",
    "bandwidth": "memory bandwidth",
    "arithmetic": "arithmetic",
    "host": "speed of the host's work",
}
LACKED = {
    "places": "places (max_num_seqs)",
    "budget": "tokens of a step (max_num_batched_tokens)",
    "kv_blocks": "KV blocks",
}


@dataclass(frozen=True)
class Explained:
    """`predicted` scores of rejected settings stand beside them, over the default's; None: not simulated."""

    recipe: Recipe
    simulated: Simulated | None
    knobs: tuple[tuple[str, Any, Measured | None], ...]
    rejected: tuple[tuple[Tried, float | None], ...]
    without_runs: str  # why no runs are shown


def explain_recipe(path: Path, trace: Path | None) -> Explained:
    """Raises ConfigError: no such trace or another one, another machine, no probe of this model."""
    from setpoint.tune.explain import measured, simulated
    from setpoint.tune.recipe import read_recipe

    recipe = read_recipe(path)
    asked = _question(recipe, path, trace)
    runs, without = measured.study_of(recipe, path.with_suffix(".study.jsonl"))
    noise, load = measured.noise_of(recipe), measured.race_load(runs)
    found = simulated.explain(asked, lambda line: say(f"setpoint: {line}"))
    knobs = ((name, value, measured.flipped(recipe, name, runs, noise)) for name, value in recipe.knobs.items())
    tried = measured.rejected(recipe, runs, noise)[:MOST_REJECTED]
    base = None if load is None or not tried else simulated.score(asked, (), load)

    def predicted(one: Tried) -> float | None:
        if base is None or load is None or not simulated.simulable(one.setting):
            return None
        return simulated.score(asked, one.setting, load) - base

    return Explained(recipe, found, tuple(knobs), tuple((one, predicted(one)) for one in tried), without)


def _question(recipe: Recipe, path: Path, trace: Path | None) -> Question:
    from setpoint.assemble import models_directory, scheduler_limits, survey
    from setpoint.config import EngineConfig
    from setpoint.loaders.hub import resolve_model
    from setpoint.tune.explain.simulated import Question
    from setpoint.tune.plan.plan import shortened
    from setpoint.tune.probe.calibration_store import load_calibration
    from setpoint.tune.probe.machine import this_identity
    from setpoint.tune.recipe import machine_fingerprint, mismatches, model_hash
    from setpoint.tune.simulate.simulator import EngineSetup
    from setpoint.tune.sla import Sla

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
    return Question(
        shortened(loaded, MOST_REQUESTS),
        EngineSetup(surveyed.info, surveyed.limits, found.cost, surveyed.config.enable_prefix_caching),
        Sla.parse(recipe.sla),
        tuple(recipe.knobs.items()),
        lambda setting: scheduler_limits(replace(surveyed.config, **dict(setting))),
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


def document(found: Explained) -> dict[str, Any]:
    """`source` names the record of each measured figure: lines of the study, or a field of the recipe."""
    simulated = found.simulated
    flips = {} if simulated is None else simulated.flips
    return {
        "object": "recipe.explanation",
        "sla": found.recipe.sla,
        "verdict": found.recipe.verdict,
        "gain": _table(found.recipe.evidence, "gain") or None,
        "capacity_rps": None if simulated is None else simulated.capacity.rate_rps,
        "default": None if simulated is None else simulated.default_change,
        "knobs": [
            {
                "knob": name,
                "value": value,
                "predicted": flips.get(name),
                "measured": None if measured is None else _measured(measured),
            }
            for name, value, measured in found.knobs
        ],
        "remainder": None if simulated is None else simulated.remainder,
        "binding": None if simulated is None else asdict(simulated.binding),
        "time": None if simulated is None else asdict(simulated.time),
        "prices": [] if simulated is None else [asdict(price) for price in simulated.prices],
        "rejected": [
            {
                "knobs": dict(one.setting),
                "reason": one.reason,
                "predicted": predicted,
                "to_default": None if one.to_default is None else _measured(one.to_default),
                "to_chosen": None if one.to_chosen is None else _measured(one.to_chosen),
            }
            for one, predicted in found.rejected
        ],
        "without_runs": found.without_runs or None,
    }


def _measured(found: Measured) -> dict[str, Any]:
    """Ends that are not known are null."""
    known = {name: value for name, value in asdict(found).items() if name not in ("low", "high")}
    return known | {"ci95": [_end(found.low), _end(found.high)], "sign": found.sign}


def _end(value: float) -> float | None:
    return value if -1e8 < value < 1e8 else None


def draw(found: Explained) -> list[str]:
    from setpoint.tune.search.space import text

    recipe, simulated = found.recipe, found.simulated
    lines = [f"{recipe.verdict}: {recipe.sla}"]
    gain = _table(recipe.evidence, "gain")
    if gain:
        lines.append(f"measured gain over the default: {_gain_text(gain)} (recipe:evidence.gain)")
    if simulated is None:
        lines.append("by simulation no load holds: what follows is measured")
    else:
        lines.append(f"predicted capacity {simulated.capacity.rate_rps:.3g} requests/s, {_default(simulated)}")
    lines += ["", "each knob back to its default:" if found.knobs else "no knob differs from its default"]
    for name, value, measured in found.knobs:
        change = None if simulated is None else simulated.flips.get(name)
        told = ["not simulated" if change is None else f"capacity {_percent(change)} predicted"]
        told += [] if measured is None else [_told(measured)]
        lines.append(f"  {name}={value}: {'; '.join(told)}")
    if simulated is not None:
        lines += _of_simulation(simulated)
    if found.rejected:
        lines += [
            "",
            "tried and not chosen (score: mean log margin to the SLA, over the default's in the same traffic):",
        ]
    for one, predicted in found.rejected:
        told = [] if predicted is None else [f"predicted {predicted:+.3f}"]
        told += [] if one.to_default is None else [_told(one.to_default)]
        lines.append(f"  {text(one.setting)}: {one.reason}" + (f" ({'; '.join(told)})" if told else ""))
    if found.without_runs:
        lines += ["", f"no runs are shown: {found.without_runs}"]
    return lines


def _of_simulation(simulated: Simulated) -> list[str]:
    lines = []
    if simulated.remainder is not None and len(simulated.flips) > 1:
        lines.append(f"  together beyond each alone: {simulated.remainder:+.3f} in the logarithm of the capacity")
    lines += ["", f"beyond the capacity fails {', '.join(simulated.binding.terms)}"]
    lines.append(f"what binds: {simulated.binding.resource}")
    parts = [f"{name} {share:.0%}" for name, share in simulated.time.parts.items() if share >= 0.005]
    lines.append(f"time at the capacity: {', '.join(parts)}")
    lacked = [f"{LACKED[name]} {share:.0%}" for name, share in simulated.time.waiting.items() if share >= 0.005]
    lines.append(f"of it requests waited for: {', '.join(lacked) or 'nothing'}")
    lines += ["", "what more would be worth, in capacity (predicted, central differences):"]
    return lines + [f"  {_price_name(price)}: {_percent(price.per_unit, 2)}" for price in simulated.prices]


def _price_name(price: Any) -> str:
    return f"{RESOURCES.get(price.name, price.name)} {price.unit}"


def _default(simulated: Simulated) -> str:
    change = simulated.default_change
    if change is None:
        return "of the default nothing is known"
    return "at no load with the default" if change <= -1 else f"{_percent(change)} with the default"


def _percent(change: float, digits: int = 0) -> str:
    return f"{100 * change:+.{digits}f} %"


def _told(found: Measured) -> str:
    ends = (_end(found.low), _end(found.high))
    if found.unit == "capacity":
        low, high = (None if end is None or end <= -1 else _percent(end) for end in ends)
        value = f"capacity {_percent(found.change)}"
    else:
        low, high = (None if end is None else f"{end:+.3f}" for end in ends)
        value = f"score {found.change:+.3f}"
    return f"{value} [{low or 'open'}, {high or 'open'}] measured in {found.pairs} pairs, {found.source}"


def _gain_text(gain: Mapping[str, Any]) -> str:
    """An interval without an end has its stand-ins in a recipe: -1 and 1e9."""
    low, high = gain.get("ci95", (-1.0, 1e9))
    ends = [f"at least {low:+.0%}"] if low > -1.0 else []
    ends += [f"at most {high:+.0%}"] if high < 1e9 else []
    return f"{gain.get('estimate', 0.0):+.0%} ({', '.join(ends) or 'no bounds are known'})"
