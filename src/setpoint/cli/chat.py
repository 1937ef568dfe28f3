"""setpoint chat MODEL"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from setpoint.cli.console import DownloadBar, command_app, diagnostics, status
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig
from setpoint.errors import RequestError

app = command_app("Talk with a model in the terminal.")


@app.command()
@with_knobs(EngineConfig)
def chat(
    model: Annotated[str, typer.Argument(help="GGUF file, directory, hub repository or alias.")],
    configure: Callable[..., EngineConfig],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 1024,
) -> None:
    """Chat with MODEL. /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from setpoint.engine.sampling import SamplingParams
    from setpoint.llm import LLM

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    with DownloadBar() as bar:
        llm = LLM(config=configure(model=model), progress=bar, phase=status)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with llm:
        llm.require_chat_template()
        diagnostics.print(f"{model}: /reset forgets, /exit leaves", style="dim")
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(opening)
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            answer: list[str] = []

            def show(index: int, piece: str, answer: list[str] = answer) -> None:
                answer.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()

            try:
                llm.chat(messages, params, on_text=show)
            except KeyboardInterrupt:
                diagnostics.print(" [stopped]", style="dim")
            except RequestError as error:
                diagnostics.print(f"{error}; /reset starts anew", style="red")
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": "".join(answer)})


def _read_line() -> str | None:
    """One line of the user; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
