"""Command-line options made from the knobs of a config class, so that no knob is declared twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from setpoint.config import knob_of


def with_knobs(*config_classes: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's `Callable[..., Config]` parameters by one option per knob of that config class.

    The command receives, under the parameter's name, a function that makes the config from the options; it passes
    the fields that are no knobs (the model) itself.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        plain: list[inspect.Parameter] = []
        makers: dict[str, type] = {}
        for name, parameter in inspect.signature(command).parameters.items():
            made = _made_class(hints[name])
            if made in config_classes:
                makers[name] = made
            else:
                plain.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
        options = [option(declared, made) for made in makers.values() for declared in knob_fields(made)]

        def run(**values: Any) -> None:
            given: dict[str, Any] = {}
            for name, made in makers.items():
                own = {declared.name: values.pop(declared.name) for declared in knob_fields(made)}
                given[name] = _maker(made, own)
            command(**values, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*plain, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*plain, *options]}
        return run

    return decorate


def knob_fields(config_class: type) -> list[Field[Any]]:
    return [declared for declared in fields(config_class) if "knob" in declared.metadata]


def option(declared: Field[Any], config_class: type) -> inspect.Parameter:
    """One `--flag` with its help, unit and bounds."""
    knob = knob_of(declared)
    notes = [text for text in (_range(knob.low, knob.high, knob.unit), ", ".join(knob.choices)) if text]
    text = knob.help + (f" [{'; '.join(notes)}]" if notes else "")
    annotation = _option_type(get_type_hints(config_class)[declared.name])
    repeatable = annotation == list[str]
    default: Any = declared.default if declared.default is not MISSING else ...
    shown = typer.Option(
        help=text, metavar="STRING" if repeatable else None, show_default=default is not None and not repeatable
    )
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=list(default) if repeatable else default,
        annotation=Annotated[annotation, shown],
    )


def _option_type(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return str  # the config checks the choice and names the flag
    if get_origin(hint) is tuple:
        return list[str]
    return hint


def _range(low: float | None, high: float | None, unit: str) -> str:
    if low is None or high is None:
        return unit
    return f"{low}..{high} {unit}".strip()


def _made_class(hint: Any) -> Any:
    """The class that a `Callable[..., Class]` annotation makes."""
    arguments = get_args(hint)
    return arguments[-1] if arguments else None


def _maker(config_class: type, values: dict[str, Any]) -> Callable[..., Any]:
    def make(**more: Any) -> Any:
        typed = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return config_class(**typed, **more)

    return make
