"""setpoint bench engine MODEL | serve URL"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated

import typer

from setpoint.cli.arguments import Json, Model
from setpoint.cli.bench_serve import serve
from setpoint.cli.console import DownloadBar, command_app, print_json, status
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig
from setpoint.errors import ConfigError

app = command_app("Measure the engine on this machine, or a server over HTTP.")


@app.callback()
def bench() -> None:
    """Measure the engine on this machine, or a server over HTTP."""


app.command("serve")(serve)


@app.command()
@with_knobs(EngineConfig)
def engine(
    model: Model,
    configure: Callable[..., EngineConfig],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1, max=1 << 20)] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated for each.", min=2, max=1 << 20)] = 64,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,32",
    repeat: Annotated[int, typer.Option(help="Runs of each batch size; medians are reported.", min=1, max=1000)] = 5,
    json: Json = False,
) -> None:
    """Random-token prompts, no prefix cache, no speculation, greedy, ignoring the end of sequence.

    Prints a table and, as the last line, one JSON document of medians.
    """
    from setpoint.assemble import build_engine
    from setpoint.engine.events import Event
    from setpoint.tune.engine_bench import bench_engine

    batches = _batches(batch)
    longest = prompt_tokens + output_tokens
    config = configure(model=model)
    config = replace(
        config,
        enable_prefix_caching=False,
        speculative_config="off",  # random tokens would say nothing about it
        max_model_len=config.max_model_len or max(longest, 16),
        max_num_seqs=max(config.max_num_seqs, *batches),
        max_num_queued_reqs=max(config.max_num_queued_reqs, *batches),
        max_num_queued_tokens=max(config.max_num_queued_tokens, prompt_tokens * max(batches)),
    )
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    with DownloadBar() as bar:
        assembly = build_engine(config, events.put, progress=bar, phase=status)
    assembly.engine.start()
    try:
        rows = bench_engine(
            assembly.engine,
            events,
            batches=batches,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            repeat=repeat,
            weight_bytes=assembly.weight_bytes,
            report=status,
        )
    finally:
        assembly.engine.shutdown()
    if not json:
        print("batch  prefill tok/s  decode tok/s   TTFT ms  TPOT ms  weights GB/s")
        for row in rows:
            print(
                f"{row.batch:>5} {row.prefill_tok_s:>14.1f} {row.decode_tok_s:>13.1f} {row.ttft_ms:>9.1f} "
                f"{row.tpot_ms:>8.2f} {row.weight_gb_s:>13.2f}"
            )
    machine = {"isa": assembly.isa, "threads": assembly.config.num_threads}
    print_json({"model": model, "machine": machine, "rows": [asdict(row) for row in rows]})


def _batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--batch is {text!r}; give sizes separated by commas, as in 1,8,32") from None
    if not batches or any(not 1 <= size <= 4096 for size in batches):
        raise ConfigError("--batch sizes must be in 1..4096")
    return batches
