"""setpoint serve MODEL"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from setpoint.cli.arguments import Model
from setpoint.cli.console import DownloadBar, command_app, status
from setpoint.cli.knobs import with_knobs
from setpoint.config import EngineConfig, ServerConfig, api_key_from_environment, log_level

app = command_app("Serve a model over an OpenAI-compatible HTTP API.")


@app.command()
@with_knobs(EngineConfig, ServerConfig)
def serve(
    model: Model,
    configure: Callable[..., EngineConfig],
    configure_server: Callable[..., ServerConfig],
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Print every knob with its value and reason, and leave.")
    ] = False,
) -> None:
    """Serve MODEL until SIGTERM or Ctrl-C; then finish what runs (--shutdown-timeout) and leave with 0."""
    from setpoint.assemble import build_engine
    from setpoint.cli.recording import record_server
    from setpoint.server.auth import KeyRing, check_bind
    from setpoint.server.context import ServerContext, ServerSettings
    from setpoint.server.events import EventRouter
    from setpoint.server.logs import EventLog
    from setpoint.server.run import FORCED, bind
    from setpoint.server.run import serve as run_server

    config, http = configure(model=model), configure_server()
    if check_config:
        _print_reasons(config)
        return
    environment_key = api_key_from_environment()
    keys = KeyRing(
        [*http.api_key, *([environment_key] if environment_key else [])],
        Path(http.api_key_file) if http.api_key_file else None,
    )
    check_bind(http.host, keys)
    listener = bind(http.host, http.port)  # a taken port is an error now, not after the weights are loaded
    try:
        router = EventRouter()
        with DownloadBar() as bar:
            assembly = build_engine(config, router.deliver, progress=bar, phase=status)
        name = http.served_model_name or _display_name(model)
        context = ServerContext(
            engine=assembly.engine,
            router=router,
            tokenizer=assembly.tokenizer,
            chat_template=assembly.chat_template,
            grammars=assembly.grammars,
            model_names=(name,),
            max_model_len=assembly.engine.limits.max_model_len,
            settings=ServerSettings(
                host=http.host,
                open_metrics=http.open_metrics,
                shutdown_timeout_s=http.shutdown_timeout,
                keeps_messages=http.record_text,
            ),
            keys=keys,
            log=EventLog(level=log_level()),
            cache_info=assembly.cache_info,
            server_info={
                "isa": assembly.isa,
                "knobs": {reason.knob: reason.value for reason in assembly.reasons},
            },
        )
        recording = None if http.record is None else record_server(context, http)
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in assembly.phases.items())

        def announce(url: str, command: str) -> None:
            print(f"setpoint: serving {name} at {url} ({phases}); try:\n\n{command}\n", file=sys.stderr, flush=True)

        assembly.engine.start()
        code = run_server(context, sock=listener, host=http.host, on_ready=announce)
        if recording is not None and code != FORCED:  # cut short, it stays readable as it is
            recording.close()
    finally:
        listener.close()
    if code == FORCED:  # threads may be inside native code: an interpreter that ends under them aborts
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


def _display_name(model: str) -> str:
    """A path is served under its file's name; an alias or repository under itself."""
    path = Path(model).expanduser()
    return path.name.removesuffix(".gguf") if path.exists() else model


def _print_reasons(config: EngineConfig) -> None:
    from setpoint.assemble import load_model, model_facts
    from setpoint.config import resolve, this_machine

    with DownloadBar() as bar:
        loaded = load_model(config.model, progress=bar)
    _, reasons = resolve(config, this_machine(), model_facts(loaded.model, loaded.checkpoint.num_bytes))
    width = max(len(reason.knob) for reason in reasons)
    for reason in reasons:
        print(f"{reason.knob:<{width}}  {reason.value!s:>12}  {reason.source:<8}  {reason.why}")
