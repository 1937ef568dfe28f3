"""Arguments that several commands share: the model, --json, and the sampling options with the bounds of the API."""

from __future__ import annotations

from typing import Annotated

import typer

from setpoint.engine.sampling import BOUNDS


def _within(field: str, text: str) -> str:
    bound = BOUNDS[field]
    low = f"above {bound.minimum}" if bound.exclusive_minimum else f"{bound.minimum}"
    return f"{text} [{low}..{bound.maximum}]"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="GGUF file, directory, alias, or hub repository as org/name[:file.gguf or quantization][@revision].",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate. [1..the context]")]
Temperature = Annotated[float, typer.Option(help=_within("temperature", "Randomness of the choice; 0 is greedy."))]
TopP = Annotated[float, typer.Option(help=_within("top_p", "Choose among the likeliest tokens that add up to this."))]
TopK = Annotated[int, typer.Option(help="Choose among so many of the likeliest tokens; 0 is off. [0..vocabulary]")]
