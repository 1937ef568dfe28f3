"""setpoint generate MODEL [TEXT]"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer

from setpoint.cli.arguments import Json, MaxTokens, Model, Temperature, TopK, TopP
from setpoint.cli.console import DownloadBar, command_app, print_json, say, status, write_text
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig
from setpoint.errors import ConfigError

MAX_STDIN_BYTES = 64 << 20

app = command_app("Complete a text: result on stdout, statistics on stderr.")


@app.command()
@with_knobs(EngineConfig)
def generate(
    model: Model,
    configure: Callable[..., EngineConfig],
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="The prompt. Default: stdin, without its last newline.")
    ] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="STRING", help="Stop at this text; may be given several times.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the text as a chat message of the user.")] = False,
    json: Json = False,
) -> None:
    """Complete TEXT (or stdin) with MODEL."""
    from setpoint.engine.sampling import SamplingParams
    from setpoint.llm import LLM

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=tuple(stop or ())
    )
    config = configure(model=model)
    prompt = _read_stdin() if text is None else _checked(text, "TEXT")
    show = None if json else lambda index, piece: write_text(piece)
    with DownloadBar() as bar:
        llm = LLM(config=config, progress=bar, phase=status if sys.stderr.isatty() else lambda name: None)
    with llm:
        if chat:
            [out] = llm.chat([{"role": "user", "content": prompt}], params, on_text=show)
        else:
            [out] = llm.generate([prompt], params, on_text=show)
    completion = out.outputs[0]
    if json:
        print_json(
            {
                "model": model,
                "prompt_tokens": len(out.prompt_token_ids),
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "metrics": asdict(out.metrics),
            }
        )
        return
    print(flush=True)  # before the statistics, also where both streams are one pipe
    say(
        f"{len(out.prompt_token_ids)} prompt tokens in {out.metrics.time_to_first_token_s * 1e3:.0f} ms, "
        f"{len(completion.token_ids)} tokens at {out.metrics.decode_tokens_per_s:.1f} tok/s, "
        f"finish reason: {completion.finish_reason}"
    )


def _read_stdin() -> str:
    if sys.stdin.isatty():
        say("setpoint: reading the prompt from the terminal; Ctrl-D on an empty line ends it")
    content = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(content) > MAX_STDIN_BYTES:
        raise ConfigError(f"the prompt on stdin is longer than {MAX_STDIN_BYTES >> 20} MiB")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError("the prompt on stdin is not valid UTF-8") from None
    return _checked(text.removesuffix("\n").removesuffix("\r"), "stdin")


def _checked(text: str, source: str) -> str:
    """Refuses no text, and bytes of the command line that were no text."""
    if not text:
        raise ConfigError("the prompt is empty; give TEXT or pipe it in")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"the prompt in {source} is not valid UTF-8")
    return text
