"""What an HTTP client adds to every token of a stream: three stacks against one server that only counts.

    python benchmarks/client_stacks.py [--streams 64] [--tokens 200] [--gap-ms 10] [--repeat 5]

A process of its own sends events of the usual size to `streams` streams, one a gap, each with the moment it was written
in it. Every stack runs in a process of its own, in turn. Reported: CPU time of the client a token, and how long after
its writing an event has its time stamp (median, 99th percentile). aiohttp is measured where it is installed. The last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

BODY = b'{"model":"m","prompt":[1,2,3],"stream":true}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1790000000,"model":'
    b'"smollm2-135m","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}],"at":%.9f}\n\n'
)


def serve(tokens: int, gap_s: float, port: Any) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(BODY))
                writer.write(HEAD)
                for _ in range(tokens):
                    await asyncio.sleep(gap_s)
                    event = EVENT % time.monotonic()
                    writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(run())


def lags_of(data: bytes, now: float, lags: list[float]) -> None:
    import orjson

    for line in data.split(b"\n"):
        if line.startswith(b"data: {"):
            lags.append(now - orjson.loads(line[6:])["at"])


async def with_ours(port: int, streams: int) -> list[float]:
    from setpoint.tune.replay.http import Address, Connections

    connections, lags = Connections(Address("127.0.0.1", port, False, ""), {}), []
    request = connections.request("/v1/completions", BODY)

    def on_body(status: int, body: bytes, now: float) -> None:
        lags_of(body, now, lags)

    async def one() -> None:
        await connections.exchange(await connections.take(), request, lambda _: None, on_body)

    await asyncio.gather(*(one() for _ in range(streams)))
    return lags


async def with_httpx(port: int, streams: int) -> list[float]:
    import httpx

    lags: list[float] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60) as client:

        async def one() -> None:
            headers = {"Content-Type": "application/json"}
            async with client.stream("POST", "/v1/completions", content=BODY, headers=headers) as response:
                async for data in response.aiter_bytes():
                    lags_of(data, time.monotonic(), lags)

        await asyncio.gather(*(one() for _ in range(streams)))
    return lags


async def with_aiohttp(port: int, streams: int) -> list[float]:
    import aiohttp

    lags: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> None:
            async with session.post(f"http://127.0.0.1:{port}/v1/completions", data=BODY) as response:
                async for data, _ in response.content.iter_chunks():
                    lags_of(data, time.monotonic(), lags)

        await asyncio.gather(*(one() for _ in range(streams)))
    return lags


STACKS: dict[str, Callable[[int, int], Any]] = {"ours": with_ours, "httpx": with_httpx, "aiohttp": with_aiohttp}


def measure(stack: str, is_uvloop: bool, port: int, streams: int, pipe: Any) -> None:
    factory = None
    if is_uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(STACKS[stack](port, 2))  # imports and the first connection
        began = time.process_time()
        lags = runner.run(STACKS[stack](port, streams))
        cpu_s = time.process_time() - began
    lags.sort()
    pipe.send((cpu_s / len(lags) * 1e6, lags[len(lags) // 2] * 1e6, lags[int(len(lags) * 0.99)] * 1e6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--gap-ms", type=float, default=10.0)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    context = multiprocessing.get_context("fork")
    port = context.Value("i", 0)
    server = context.Process(target=serve, args=(given.tokens, given.gap_ms / 1e3, port), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.01)
    there = [name for name in STACKS if name == "ours" or importlib.util.find_spec(name)]
    stacks = [(name, is_uvloop) for name in there for is_uvloop in (False, True)]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(given.repeat):
        for stack, is_uvloop in stacks:
            receiving, sending = context.Pipe(False)
            arguments = (stack, is_uvloop, port.value, given.streams, sending)
            process = context.Process(target=measure, args=arguments)
            process.start()
            found.setdefault(stack + (", uvloop" if is_uvloop else ""), []).append(receiving.recv())
            process.join()
    server.kill()
    rows = {
        name: [round(statistics.median(column), 1) for column in zip(*runs, strict=True)]
        for name, runs in found.items()
    }
    for name, (cpu, median, p99) in rows.items():
        print(f"{name:18} {cpu:6.1f} us CPU a token   stamped after {median:7.1f} us, p99 {p99:8.1f} us")
    document = {"streams": given.streams, "tokens": given.tokens, "gap_ms": given.gap_ms, "cpus": os.cpu_count()}
    columns = ("cpu_us_per_token", "lag_us_median", "lag_us_p99")
    print(json.dumps(document | {"rows": {name: dict(zip(columns, row, strict=True)) for name, row in rows.items()}}))


if __name__ == "__main__":
    main()
