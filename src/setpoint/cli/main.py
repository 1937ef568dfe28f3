"""`setpoint COMMAND ...`: finds the command's module and imports only that one.

The table below is the whole of `setpoint --help`; each command describes its own flags.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from setpoint import __version__
from setpoint.errors import SetpointError

COMMANDS = {  # name -> (module, what it does)
    "serve": ("setpoint.cli.serve", "Serve a model over an OpenAI-compatible HTTP API."),
    "chat": ("setpoint.cli.chat", "Talk with a model in the terminal."),
    "generate": ("setpoint.cli.generate", "Complete a text: result on stdout, statistics on stderr."),
    "bench": ("setpoint.cli.bench", "Measure the engine on this machine."),
    "inspect": ("setpoint.cli.inspect", "Show a model, this machine, or every knob."),
    "models": ("setpoint.cli.models", "List, pull, locate and remove models."),
}

EXIT_CODES = """\
Exit codes: 0 ok or drained, 1 a check failed, 2 configuration or usage, 3 model, 4 port in use, 70 engine,
130 interrupted.
Environment: SETPOINT_API_KEY, SETPOINT_CACHE_DIR, SETPOINT_LOG_LEVEL; the hub's own HF_HOME, HF_TOKEN, HF_HUB_OFFLINE."""


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
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        print(__version__)
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see `setpoint --help`"
        print(f"setpoint: no command '{name[:64]}'; {hint}", file=sys.stderr)
        return 2
    return run(name, arguments[1:])


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command and turn what it raises into one line and an exit code."""
    app = import_module(COMMANDS[name][0]).app
    try:
        code = app(args=list(arguments), prog_name=f"setpoint {name}", standalone_mode=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 1)
    except SetpointError as error:
        print(f"setpoint: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our stdout left, as in `setpoint ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    return int(code or 0)


def entry_point() -> None:
    sys.exit(main())
