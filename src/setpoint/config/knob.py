"""A knob is declared once, as a field of a dataclass with metadata: help, unit, bounds or choices."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any

from setpoint.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Knob:
    """What a field means to a person: help with its reason, unit, bounds or choices.

    `search` holds the values that `setpoint tune` tries, ascending; only knobs that are hot (they change between two
    steps, without a restart) and do not change the output have some.
    """

    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    lossy: bool = False
    search: tuple[Any, ...] = ()


def knob(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    lossy: bool = False,
    search: tuple[Any, ...] = (),
) -> Any:
    meta = Knob(help, unit, low, high, choices, lossy, search)
    return field(default=default, metadata={"knob": meta})


def knob_of(declared: Field[Any]) -> Knob:
    meta = declared.metadata["knob"]
    assert isinstance(meta, Knob)
    return meta


def check_bounds(config: object) -> None:
    """Raise ConfigError for the first field outside its declared bounds."""
    for declared in fields(config):  # type: ignore[arg-type]
        if "knob" not in declared.metadata:
            continue
        meta, value = knob_of(declared), getattr(config, declared.name)
        flag = "--" + declared.name.replace("_", "-")
        if value is None:
            continue
        if meta.choices and value not in meta.choices:
            raise ConfigError(f"{flag} is {value!r}; choose one of {', '.join(meta.choices)}")
        if meta.low is not None and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or value < meta.low
        ):
            raise ConfigError(f"{flag} is {value!r}; it must be at least {meta.low:g}")
        if meta.high is not None and value > meta.high:
            raise ConfigError(f"{flag} is {value!r}; it must be at most {meta.high:g}")
