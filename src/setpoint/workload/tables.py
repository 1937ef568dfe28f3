"""The shipped statistics of public workloads (`data/workload_stats.README.md` says where they come from)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@cache
def shipped() -> dict[str, Any]:
    text = resources.files("setpoint.workload").joinpath("data/workload_stats.json").read_text()
    document: dict[str, Any] = json.loads(text)
    return document


def table(name: str) -> dict[str, Any]:
    found: dict[str, Any] = shipped()["tables"][name]
    return found


@dataclass(frozen=True)
class Quantiles:
    """A distribution by some of its quantiles, linear between them."""

    levels: Floats  # 0..1, ascending
    values: Floats

    @classmethod
    def of(cls, document: dict[str, Any]) -> Quantiles:
        """From an object with "q", and "levels_pct" where they are its own."""
        levels = np.asarray(document.get("levels_pct") or shipped()["quantile_levels_pct"], np.float64) / 100
        return cls(levels, np.asarray(document["q"], np.float64))

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        return np.interp(rng.random(count), self.levels, self.values)

    def below(self, values: Floats) -> Floats:
        """The share of the distribution at or below each value."""
        # Where several levels share a value the highest one counts.
        last = np.append(np.diff(self.values) > 0, True)
        shares: Floats = np.interp(values, self.values[last], self.levels[last], left=0.0, right=1.0)
        return shares


def lengths(name: str, which: str) -> Quantiles:
    """`which` is "input_len" or "output_len"."""
    return Quantiles.of(table(name)[which])
