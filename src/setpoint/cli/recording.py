"""What `setpoint serve --record` and `setpoint trace record` put together: a recording, and who tells it what."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from setpoint.cli.console import DownloadBar, say
from setpoint.config import ServerConfig
from setpoint.errors import ConfigError
from setpoint.workload.record import BLOCK_BYTES, BLOCK_TOKENS, Recording, Seen
from setpoint.workload.record_file import PART_BYTES, Parts
from setpoint.workload.trace import TraceHeader

if TYPE_CHECKING:
    from setpoint.server.context import ServerContext
    from setpoint.server.generation import Generation, Job

_PARTS_KEPT = 4  # at least, of a recording that is as large as it may be
_HASHED = f"prompts as salted hashes of {BLOCK_TOKENS} tokens"


def record_server(context: ServerContext, config: ServerConfig) -> Recording:
    """Every generation of this server goes into files of --record. Raises ConfigError."""
    assert config.record is not None
    folder, stamp = Path(config.record).expanduser(), _stamp()
    source = f"setpoint serve {context.model_name}, {stamp}; {_HASHED}"
    name = f"{stamp}-{os.getpid()}"
    part_bytes = min(PART_BYTES, config.record_bytes // _PARTS_KEPT)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        parts = Parts(
            lambda number: folder / f"{name}-{number:03d}.jsonl",
            TraceHeader(source, block_size=BLOCK_TOKENS),
            max_bytes=config.record_bytes,
            part_bytes=part_bytes,
        )
    except OSError as error:
        raise ConfigError(f"--record {config.record} cannot be written: {error.strerror}") from None
    recording = Recording(parts, context.clock, lambda message: context.log.write("recording", "warning", note=message))
    clock, keeps_text = context.clock, config.record_text

    def on_end(generation: Generation, arrival_s: float) -> None:
        end_s = clock()
        recording.add(lambda: seen_of(generation, arrival_s, end_s, keeps_text=keeps_text))

    context.on_end = on_end
    return recording


def seen_of(generation: Generation, arrival_s: float, end_s: float, *, keeps_text: bool) -> Iterable[Seen]:
    """A line for each prompt; the choices of one count together."""
    job = generation.job
    for number, prompt in enumerate(job.prompts):
        choices = generation.choices[number * job.n : (number + 1) * job.n]
        messages = tuple(dict(message) for message in job.messages)
        if prompt.text is not None:
            messages = ({"role": "user", "content": prompt.text},)
        yield Seen(
            arrival_s,
            end_s,
            prompt.token_ids,
            len(prompt.token_ids),
            sum(choice.num_tokens for choice in choices),
            _class_of(job),
            f"{job.tenant}\0{job.session_id}" if job.session_id else None,
            messages=messages or None if keeps_text else None,
            slo=None if job.slo is None else str(job.slo),
        )


def _class_of(job: Job) -> str:
    """The route, and the priority of those that have one: they are served differently."""
    route = "completion" if job.continues_text else "chat"
    return f"{route}, priority {job.priority}" if job.priority else route


def record_upstream(url: str, output: Path, *, port: int, model: str | None, keeps_text: bool, max_bytes: int) -> None:
    """Serve the proxy until a signal, then close the file. Raises ConfigError, PortError, ModelError."""
    import uvicorn

    from setpoint.server.run import bind
    from setpoint.workload.record_answer import BYTES_PER_TOKEN
    from setpoint.workload.record_proxy import RecordingProxy, check_upstream

    upstream = check_upstream(url)
    listener = bind("127.0.0.1", port)
    try:
        encode = None if model is None else _encoder(model)
        counted = f"{BYTES_PER_TOKEN} bytes a token" if model is None else f"the tokens of {model}"
        blocks = f"blocks of {BLOCK_BYTES} bytes of text" if model is None else f"blocks of {BLOCK_TOKENS} tokens"
        source = f"setpoint trace record, {_stamp()}; tokens by usage, else {counted}; salted hashes, {blocks}"
        try:
            header = TraceHeader(source, block_size=BLOCK_TOKENS)
            parts = Parts(
                lambda number: output if number == 1 else None, header, max_bytes=max_bytes, part_bytes=max_bytes
            )
        except FileExistsError:
            raise ConfigError(f"{output} exists; choose another --output") from None
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error.strerror}") from None
        recording = Recording(parts, time.monotonic, say)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        proxy = RecordingProxy(upstream, recording, time.monotonic, encode=encode, keeps_text=keeps_text)
        config = uvicorn.Config(
            proxy,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
        )
        say(f"recording what http://127.0.0.1:{listener.getsockname()[1]} passes on to {upstream}; Ctrl-C ends it")
        # uvicorn raises the signal that ended it again when it is done: then the file is still open.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            recording.close()
            left_out = f", {recording.num_left_out} left out" if recording.num_left_out else ""
            say(f"{output}: {recording.num_written} requests{left_out}")
    finally:
        listener.close()


def _encoder(model: str) -> Callable[[str], list[int]]:
    from setpoint.assemble import load_model

    with DownloadBar() as bar:
        tokenizer = load_model(model, progress=bar).tokenizer
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _stamp() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
