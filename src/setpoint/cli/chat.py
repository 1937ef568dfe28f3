"""setpoint chat MODEL"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from setpoint.cli.arguments import MaxTokens, Model, Temperature, TopK, TopP
from setpoint.cli.console import DownloadBar, command_app, say, status, write_text
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig
from setpoint.errors import RequestError

if TYPE_CHECKING:
    from setpoint.engine.sampling import SamplingParams
    from setpoint.llm import LLM

COMMANDS = "/reset forgets, /exit or Ctrl-D leaves, Ctrl-C stops an answer"

app = command_app("Talk with a model in the terminal.")


@app.command()
@with_knobs(EngineConfig)
def chat(
    model: Model,
    configure: Callable[..., EngineConfig],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
) -> None:
    """Chat with MODEL. /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from setpoint.engine.sampling import SamplingParams
    from setpoint.llm import LLM

    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens)
    with DownloadBar() as bar:
        llm = LLM(config=configure(model=model), progress=bar, phase=status)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with llm:
        llm.require_chat_template()
        _edit_lines()
        say(f"{model}: {COMMANDS}")
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(opening)
                say("forgotten")
            elif line.startswith("/"):
                say(f"no command {line.split()[0][:32]}: {COMMANDS}")
            elif line:
                _answer(llm, messages, line, params)


def _answer(llm: LLM, messages: list[dict[str, str]], line: str, params: SamplingParams) -> None:
    """Stream the answer to `line` and add both to the conversation; what failed leaves no trace there."""
    answer: list[str] = []

    def show(index: int, piece: str) -> None:
        answer.append(piece)
        write_text(piece)

    asked = [*messages, {"role": "user", "content": line}]
    try:
        llm.chat(asked, params, on_text=show)
    except KeyboardInterrupt:
        say(" [stopped]")
    except RequestError as error:  # as a rule the conversation has become too long
        say(f"{error} /reset starts anew.")
        return
    print(flush=True)
    messages[:] = [*asked, {"role": "assistant", "content": "".join(answer)}]


def _edit_lines() -> None:
    """Arrow keys and the session's history in input()."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import_module("readline")  # input() uses it once it is imported


def _read_line() -> str | None:
    """One line of the user, "" for a line given up with Ctrl-C; None at the end of input."""
    typing = sys.stdin.isatty()
    try:
        return input("> " if typing else "").strip()
    except UnicodeDecodeError:
        say("that was not valid UTF-8")
        return ""
    except KeyboardInterrupt:
        if not typing:
            raise
        print()
        return ""
    except EOFError:
        if typing:
            print()
        return None
