"""Drives Setpoint's engine for against_llama_cpp.py: one JSON request a line in, one JSON answer a line out."""

from __future__ import annotations

import argparse
import json
import queue
import random
import sys

from setpoint.assemble import build_engine
from setpoint.config import EngineConfig
from setpoint.engine.events import Event
from setpoint.tune.engine_bench import run_batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    assembly = build_engine(
        EngineConfig(
            model=arguments.model,
            max_model_len=arguments.context,
            max_num_seqs=arguments.batch,
            num_threads=arguments.threads,
            enable_prefix_caching=False,
        ),
        events.put,
    )
    assembly.engine.start()
    tokens = random.Random(0)
    print(json.dumps({"isa": assembly.isa, "weight_bytes": assembly.weight_bytes}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        run = run_batch(assembly.engine, events, tokens, asked["batch"], asked["prompt_tokens"], asked["output_tokens"])
        print(json.dumps({"prefill_tok_s": run.prefill_tok_s, "decode_tok_s": run.decode_tok_s}), flush=True)
    assembly.engine.shutdown()


if __name__ == "__main__":
    main()
