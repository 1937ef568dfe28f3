"""`setpoint COMMAND ...`: finds the command's module and imports only that one.

The table below is the whole of `setpoint --help`; each command describes its own flags.
"""

from __future__ import annotations

import difflib
import gc
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from setpoint import __version__
from setpoint.config import spare_library_threads
from setpoint.errors import RequestError, SetpointError

COMMANDS = {  # name -> (module, what it does)
    "serve": ("setpoint.cli.serve", "Serve a model over an OpenAI-compatible HTTP API."),
    "chat": ("setpoint.cli.chat", "Talk with a model in the terminal."),
    "generate": ("setpoint.cli.generate", "Complete a text: result on stdout, statistics on stderr."),
    "bench": ("setpoint.cli.bench", "Measure the engine, or a server with a trace."),
    "probe": ("setpoint.cli.probe", "Measure what this machine can do at most, and what steps of a model cost."),
    "plan": ("setpoint.cli.plan", "Predict what a model can serve on this machine under an SLA."),
    "tune": ("setpoint.cli.tune", "Measure which knobs hold an SLA, and certify them."),
    "trace": ("setpoint.cli.trace", "Make, import, describe, cut and scale traces of requests."),
    "explain": ("setpoint.cli.explain", "Show where the time of a request went, and the knob to turn."),
    "inspect": ("setpoint.cli.inspect", "Show a model, this machine, or every knob."),
    "models": ("setpoint.cli.models", "List, pull, locate and remove models."),
}

EXIT_CODES = """\
Exit codes: 0 ok or drained, 1 a check failed or an SLO is not met, 2 configuration or usage, 3 model, 4 port in use,
5 an invalid measurement, 70 engine, 130 interrupted.
Environment: SETPOINT_API_KEY, SETPOINT_CACHE_DIR, SETPOINT_LOG_LEVEL; the hub's own HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE."""

NO_REMOTE_CODE = "Setpoint never runs code from a model directory"


def help_text() -> str:
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{what}" for name, (_, what) in COMMANDS.items())
    return (
        "Usage: setpoint COMMAND [ARGUMENTS]\n\n"
        "An inference engine that takes a target instead of a hundred flags.\n\n"
        f"Commands:\n{rows}\n\n"
        "Try:  setpoint chat smollm2-135m\n"
        "      setpoint serve smollm2-135m --port 8000\n"
        "      setpoint COMMAND --help\n\n" + EXIT_CODES
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]  # `setpoint help serve`
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        print(__version__)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        return _fail(f"no command {name[:64]!r}", f"did you mean '{near[0]}'?" if near else "see `setpoint --help`", 2)
    return run(name, arguments[1:])


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command and turn what it raises into one line and an exit code."""
    if any(argument.partition("=")[0] == "--trust-remote-code" for argument in arguments):
        return _fail(NO_REMOTE_CODE, "leave out --trust-remote-code", 2)
    spare_library_threads()
    gc.set_threshold(50_000, 20, 20)  # imports make objects that stay: looking them through again and again takes 60 ms
    import typer

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever the locale can show
    app = import_module(COMMANDS[name][0]).app
    usage_error: Any = typer.BadParameter.__mro__[1]  # UsageError, which typer does not export
    try:
        code = app(args=list(arguments), prog_name=f"setpoint {name}", standalone_mode=False)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):
            return _reader_left()
        code = stop.code
    except usage_error as error:
        return _fail(*_usage(error, name), 2)
    except RequestError as error:  # from the command line it is a flag that is wrong
        return _fail(str(error), "", 2)
    except SetpointError as error:
        return _fail(str(error), "", error.exit_code)
    except BrokenPipeError:
        return _reader_left()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        return _internal_error(error)
    if code == 130:
        print(file=sys.stderr)
    return code if isinstance(code, int) else 0


def _fail(what: str, remedy: str, code: int) -> int:
    line = f"setpoint: {what}; {remedy}" if remedy else f"setpoint: {what}"
    print(" ".join(line.splitlines()), file=sys.stderr)
    return code


def _usage(error: Any, name: str) -> tuple[str, str]:
    """What is wrong with the arguments, and the nearest flag or the page that tells."""
    message = re.split(r" \(Possible options| Did you mean", str(error.format_message()))[0].rstrip(".")
    near = difflib.get_close_matches(
        getattr(error, "option_name", ""), getattr(error, "possibilities", None) or (), n=1, cutoff=0.0
    )
    context = getattr(error, "ctx", None)
    page = f"see `{context.command_path if context is not None else f'setpoint {name}'} --help`"
    return message[:1].lower() + message[1:], f"did you mean {near[0]}?" if near else page


def _reader_left() -> int:
    """The reader of our stdout has seen enough, as in `setpoint ... | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in the buffer
    return 0


def _internal_error(error: Exception) -> int:
    from setpoint.config import log_level

    if log_level() == "debug":
        raise error
    what = f"internal error: {type(error).__name__}: {str(error)[:300]}"
    return _fail(what, "SETPOINT_LOG_LEVEL=debug shows where; please report it", SetpointError.exit_code)


def entry_point() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
