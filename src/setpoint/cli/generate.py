"""setpoint generate MODEL [TEXT]"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer

from setpoint.cli.console import DownloadBar, command_app, print_json, status
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig

app = command_app("Complete a text: result on stdout, statistics on stderr.")


@app.command()
@with_knobs(EngineConfig)
def generate(
    model: Annotated[str, typer.Argument(help="GGUF file, directory, hub repository or alias.")],
    configure: Callable[..., EngineConfig],
    text: Annotated[str | None, typer.Argument(help="The prompt; read from stdin when left out.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    sampling_seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be given several times.")] = None,
    chat: Annotated[bool, typer.Option(help="Wrap the text as a chat message of the user.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
) -> None:
    """Complete TEXT (or stdin) with MODEL."""
    from setpoint.engine.sampling import SamplingParams
    from setpoint.llm import LLM

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=sampling_seed,
        stop=tuple(stop or ()),
    )
    prompt = sys.stdin.read() if text is None else text
    with DownloadBar() as bar:
        llm = LLM(
            config=configure(model=model), progress=bar, phase=status if sys.stderr.isatty() else lambda name: None
        )
    with llm:
        run = llm.chat if chat else llm.generate
        subject = [{"role": "user", "content": prompt}] if chat else [prompt]
        out = run(subject, params, on_text=None if json else _print_piece)[0]  # type: ignore[operator]
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
    print()
    print(
        f"{len(out.prompt_token_ids)} prompt tokens in {out.metrics.time_to_first_token_s * 1e3:.0f} ms, "
        f"{len(completion.token_ids)} tokens at {out.metrics.decode_tokens_per_s:.1f} tok/s, "
        f"finish reason: {completion.finish_reason}",
        file=sys.stderr,
    )


def _print_piece(index: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
