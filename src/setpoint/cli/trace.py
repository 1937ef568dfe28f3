"""setpoint trace synth | import | record | describe | split | scale"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from setpoint.cli.arguments import Json
from setpoint.cli.console import command_app, print_json, printable, say

app = command_app("Make, import, record, describe, cut and scale traces of requests.")

In = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace: JSON lines, see docs/guides/traces.md.")]
Out = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the trace goes.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same trace.", min=0)]


@app.command()
def synth(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="chat, code, rag, agent or batch.")],
    output: Out,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Length of the trace.")] = 600.0,
    seed: Seed = 0,
    length_scale: Annotated[float, typer.Option(help="Divides all lengths, for models with a short context.")] = 1.0,
) -> None:
    """Make a trace from the shipped statistics of public workloads."""
    from setpoint.workload.synth import synthesize
    from setpoint.workload.trace import write_trace

    trace = synthesize(preset, rate=rate, seconds=seconds, seed=seed, length_scale=length_scale)
    write_trace(trace, output)
    say(f"{output}: {len(trace.requests)} requests in {trace.seconds:.0f} s")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A public trace or a log.")],
    output: Out,
    format: Annotated[str, typer.Option(help="azure, burstgpt, mooncake, bailian or openai.")],
) -> None:
    """Read another format."""
    from setpoint.workload.imports import import_trace
    from setpoint.workload.trace import write_trace

    trace, skipped = import_trace(source, format)
    write_trace(trace, output)
    say(f"{output}: {len(trace.requests)} requests in {trace.seconds:.0f} s, {skipped} rows left out")


@app.command()
def record(
    upstream: Annotated[str, typer.Option(metavar="URL", help="The endpoint that requests are passed on to.")],
    output: Out,
    port: Annotated[int, typer.Option(help="Port to listen on, loopback only.", min=0, max=65535)] = 8001,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Counts and cuts by the tokens of this model.")
    ] = None,
    record_text: Annotated[bool, typer.Option("--record-text", help="Keep the messages too.")] = False,
    max_bytes: Annotated[int, typer.Option(help="Size at which the recording stops.", min=1 << 20)] = 1 << 30,
) -> None:
    """Pass requests on to any OpenAI-compatible endpoint and record their traffic until Ctrl-C."""
    from setpoint.cli.recording import record_upstream

    record_upstream(upstream, output, port=port, model=tokenizer, keeps_text=record_text, max_bytes=max_bytes)


@app.command("describe")
def describe_(
    trace: In,
    against: Annotated[str | None, typer.Option(help="A shipped table to compare with: azure2023_conv, ...")] = None,
    json: Json = False,
) -> None:
    """Lengths, burstiness and sharing of a trace."""
    from setpoint.errors import ConfigError
    from setpoint.workload.describe import compare, describe
    from setpoint.workload.tables import shipped
    from setpoint.workload.trace import read_trace

    loaded = read_trace(trace)
    document = describe(loaded)
    if against is not None:
        known = [name for name, found in shipped()["tables"].items() if "input_len" in found]
        if against not in known:
            raise ConfigError(f"no table {against[:64]!r}; choose one of {', '.join(known)}")
        document["compared"] = compare(loaded, against)
    if json:
        print_json(document)
        return
    for line in _lines(document):
        print(printable(line))


@app.command()
def split(
    trace: In,
    first: Annotated[Path, typer.Option(metavar="FILE", help="Where the first part goes.")],
    rest: Annotated[Path, typer.Option(metavar="FILE", help="Where the rest goes.")],
    share: Annotated[float, typer.Option(help="Of the time that belongs to the first part.")] = 0.7,
) -> None:
    """Cut a trace in time: one part to tune on, one held out."""
    from setpoint.workload.trace import read_trace, write_trace
    from setpoint.workload.transform import split as cut

    for part, path in zip(cut(read_trace(trace), share), (first, rest), strict=True):
        write_trace(part, path)
        say(f"{path}: {len(part.requests)} requests in {part.seconds:.0f} s")


@app.command()
def scale(
    trace: In,
    output: Out,
    rate: Annotated[float, typer.Option(help="So many times the requests a second.")] = 1.0,
    lengths: Annotated[float, typer.Option(help="Divides all lengths.")] = 1.0,
    seed: Seed = 0,
) -> None:
    """More or fewer requests a second, longer or shorter ones."""
    from setpoint.workload.trace import read_trace, write_trace
    from setpoint.workload.transform import scale_lengths, scale_rate

    scaled = scale_rate(read_trace(trace), rate, seed)
    if lengths != 1.0:
        scaled = scale_lengths(scaled, lengths)
    write_trace(scaled, output)
    say(f"{output}: {len(scaled.requests)} requests in {scaled.seconds:.0f} s")


def _lines(document: dict[str, Any]) -> list[str]:
    rate = document["rate_rps"]
    lines = [
        f"{document['source']}" + "".join(f"; {step}" for step in document["scaling"]),
        f"{document['requests']} requests in {document['seconds']:.0f} s" + (f", {rate:.2f}/s" if rate else ""),
        f"{'tokens':<8}" + "".join(f"{name:>9}" for name in document["input"]),
    ]
    for which in ("input", "output"):
        lines.append(f"{which:<8}" + "".join(f"{value:>9.0f}" for value in document[which].values()))
    if document["iat_cv"] is not None:
        lines.append(f"gaps between arrivals: coefficient of variation {document['iat_cv']:.2f} (Poisson 1)")
    for row in document["counts"]:
        lines.append(
            f"arrivals in {row['window_s']:>2} s: variance/mean {row['var_over_mean']:.2f}, max/mean "
            f"{row['max_over_mean']:.2f}, correlation with the next {row['lag1']:.2f}"
        )
    if document["sessions"]:
        lines.append(f"{document['sessions']} sessions of {document['turns_mean']:.1f} turns")
    if "prefix" in document:
        prefix = document["prefix"]
        blocks = prefix["unique_blocks"]
        lines.append(f"tokens found in an endless prefix cache: {prefix['endless_hit']:.1%} ({blocks} blocks)")
        lines += [f"  in one of {row['blocks']} blocks: {row['hit']:.1%}" for row in prefix["lru"][:-1]]
    if "compared" in document:
        compared = document["compared"]
        lines.append(
            f"against {compared['source']}: KS distance of lengths in {compared['ks_input']:.3f}, "
            f"out {compared['ks_output']:.3f}"
        )
        for row in compared["counts"]:
            theirs = row["source_var_over_mean"]
            shown = "-" if theirs is None else f"{theirs:.2f}"
            lines.append(f"  variance/mean in {row['window_s']} s: {row['var_over_mean']:.2f}, source {shown}")
    return lines
