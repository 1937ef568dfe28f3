"""Would a second branch pay? How often the second best guess is right where the first is wrong, and what a row costs.

    python benchmarks/draft_trees.py [--model smollm2-135m] [--conversations 4]

Outputs of four workloads are replayed through the drafters token by token. Where they disagree on the next token, the
one with the longer match is the chain's first token and the other one the second branch. A branch of one token adds a
row and P(first wrong, second right) tokens; lengthening the chain adds a row and the survival of its next token. Both
are set against the measured cost of a row, t(M + 1) - t(M) over t(M)'s cost of a token. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from typing import Any

from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams
from setpoint.engine.sequence import ActiveRequest, Sequence
from setpoint.engine.speculation.drafter import Draft, Drafter
from setpoint.engine.speculation.prompt_lookup import PromptLookup
from setpoint.engine.speculation.suffix import CorpusSuffix, SessionSuffix
from speculation import Bench
from speculation_work import workloads

LENGTH = 8
ROWS = (1, 2, 4, 8, 16)


def replay(prompts: list[list[int]], outputs: list[list[int]]) -> dict[str, float]:
    """Shares of all output tokens: how often there is a guess, a second one, and which of them is right."""
    drafters: tuple[Drafter, ...] = (SessionSuffix(), CorpusSuffix(), PromptLookup())
    counts = dict.fromkeys(("tokens", "guessed", "first", "second_given", "second", "next"), 0)
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        request = Request(str(number), prompt, SamplingParams(max_tokens=len(output)))
        seq = Sequence(number, ActiveRequest(request, 0.0, b""), 0, arrival=0, seed=0, num_groups=1, max_len=1 << 20)
        for _ in range(len(prompt) // 256):  # long prompts are read over several calls
            for drafter in drafters:
                drafter.propose([seq], LENGTH)
        for position, token in enumerate(output):
            guesses = [draft for drafter in drafters if (draft := drafter.propose([seq], LENGTH)[0]) is not None]
            count(counts, guesses, token, output[position + 1 : position + 2])
            seq.token_ids.append(token)
        for drafter in drafters:
            drafter.finished(seq)
    tokens = max(counts.pop("tokens"), 1)
    return {name: number / tokens for name, number in counts.items()}


def count(counts: dict[str, int], guesses: list[Draft], token: int, following: list[int]) -> None:
    counts["tokens"] += 1
    if not guesses:
        return
    best = max(guesses, key=lambda draft: draft.strength)
    second = next((draft for draft in guesses if draft.token_ids[0] != best.token_ids[0]), None)
    is_right = best.token_ids[0] == token
    counts["guessed"] += 1
    counts["first"] += is_right
    counts["next"] += is_right and best.token_ids[1:2] == following
    counts["second_given"] += second is not None
    counts["second"] += second is not None and second.token_ids[0] == token


def row_costs(bench: Bench, prompt: list[int]) -> dict[int, float]:
    """A further row's time as a share of what a token costs without it, by the number of rows; medians of steps."""
    seconds: dict[int, float] = {}
    for rows in sorted({near for count in ROWS for near in (count, count + 1)}):
        rates = []
        for _ in range(3):
            run = bench.run([prompt] * rows, 0.0, False)
            rates.append(run.rate)
        seconds[rows] = rows / statistics.median(rates)
    return {rows: (seconds[rows + 1] - seconds[rows]) / (seconds[rows] / rows) for rows in ROWS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=192)
    args = parser.parse_args()
    args.config, args.batches = "auto", [max(ROWS) + 1]
    bench = Bench(args)
    rows: list[dict[str, Any]] = []
    try:
        for work in workloads(16):
            prompts = [bench.prompt(messages) for messages in work.conversations[: args.conversations]]
            outputs = bench.run(prompts, work.temperature, False).outputs
            rows.append({"workload": work.name, **replay(prompts, outputs)})
            print(
                f"{work.name:<18} guessed {rows[-1]['guessed']:4.0%}  first right {rows[-1]['first']:4.0%}"
                f"  its next too {rows[-1]['next']:4.0%}  another guess {rows[-1]['second_given']:4.0%}  and right"
                f" {rows[-1]['second']:5.1%} of tokens",
                flush=True,
            )
        costs = row_costs(bench, prompts[0])
    finally:
        bench.engine.shutdown()
    print("a further row costs, in tokens: " + ", ".join(f"{cost:.2f} at {rows}" for rows, cost in costs.items()))
    machine = platform.processor() or platform.machine()
    print(json.dumps({"benchmark": "draft trees", "machine": machine, "rows": rows, "row_costs": costs}))


if __name__ == "__main__":
    sys.exit(main())
