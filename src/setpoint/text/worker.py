"""What the programs in processes of their own share: limits on themselves, and frames in and out.

Each frame is a big-endian length of 4 bytes and that much JSON. A program first says {"ready": true}; then it answers
every request in turn. Standard library only.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

MEMORY_BYTES = 256 << 20  # on top of what the idle process uses


def with_limit(limit_s: float) -> None:
    """End this process after that much more processor time; 0 lifts the limit."""
    signal.setitimer(signal.ITIMER_PROF, limit_s)  # the signal's default action needs no interpreter to run it


def confine() -> None:
    """Give up what answering does not need: memory, files, processes."""
    limit_memory()
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def limit_memory() -> None:
    """Allow MEMORY_BYTES more than what is used now, unless less was allowed before."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server; we end when our input does
    send({"ready": True})
    for request in frames(sys.stdin.buffer):
        try:
            send(answer(request))
        except UnicodeEncodeError:
            send({"error": "failed", "message": "UnicodeEncodeError"})
        except MemoryError:
            send({"error": "memory", "message": ""})


def frames(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    while len(header := stream.read(4)) == 4:
        yield json.loads(stream.read(int.from_bytes(header, "big")))


def send(answer: dict[str, Any]) -> None:
    content = json.dumps(answer, ensure_ascii=False).encode("utf-8")
    sys.stdout.buffer.write(len(content).to_bytes(4, "big") + content)
    sys.stdout.buffer.flush()
