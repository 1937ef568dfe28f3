"""What `setpoint tune` may set, made from the knobs' own metadata, and the settings that are worth a look.

A setting is what differs from the default. Coordinates first (one knob at a time), then points of a low-discrepancy
sequence (Halton 1960) over all of them: with a handful of hot knobs both together cover the space.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from setpoint.config import EngineConfig, knob_of

Setting = tuple[tuple[str, Any], ...]  # (knob, value) that differ from the default, in the order of declaration
DEFAULT: Setting = ()
ALL_OF = 4  # times the points that were asked for: so many are not sampled


@dataclass(frozen=True, slots=True)
class Dimension:
    """A knob with the values to try; the default is one of them."""

    knob: str
    default: Any
    values: tuple[Any, ...]


def space(config: EngineConfig) -> tuple[Dimension, ...]:
    """The hot knobs that the user left at their default. Lossy ones are left out: no verdict on quality exists."""
    found = []
    for declared in fields(config):
        if "knob" not in declared.metadata:
            continue
        knob, value = knob_of(declared), getattr(config, declared.name)
        if knob.search and not knob.lossy and value == declared.default:
            ordered = knob.search if value in knob.search else (*knob.search, value)
            found.append(Dimension(declared.name, value, ordered))
    return tuple(found)


def left_out(config: EngineConfig) -> tuple[str, ...]:
    """Knobs that change the output: they need `setpoint quality` before they may be tried."""
    return tuple(d.name for d in fields(config) if "knob" in d.metadata and knob_of(d).lossy)


def setting_of(dimensions: Sequence[Dimension], values: Sequence[Any]) -> Setting:
    pairs = zip(dimensions, values, strict=True)
    return tuple((dimension.knob, value) for dimension, value in pairs if value != dimension.default)


def coordinates(dimensions: Sequence[Dimension]) -> Iterator[Setting]:
    """One knob at a time, its other values."""
    for dimension in dimensions:
        for value in dimension.values:
            if value != dimension.default:
                yield ((dimension.knob, value),)


def scattered(dimensions: Sequence[Dimension], count: int) -> Iterator[Setting]:
    """Points spread evenly over all knobs together, each setting once."""
    seen = set()
    for index in range(1, 50 * count + 1):
        places = [_radical_inverse(index, base) for base in _PRIMES[: len(dimensions)]]
        values = [d.values[int(place * len(d.values))] for d, place in zip(dimensions, places, strict=True)]
        setting = setting_of(dimensions, values)
        if setting and setting not in seen:
            seen.add(setting)
            yield setting
        if len(seen) >= count:
            return


_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


def _radical_inverse(index: int, base: int) -> float:
    found, weight = 0.0, 1.0 / base
    while index:
        index, digit = divmod(index, base)
        found += digit * weight
        weight /= base
    return found


def candidates(dimensions: Sequence[Dimension], count: int) -> list[Setting]:
    """Coordinates and scattered points, each once; never the default. Everything, where that is not many times more."""
    rest: Iterable[Setting] = scattered(dimensions, count)
    if math.prod(len(d.values) for d in dimensions) <= ALL_OF * count:
        rest = (setting_of(dimensions, values) for values in itertools.product(*(d.values for d in dimensions)))
    found = list(dict.fromkeys([*coordinates(dimensions), *rest]))
    return [setting for setting in found if setting != DEFAULT]


def shortlist(scored: Sequence[tuple[Setting, float]], count: int, model_error: float) -> list[Setting]:
    """By predicted score in log units: those within five model errors of the best, the best first.

    Equal predictions keep the setting with the fewest overrides first.
    """
    ranked = sorted(scored, key=lambda pair: (-pair[1], len(pair[0])))
    if not ranked:
        return []
    border = ranked[0][1] - 5 * model_error
    return [setting for setting, score in ranked if score >= border][:count]


def text(setting: Setting) -> str:
    return ", ".join(f"{knob}={value}" for knob, value in setting) or "default"
