"""Writes docs/reference/ from the code (knobs, commands, errors), and the README's numbers from their result file.

python docs/generate.py            write what has changed
python docs/generate.py --check    write nothing; exit 1 and name the pages that are stale
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from typer.models import ArgumentInfo

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from peers.markdown import with_performance
from setpoint import errors
from setpoint.cli.knobs import knob_fields
from setpoint.cli.main import COMMANDS, EXIT_CODES
from setpoint.config import EngineConfig, ServerConfig, knob_of
from setpoint.server.errors import REASONS

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
ROW = "| {} | {} | {} |"


def knobs_page() -> str:
    """Every knob of every config class."""
    lines = [
        "# Knobs",
        "",
        "Those of the engine are flags of `serve`, `chat`, `generate` and `bench engine`, and keywords of `LLM(...)`;",
        "those of the server are flags of `serve`. `--no-enable-prefix-caching` turns a yes-or-no knob off.",
        "`setpoint serve MODEL --check-config` shows the values a model gets on this machine, with the reasons.",
    ]
    for title, config_class in (("Engine", EngineConfig), ("Server", ServerConfig)):
        lines += ["", f"## {title}", "", "| knob | default | range | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{flag(field.name)}` | {shown(field)} | {span(field)} | {meaning(field)} |"
            for field in knob_fields(config_class)
        ]
    return "\n".join(lines)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def shown(field: Field[Any]) -> str:
    if field.default is None or field.default is MISSING or field.default == ():
        return "–"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def span(field: Field[Any]) -> str:
    knob = knob_of(field)
    if knob.choices:
        return " ".join(f"`{choice}`" for choice in knob.choices)
    if knob.low is None:
        return "–"
    return f"{knob.low} to {knob.high} {knob.unit}".rstrip()


def meaning(field: Field[Any]) -> str:
    knob = knob_of(field)
    return knob.help + (" Changes the output." if knob.lossy else "")


def commands_page() -> str:
    """Every command with its arguments and options, as its --help tells them."""
    lines = ["# Commands", "", *EXIT_CODES.splitlines()]
    for name, (module, what) in COMMANDS.items():
        lines += ["", f"## setpoint {name}", "", what]
        app = import_module(module).app
        for command in app.registered_commands:
            assert command.callback is not None
            verb = command.name or command.callback.__name__
            path = f"setpoint {name}" if verb == name else f"setpoint {name} {verb}"
            lines += ["", *command_lines(path, command.callback)]
    return "\n".join(lines)


def command_lines(path: str, callback: Callable[..., Any]) -> Iterator[str]:
    signature = inspect.signature(callback, eval_str=True)
    parameters = [(parameter, *unpacked(parameter.annotation)) for parameter in signature.parameters.values()]
    knobs = [config for config in (EngineConfig, ServerConfig) if has_knobs(config, signature)]
    elsewhere = {field.name for config in knobs for field in knob_fields(config)}
    places, rows = [], []
    for parameter, kind, settings in parameters:
        if isinstance(settings, ArgumentInfo):
            places.append(settings.metavar or parameter.name.upper())
            rows.append(ROW.format(f"`{places[-1]}`", "–", settings.help))
        elif parameter.name not in elsewhere:
            names = option_names(parameter.name, kind, settings)
            rows.append(ROW.format(f"`{names}`", default(parameter), settings.help))
    yield f"### `{' '.join([path, *places])}`"
    yield ""
    yield from inspect.cleandoc(callback.__doc__ or "").splitlines()
    if rows:
        yield from ("", "| | default | |", "|---|---|---|", *rows)
    if knobs:
        titles = [config.__name__.removesuffix("Config").lower() for config in knobs]
        yield ""
        yield f"And every knob of the {' and the '.join(f'[{title}](knobs.md#{title})' for title in titles)}."


def has_knobs(config: type, signature: inspect.Signature) -> bool:
    return all(field.name in signature.parameters for field in knob_fields(config))


def unpacked(annotation: Any) -> tuple[Any, Any]:
    """The type and the typer settings of an annotated parameter."""
    assert get_origin(annotation) is Annotated, annotation
    kind, settings = get_args(annotation)
    return kind, settings


def option_names(name: str, kind: Any, settings: Any) -> str:
    given = settings.param_decls or [settings.default]  # typer sorts them when the command is built
    if isinstance(given[0], str):
        return " ".join(given)
    return f"{flag(name)} / --no-{flag(name)[2:]}" if kind is bool else flag(name)


def default(parameter: inspect.Parameter) -> str:
    if any(parameter.default is nothing for nothing in (None, False, inspect.Parameter.empty)):
        return "–"
    return f"`{parameter.default}`"


def errors_page() -> str:
    """The exception tree of the package and the reasons of the wire."""
    tree = textwrap.dedent((errors.__doc__ or "").partition("\n\n")[2].rpartition("\n\n")[0]).strip("\n")
    lines = [
        "# Errors",
        "",
        "## In Python and on the command line",
        "",
        "Every message is one line with the remedy; a command ends with the exit code of its error.",
        "",
        "```",
        tree,
        "```",
        "",
        "## Over HTTP",
        "",
        'The body is `{"error": {"message", "type", "param", "code", "reason"}}`; `code` is the status, `param` the',
        "field, `reason` one of these:",
        "",
        "| reason | status |",
        "|---|---|",
        *(f"| `{reason}` | {status} |" for reason, status in REASONS.items()),
    ]
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {"knobs.md": knobs_page, "cli.md": commands_page, "errors.md": errors_page}


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    stale = []
    for name, make in PAGES.items():
        text = f"<!-- Generated by docs/generate.py; `make docs` writes it anew. -->\n\n{make()}\n"
        path = REFERENCE / name
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
            if not check:
                REFERENCE.mkdir(exist_ok=True)
                path.write_text(text)
    readme = README.read_text()
    fresh = with_performance(readme, RESULTS)
    if fresh != readme:
        stale.append(README.name)
        if not check:
            README.write_text(fresh)
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
