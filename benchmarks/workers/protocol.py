"""One JSON question a line in, one JSON answer a line out: how vs_llamacpp.py drives every engine.

    {"do": "prefill", "prompt": [ids], "settings": {...}}               -> {"seconds", "tokens", "output"}
    {"do": "decode", "prompts": [[ids], ...], "steps": n, "copies": b, "settings": {...}}  -> the same
    {"do": "forget"}                                                    -> {}

`prefill` computes a prompt from nothing up to its first greedy token. `decode` continues prompts whose KV cache is
already filled (filling it is not timed, and skipped while prompts and settings stay the same) by `steps` greedy tokens
each. `copies` says that all prompts are equal, so that a cache may be copied. Answers gain "cpu_s", the CPU time of
this process. Nothing here imports Setpoint: the rivals' workers run in environments of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]

# Taken before any engine is imported: what engines print goes to standard error.
_out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def serve(about: dict[str, Any], answers: dict[str, Callable[..., Answer]]) -> None:
    """Answer until standard input closes."""
    print(json.dumps(about), file=_out)
    for line in sys.stdin:
        question = json.loads(line)
        began = time.process_time()
        answer = answers[question.pop("do")](**question)
        answer["cpu_s"] = time.process_time() - began
        print(json.dumps(answer), file=_out)
